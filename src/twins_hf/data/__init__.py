"""Datasets for semantic segmentation and the transform they are trained with."""

from .loading import SegmentationData, SegmentationExample, check_examples, load_segmentation_data, read_example
from .scenes import SCENE_CLASSES, draw_scene, load_scenes
from .transforms import SegmentationTrainTransform

__all__ = [
    "SCENE_CLASSES",
    "SegmentationData",
    "SegmentationExample",
    "SegmentationTrainTransform",
    "check_examples",
    "draw_scene",
    "load_scenes",
    "load_segmentation_data",
    "read_example",
]
