"""
Segmentation of images by the protocol behind the published numbers: whole or in sliding windows, at one scale or
several, as they are or mirrored too.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput

from .image_processing_pil_twins import largest_class, merge_windows, resize_scores, window_slices

InferenceMode = Literal["whole", "slide"]
# Of the fit into (2048, 512); each of them mirrored too, they are the published multi-scale + flip setting.
MULTI_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
STRIP_ELEMENTS = 2**22  # scores at full size that are held at a time: 16 MB


class View(NamedTuple):
    """What the model says of an image at one scale: logits (num_labels, h, w) of a network input of `input_size`,
    perhaps mirrored."""

    logits: torch.Tensor
    input_size: tuple[int, int]
    is_mirrored: bool


def segment(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: Sequence[ImageInput],
    mode: InferenceMode = "whole",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 4,
    return_scores: bool = False,
) -> list[torch.Tensor] | list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Label maps of images: each is resized by the processor and run through the model; the logits are resized to the
    network's input and to the image's size, and the largest is taken. With several scales or `flip` it is the largest
    of the mean of their probabilities.

    Args:
        model: A semantic segmentation model in `eval()` mode.
        image_processor: Its processor.
        images: Files, PIL images, arrays or tensors, as the processor takes them.
        mode: `"whole"` images, or windows of the processor's `crop_size` that `"slide"` by its `split_stride`, whose
            logits are averaged.
        scales: Factors of the processor's `size`; [`MULTI_SCALES`] are the published ones.
        flip: Whether each scale is run mirrored too.
        batch_size: Images or windows of one size that share a forward pass; on a CPU each has its own.
        return_scores: Whether to return the probabilities too.

    Returns:
        Class ids (height, width), int64, of each image, on the CPU; with `return_scores`, pairs of them and of
        probabilities (num_labels, height, width), float32.
    """
    images = [image_processor.process_image(image_processor.fetch_images(image)) for image in images]
    inputs = [prepare_scales(image_processor, image, scales) for image in images]
    sizes = [tuple(image.shape[-2:]) for image in images]
    return predict_label_maps(model, image_processor, inputs, sizes, mode, flip, batch_size, return_scores)


def prepare_scales(
    image_processor: BaseImageProcessor, image: ImageInput, scales: Sequence[float] = (1.0,)
) -> list[torch.Tensor]:
    """An image preprocessed at each of `scales`, factors of the processor's `size`: float32 (C, H, W) each."""
    prepared = []
    for scale in scales:
        size = {name: int(side * scale) for name, side in dict(image_processor.size).items() if side is not None}
        inputs = image_processor(image, size=size, do_split_image=False, return_tensors="pt")
        prepared.append(inputs["pixel_values"][0])
    return prepared


@torch.inference_mode()
def predict_label_maps(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    inputs: Sequence[Sequence[torch.Tensor]],
    target_sizes: Sequence[tuple[int, int]],
    mode: InferenceMode = "whole",
    flip: bool = False,
    batch_size: int = 4,
    return_scores: bool = False,
) -> list[torch.Tensor] | list[tuple[torch.Tensor, torch.Tensor]]:
    """
    What [`segment`] returns, for images that [`prepare_scales`] prepared and whose sizes were `target_sizes`. Inputs
    of one size share a forward pass; none is padded, so that no image depends on its neighbours.
    """
    owners, pixel_values = [], []
    for index, scaled in enumerate(inputs):
        for pixels in scaled:
            owners += [(index, False), (index, True)] if flip else [(index, False)]
            pixel_values += [pixels, pixels.flip(-1)] if flip else [pixels]
    if mode == "slide":
        window = (image_processor.crop_size["height"], image_processor.crop_size["width"])
        logits = slide(model, pixel_values, window, image_processor.split_stride, batch_size)
    elif mode == "whole":
        logits = run_batched(model, pixel_values, batch_size)
    else:
        raise ValueError(f"mode={mode!r} must be 'whole' or 'slide'.")

    views: list[list[View]] = [[] for _ in inputs]
    for (index, is_mirrored), pixels, scores in zip(owners, pixel_values, logits, strict=True):
        views[index].append(View(scores, tuple(pixels.shape[-2:]), is_mirrored))
    return [
        merge_views(image_views, size, return_scores) for image_views, size in zip(views, target_sizes, strict=True)
    ]


def run_batched(model: PreTrainedModel, pixel_values: Sequence[torch.Tensor], batch_size: int) -> list[torch.Tensor]:
    """Logits (num_labels, H/4, W/4) of each of `pixel_values` (C, H, W)."""
    if model.device.type == "cpu":  # a batch is no faster there, and rounds otherwise than its images one by one
        batch_size = 1
    by_size: dict[torch.Size, list[int]] = {}
    for index, pixels in enumerate(pixel_values):
        by_size.setdefault(pixels.shape[-2:], []).append(index)
    logits: list[torch.Tensor] = [None] * len(pixel_values)
    for same in by_size.values():
        for start in range(0, len(same), batch_size):
            indices = same[start : start + batch_size]
            batch = torch.stack([pixel_values[index] for index in indices])
            for index, scores in zip(
                indices, model(batch.to(device=model.device, dtype=model.dtype)).logits, strict=True
            ):
                logits[index] = scores
    return logits


def slide(
    model: PreTrainedModel,
    pixel_values: Sequence[torch.Tensor],
    window: tuple[int, int],
    stride: int,
    batch_size: int,
) -> list[torch.Tensor]:
    """Logits (num_labels, H, W) of each of `pixel_values` (C, H, W): the mean over all windows at a position."""
    merged = []
    for pixels in pixel_values:
        size = tuple(pixels.shape[-2:])
        slices = window_slices(size, window, stride)
        logits = run_batched(model, [pixels[:, rows, columns] for rows, columns in slices], batch_size)
        window_size = tuple(min(side, limit) for side, limit in zip(size, window, strict=True))
        merged.append(merge_windows((resize_scores(scores, window_size) for scores in logits), slices, size))
    return merged


def merge_views(views: list[View], target_size: tuple[int, int], return_scores: bool = False):
    """The label map (height, width) of an image's views, and with `return_scores` its probabilities too."""
    if len(views) == 1 and not views[0].is_mirrored and not return_scores:
        logits, input_size, _ = views[0]
        return largest_class(logits, target_size, input_size, input_size).cpu()
    height, width = target_size
    label_map = torch.empty(target_size, dtype=torch.int64)
    probabilities = torch.empty(len(views[0].logits), *target_size) if return_scores else None
    num_rows = max(1, STRIP_ELEMENTS // (len(views[0].logits) * width))
    for start in range(0, height, num_rows):  # softmax wants all classes, so strips bound the memory
        stop = min(start + num_rows, height)
        total = sum(probabilities_of_rows(view, target_size, start, stop) for view in views)
        label_map[start:stop] = total.argmax(dim=0)
        if return_scores:
            probabilities[:, start:stop] = total / len(views)
    return (label_map, probabilities) if return_scores else label_map


def probabilities_of_rows(view: View, target_size: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of the softmax of a view's logits at `target_size`: (num_labels, stop - start, width)."""
    height, width = target_size
    first, last = rows_needed(view.input_size[0], height, start, stop)
    scores = resize_rows(view.logits.float(), 0, view.logits.shape[1], view.input_size[0], first, last)
    scores = resize_scores(scores, (last - first, view.input_size[1]))
    scores = resize_rows(scores, first, view.input_size[0], height, start, stop)
    scores = resize_scores(scores, (stop - start, width))
    return (scores.flip(-1) if view.is_mirrored else scores).softmax(dim=0)


def rows_needed(old_height: int, new_height: int, start: int, stop: int) -> tuple[int, int]:
    """First and last + 1 of `old_height` rows that rows `start` to `stop` of `new_height` are interpolated from."""
    lower, upper, _ = row_neighbours(old_height, new_height, torch.tensor([start, stop - 1]))
    return int(lower[0]), int(upper[1]) + 1


def row_neighbours(old_height: int, new_height: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The two rows that each of `rows` lies between, and its distance from the first of them."""
    positions = ((rows + 0.5) * (old_height / new_height) - 0.5).clamp(min=0)
    lower = positions.long()
    return lower, (lower + 1).clamp(max=old_height - 1), positions - lower


def resize_rows(
    scores: torch.Tensor, offset: int, old_height: int, new_height: int, start: int, stop: int
) -> torch.Tensor:
    """
    Rows `start` to `stop` of a map resized bilinearly from `old_height` to `new_height`, from `scores` (num_labels, h,
    w), which are the old map's rows from `offset` on.
    """
    rows = torch.arange(start, stop, device=scores.device)
    lower, upper, weight = row_neighbours(old_height, new_height, rows)
    return torch.lerp(scores[:, lower - offset], scores[:, upper - offset], weight.to(scores.dtype)[:, None])
