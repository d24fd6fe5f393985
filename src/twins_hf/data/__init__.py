"""Datasets for semantic segmentation, the transform they are trained with, and the streams of training crops."""

from .loading import SegmentationData, SegmentationExample, check_examples, load_segmentation_data, read_example
from .scenes import SCENE_CLASSES, draw_scene, load_scenes
from .streams import StreamedTrainingStream, TrainingStream
from .transforms import SegmentationTrainTransform

__all__ = [
    "SCENE_CLASSES",
    "SegmentationData",
    "SegmentationExample",
    "SegmentationTrainTransform",
    "StreamedTrainingStream",
    "TrainingStream",
    "check_examples",
    "draw_scene",
    "load_scenes",
    "load_segmentation_data",
    "read_example",
]
