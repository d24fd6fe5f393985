"""Segmentation of images by the protocol behind the published numbers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput
from transformers.modeling_outputs import SemanticSegmenterOutput


def segment(
    model: PreTrainedModel, image_processor: BaseImageProcessor, images: Sequence[ImageInput]
) -> list[torch.Tensor]:
    """
    Label maps of images, each as a whole: resized by the processor, run through the model, the logits resized to the
    network's input and to the image's size, and the largest taken.

    Args:
        model: A semantic segmentation model in `eval()` mode.
        image_processor: Its processor.
        images: Files, PIL images, arrays or tensors, as the processor takes them.

    Returns:
        Class ids (height, width), int64, of each image, on the CPU.
    """
    images = [image_processor.process_image(image_processor.fetch_images(image)) for image in images]
    pixel_values = [image_processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
    return predict_label_maps(model, image_processor, pixel_values, [tuple(image.shape[-2:]) for image in images])


@torch.inference_mode()
def predict_label_maps(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    pixel_values: Sequence[torch.Tensor],
    target_sizes: Sequence[tuple[int, int]],
) -> list[torch.Tensor]:
    """
    Label maps of preprocessed images (C, H, W), of unequal sizes perhaps, at `target_sizes` (height, width). Images of
    one size share a forward pass; no image is padded, so that none depends on its neighbours.
    """
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(pixel_values):
        by_size.setdefault(image.shape[-2:], []).append(index)

    label_maps = [None] * len(pixel_values)
    for size, indices in by_size.items():
        batch = torch.stack([pixel_values[index] for index in indices])
        logits = model(batch.to(device=model.device, dtype=model.dtype)).logits
        maps = image_processor.post_process_semantic_segmentation(
            SemanticSegmenterOutput(logits=logits),
            target_sizes=[target_sizes[index] for index in indices],
            input_sizes=[tuple(size)] * len(indices),
        )
        for index, label_map in zip(indices, maps, strict=True):
            label_maps[index] = label_map.cpu()
    return label_maps
