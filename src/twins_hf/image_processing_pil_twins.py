# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image processor of the Twins models on PIL and NumPy, and what it shares with the torchvision one."""

import os
from collections.abc import Iterable

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from torch import nn
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .resizing_twins import resize_bilinear, resize_bilinear_whole

IGNORE_INDEX = 255
CHUNK_ELEMENTS = 2**20  # scores at full size that are held at a time in post-processing: 4 MB, which a cache holds


class TwinsImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether 0 in a segmentation map means "unlabelled" and becomes 255, and every other value is lowered by one, as
        ADE20K wants.
    do_split_image (`bool`, *optional*, defaults to `self.do_split_image`):
        Whether an image is cut into overlapping windows of `crop_size` after resizing, each a sample of the batch;
        [`post_process_semantic_segmentation`] merges them again.
    split_stride (`int`, *optional*, defaults to `self.split_stride`):
        Distance in pixels between the starts of two windows.
    """

    do_reduce_labels: bool
    do_split_image: bool
    split_stride: int


def fitted_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """
    Height and width to which an image of `image_size` (height, width) is resized.

    With `shortest_edge` and `longest_edge`, the largest size of the same ratio that fits both; with one of them, the
    size whose shortest or longest side it is; sides are rounded half up, as MMSegmentation does. `height` and `width`
    are taken as they are.

    Raises:
        `ValueError`: if `size` has none of these keys.
    """
    if size.height and size.width:
        return size.height, size.width
    scales = []
    if size.shortest_edge:
        scales.append(size.shortest_edge / min(image_size))
    if size.longest_edge:
        scales.append(size.longest_edge / max(image_size))
    if not scales:
        raise ValueError(f"size={dict(size)} needs `shortest_edge`, `longest_edge`, or both `height` and `width`.")
    height, width = (max(1, int(side * min(scales) + 0.5)) for side in image_size)
    return height, width


def open_image(path: str | os.PathLike) -> PIL.Image.Image:
    """
    Reads an image file whole, in its own mode.

    Raises:
        `ValueError`: naming the file, if it is no image or is cut short.
    """
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # PIL raises all three on broken files
        raise ValueError(f"{path}: cannot be read as an image ({error}).") from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turns an image as its EXIF says; one that says nothing is not copied, as `exif_transpose` would."""
    image.load()
    is_upright = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
    return image if is_upright else PIL.ImageOps.exif_transpose(image)


def to_eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales a 16-bit grey image to 0..255, which `convert("RGB")` would clip; other modes are left alone."""
    if not image.mode.startswith("I"):
        return image
    return PIL.Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))


def segmentation_map_to_array(segmentation_map: ImageInput | str | os.PathLike) -> np.ndarray:
    """
    Segmentation map, as a file, PIL image, array or tensor of (H, W), (1, H, W) or (H, W, 1) -> int64 array (H, W).

    Raises:
        `ValueError`: if it has more than one channel, or a type that is not an integer's.
    """
    if isinstance(segmentation_map, (str, os.PathLike)):
        segmentation_map = open_image(segmentation_map)
    array = np.asarray(segmentation_map)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array.squeeze(0 if array.shape[0] == 1 else -1)
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise ValueError(
            f"a segmentation map must hold one integer for each pixel, but it has shape {array.shape} and type "
            f"{array.dtype}."
        )
    return array.astype(np.int64)


def reduce_labels(labels: np.ndarray) -> np.ndarray:
    """Lowers labels by one; 0 ("unlabelled") and 255 become 255."""
    return np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) at `size` (height, width): at each pixel the label at the floor of its scaled position, as
    OpenCV's and torch's `nearest`."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(labels.shape, size, strict=True))
    return labels[rows[:, None], columns]


def window_slices(size: tuple[int, int], window: tuple[int, int], stride: int) -> list[tuple[slice, slice]]:
    """
    Rows and columns of the windows that cover a map of `size` (height, width), row by row. Windows start `stride`
    apart; the last of a row or column is moved back to the edge. A side shorter than the window has one window of its
    length.
    """
    spans = []
    for length, side in zip(size, window, strict=True):
        last = max(0, length - side)
        spans.append([slice(start, min(start + side, length)) for start in (*range(0, last, stride), last)])
    return [(rows, columns) for rows in spans[0] for columns in spans[1]]


def merge_windows(
    logits: Iterable[torch.Tensor], slices: list[tuple[slice, slice]], size: tuple[int, int]
) -> torch.Tensor:
    """Mean at each position of the windows' logits (num_labels, window height, window width): (num_labels, *size)."""
    total, count = None, torch.zeros(size)
    for window, (rows, columns) in zip(logits, slices, strict=True):
        if total is None:
            total = window.new_zeros((len(window), *size))
        total[:, rows, columns] += window
        count[rows, columns] += 1
    return total.div_(count.to(total.device))


def resize_scores(
    scores: torch.Tensor,
    target_size: tuple[int, int] | None,
    padded_size: tuple[int, int] | None = None,
    input_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """
    Scores (num_labels, h, w), float32, resized bilinearly: to the network's input `padded_size`, of which `input_size`
    is the image, where these are given; then to `target_size`, where it is.
    """
    scores = scores.float()
    if padded_size is not None:
        scores = nn.functional.interpolate(scores[None], size=padded_size, mode="bilinear", align_corners=False)[0]
        scores = scores[:, : input_size[0], : input_size[1]]
    if target_size is not None and target_size != tuple(scores.shape[-2:]):
        scores = nn.functional.interpolate(scores[None], size=target_size, mode="bilinear", align_corners=False)[0]
    return scores


def largest_class(logits: torch.Tensor, target_size: tuple[int, int], *sizes: tuple[int, int]) -> torch.Tensor:
    """
    `resize_scores(logits, target_size, *sizes).argmax(0)`, a label map, with only a few of the classes at full size at
    a time. Each class is resized for itself, so the result is the same.
    """
    logits, best = logits.detach(), None
    chunk = min(max(CHUNK_ELEMENTS // (target_size[0] * target_size[1]), 1), 16)
    for first in range(0, len(logits), chunk):
        scaled = resize_scores(logits[first : first + chunk], target_size, *sizes)
        for class_id, scores in enumerate(scaled, start=first):
            if best is None:
                best, label_map = scores, torch.zeros_like(scores, dtype=torch.int32)
            else:
                label_map.masked_fill_(scores > best, class_id)
                best = torch.maximum(best, scores)
    return label_map.long()


class TwinsImageProcessingMixin:
    """
    Preprocessing of images and segmentation maps by the protocol behind the published numbers, and postprocessing of
    logits; both backends do the same with their own array type.

    An image becomes RGB, upright (EXIF) and 8 bit; is fitted into `size` (2048 by 512, keeping the ratio) by OpenCV's
    bilinear interpolation of 8-bit images, without antialiasing; cropped around its centre (`do_center_crop`);
    rescaled and normalised; and, in a batch of unequal images, padded with 0 (labels: 255) at the right and bottom.
    """

    valid_kwargs = TwinsImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    crop_size = {"height": 512, "width": 512}
    do_convert_rgb = True
    do_resize = True
    do_center_crop = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_pad = True
    do_reduce_labels = False
    do_split_image = False
    split_stride = 341

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[TwinsImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: One image or a list: files, URLs, PIL images (any mode), arrays or tensors of values 0..255.
            segmentation_maps (*optional*): As many maps of the same sizes, one integer a pixel.
            kwargs: Settings that shall differ from the processor's for this call.

        Returns:
            [`BatchFeature`]: `pixel_values` (batch_size, 3, height, width), float32, and with `segmentation_maps`
            `labels` (batch_size, height, width), int64; with `do_split_image`, a sample is a window.

        Raises:
            `ValueError`: if a file cannot be read, the two lists differ in length, a map and its image in size, or
            `resample` is not bilinear.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def fetch_images(self, images):
        if isinstance(images, (str, os.PathLike)) and not str(images).startswith(("http://", "https://", "data:")):
            return open_image(images)
        return super().fetch_images(images)

    def process_image(self, image: ImageInput, may_pack: bool = False, **kwargs):
        """
        An image upright and of 8 bits: (C, H, W) in the backend's type; with `may_pack`, that of an RGB photograph
        (H, W), int32, its pixels packed as [`BilinearResize`] takes them, which is how PIL holds them.
        """
        if isinstance(image, PIL.Image.Image):
            image = to_eight_bit(upright(image))
            if may_pack and image.mode == "RGB" and "transparency" not in image.info:
                return np.frombuffer(image.tobytes("raw", "RGBX"), "<i4").reshape(image.height, image.width)
        elif image.dtype in (np.uint16, torch.uint16):
            image = np.asarray(image / 257).round().astype(np.uint8)
        return super().process_image(image, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: str | TensorType | None,
        device: "str | torch.device | None" = None,
        **kwargs,
    ) -> BatchFeature:
        images = self._prepare_image_like_inputs(
            images,
            do_convert_rgb=do_convert_rgb,
            input_data_format=input_data_format,
            device=device,
            may_pack=kwargs["do_resize"] and (device is None or torch.device(device).type == "cpu"),
        )
        samples = self._preprocess(images, **kwargs)
        if return_tensors == "pt" and len(samples) == 1 and kwargs["do_resize"]:
            samples = torch.as_tensor(samples[0])[None].contiguous()  # resized, so no one else's: stacking would copy
        data = {"pixel_values": samples}
        if segmentation_maps is not None:
            data["labels"] = self._preprocess_labels(segmentation_maps, images, **kwargs)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        do_pad: bool,
        pad_size: SizeDict | None,
        do_split_image: bool,
        split_stride: int,
        **kwargs,
    ) -> list:
        """Images as `process_image` returns them -> (C, H, W) in the backend's type, ready for the model."""
        if do_resize and resample != PILImageResampling.BILINEAR:
            raise ValueError(f"resample={resample!r} is not supported: Twins processors resize bilinearly (2).")
        if do_resize and not (do_rescale or do_normalize):
            do_rescale, rescale_factor = True, 1.0  # whole grey levels, in float32 like all that is resized
        processed = []
        for image in images:
            if do_resize:
                image = self.resize(image, fitted_size(image.shape[-2:], size))
            if do_center_crop:
                image = _center_crop(image, crop_size)
            image = self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            processed += _split(image, crop_size, split_stride) if do_split_image else [image]
        return self.pad(processed, pad_size=_padded_size(pad_size, crop_size, do_center_crop)) if do_pad else processed

    def _preprocess_labels(
        self,
        segmentation_maps: ImageInput,
        images: list,
        do_reduce_labels: bool,
        do_resize: bool,
        size: SizeDict,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_pad: bool,
        pad_size: SizeDict | None,
        do_split_image: bool,
        split_stride: int,
        **kwargs,
    ) -> list[np.ndarray]:
        """Segmentation maps -> labels (H, W), with every geometric step that their `images` went through."""
        is_list = isinstance(segmentation_maps, (list, tuple))
        if not is_list and not isinstance(segmentation_maps, (str, os.PathLike, PIL.Image.Image)):
            is_list = segmentation_maps.ndim == 3 and segmentation_maps.shape[0] == len(images)
        maps = [segmentation_map_to_array(item) for item in (segmentation_maps if is_list else [segmentation_maps])]
        if len(maps) != len(images):
            raise ValueError(f"there are {len(images)} images but {len(maps)} segmentation maps.")

        processed = []
        for index, (labels, image) in enumerate(zip(maps, images, strict=True)):
            if labels.shape != tuple(image.shape[-2:]):
                raise ValueError(
                    f"image {index} is {image.shape[-1]}x{image.shape[-2]} pixels but its segmentation map is "
                    f"{labels.shape[1]}x{labels.shape[0]}."
                )
            if do_reduce_labels:
                labels = reduce_labels(labels)
            if do_resize:
                labels = resize_labels(labels, fitted_size(labels.shape, size))
            if do_center_crop:
                labels = _center_crop(labels, crop_size)
            processed += _split(labels[None], crop_size, split_stride) if do_split_image else [labels[None]]
        if do_pad:
            pad_size = _padded_size(pad_size, crop_size, do_center_crop)
            processed = PilBackend.pad(self, processed, pad_size=pad_size, fill_value=IGNORE_INDEX)
        return [labels[0] for labels in processed]

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: "list[tuple[int, int]] | torch.Tensor | None" = None,
        input_sizes: "list[tuple[int, int]] | torch.Tensor | None" = None,
        return_segmentation_scores: bool = False,
    ) -> "list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]":
        """
        Label maps of a model's outputs: logits are resized to the network's input size, freed from the batch's
        padding, resized to the image's own size, and the largest is taken.

        Args:
            outputs ([`SemanticSegmenterOutput`]): With `logits` (batch_size, num_labels, height / 4, width / 4).
            target_sizes (*optional*): (height, width) of each image before preprocessing. If unset, the label maps
                have the logits' size.
            input_sizes (*optional*): (height, width) of each preprocessed image without the batch's padding. If unset,
                the sizes that this processor resizes `target_sizes` to, where the logits fit them; else the logits are
                resized to `target_sizes` in one step.
            return_segmentation_scores (`bool`, defaults to `False`): Return, for each image, a
                [`SemanticSegmentationPostProcessorOutput`] with `segmentation` and `segmentation_scores`, the resized
                logits (num_labels, height, width), in place of the label map.

        Returns:
            For each image its label map (height, width) of class ids, or the object above.

        Raises:
            `ValueError`: if the sizes are not as many as the images.
        """
        logits = outputs.logits
        if self.do_split_image:
            images, sizes = self._merge_images(logits, target_sizes)
        elif target_sizes is None:
            images, sizes = logits, [(None,)] * len(logits)
        else:
            images, sizes = logits, self._sizes(logits, target_sizes, input_sizes)
        if return_segmentation_scores:
            scores = [resize_scores(image, *image_sizes) for image, image_sizes in zip(images, sizes, strict=True)]
            return [
                SemanticSegmentationPostProcessorOutput(
                    data={"segmentation": score.argmax(dim=0), "segmentation_scores": score}
                )
                for score in scores
            ]
        return [
            image.argmax(dim=0) if image_sizes[0] is None else largest_class(image, *image_sizes)
            for image, image_sizes in zip(images, sizes, strict=True)
        ]

    def _sizes(self, logits: torch.Tensor, target_sizes, input_sizes) -> list[tuple[tuple[int, int], ...]]:
        """What [`resize_scores`] resizes each image's logits to."""
        target_sizes = _as_sizes(target_sizes, "target_sizes", len(logits))
        if input_sizes is not None:
            input_sizes = _as_sizes(input_sizes, "input_sizes", len(logits))
        elif self.do_resize and not self.do_center_crop:
            fitted = [fitted_size(size, self.size) for size in target_sizes]
            if tuple(-(-max(sides) // 4) for sides in zip(*fitted, strict=True)) == tuple(logits.shape[-2:]):
                input_sizes = fitted
        if input_sizes is None:
            return [(size,) for size in target_sizes]
        padded_size = tuple(max(sides) for sides in zip(*input_sizes, strict=True))
        return [(target, padded_size, size) for target, size in zip(target_sizes, input_sizes, strict=True)]

    def _merge_images(self, logits: torch.Tensor, target_sizes):
        """The windows' logits put together, (num_labels, height, width) of each resized image, and its target size."""
        if target_sizes is None or self.do_center_crop:
            raise ValueError("merging the windows of `do_split_image` needs target_sizes, and no `do_center_crop`.")
        target_sizes = _as_sizes(target_sizes, "target_sizes", len(target_sizes))
        fitted = [fitted_size(size, self.size) if self.do_resize else size for size in target_sizes]
        window = (self.crop_size["height"], self.crop_size["width"])
        slices = [window_slices(size, window, self.split_stride) for size in fitted]
        num_windows = sum(map(len, slices))
        if num_windows != len(logits):
            raise ValueError(f"target_sizes={target_sizes} have {num_windows} windows, but logits have {len(logits)}.")
        padded_size = tuple(max(min(size[axis], window[axis]) for size in fitted) for axis in (0, 1))
        images, windows = [], iter(logits)
        for size, image_slices in zip(fitted, slices, strict=True):
            input_size = tuple(min(side, limit) for side, limit in zip(size, window, strict=True))
            scores = (resize_scores(next(windows), None, padded_size, input_size) for _ in image_slices)
            images.append(merge_windows(scores, image_slices, size))
        return images, [(size,) for size in target_sizes]


def _center_crop(array, crop_size: SizeDict):
    """The middle of an array (..., H, W); a side shorter than the crop stays as it is."""
    height, width = array.shape[-2:]
    top, left = max(0, height - crop_size.height) // 2, max(0, width - crop_size.width) // 2
    return array[..., top : top + crop_size.height, left : left + crop_size.width]


def _split(array, crop_size: SizeDict, stride: int) -> list:
    """The windows of an array (C, H, W)."""
    slices = window_slices(tuple(array.shape[-2:]), (crop_size.height, crop_size.width), stride)
    return [array[:, rows, columns] for rows, columns in slices]


def _padded_size(pad_size: SizeDict | None, crop_size: SizeDict, do_center_crop: bool) -> SizeDict | None:
    """What a batch is padded to: `pad_size`, the crop where there is one, else (`None`) its own largest sides."""
    return crop_size if pad_size is None and do_center_crop else pad_size


def _as_sizes(sizes, name: str, batch_size: int) -> list[tuple[int, int]]:
    if len(sizes) != batch_size:
        raise ValueError(f"{name} has {len(sizes)} entries for {batch_size} images.")
    return [(int(height), int(width)) for height, width in sizes]


class TwinsImageProcessorPil(TwinsImageProcessingMixin, PilBackend):
    __doc__ = TwinsImageProcessingMixin.__doc__

    def resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if image.ndim == 2 or image.dtype == np.uint8 and len(image) == 3:  # two dimensions: packed pixels
            return resize_bilinear(image, size)
        return resize_bilinear_whole(np.rint(image).astype(np.int32), size).astype(np.float32)

    def rescale_and_normalize(
        self, image, do_rescale, rescale_factor, do_normalize, image_mean, image_std
    ) -> np.ndarray:
        if image.dtype == np.uint8 and (do_rescale or do_normalize):  # a table of the 256 levels gives the same bits
            levels = np.tile(np.arange(256), (len(image), 1, 1))
            settings = do_rescale, rescale_factor, do_normalize, image_mean, image_std
            table = self.rescale_and_normalize(levels, *settings)
            converted = np.empty(image.shape, table.dtype)
            for channel_table, channel, out in zip(table, image, converted, strict=True):
                channel_table.take(channel, out=out, mode="clip")
            return converted
        if do_rescale:
            image = self.rescale(image, rescale_factor)
        if do_normalize:
            image = self.normalize(image, image_mean, image_std)
        return image


__all__ = ["TwinsImageProcessorPil"]
