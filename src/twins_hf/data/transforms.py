"""
The training transform behind the published numbers: random resize, class-limited crop, mirror, photometric distortion,
normalisation, padding.

The crop is chosen on the labels first; only the pixels that it shows are then resized, and all that follows runs on
bands of rows that a cache holds. The result is, bit for bit, that of the plain composition: OpenCV's bilinear
resize of the whole image, then the crop, then torchvision's operations on 8-bit images.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

from ..image_processing_pil_twins import IGNORE_INDEX, fitted_size, to_eight_bit
from ..resizing_twins import BilinearResize, bands

TINY = 1e-20  # added to divisors, one of which may be 0; too little to change any other


def uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


class CropBox(NamedTuple):
    """Pixels of an image that a crop shows."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass
class ClassLimitedCrop:
    """
    Draws a crop of at most `size` (height, width), again and at most `max_redraws` times while fewer than two classes
    are in it or one fills `cat_max_ratio` of its labelled pixels.
    """

    size: tuple[int, int]
    cat_max_ratio: float = 0.75
    max_redraws: int = 10

    def draw(self, labels: np.ndarray, image_size: tuple[int, int]) -> tuple[CropBox, np.ndarray]:
        """The box in an image whose `labels` (H, W) are resized to `image_size` (height, width), and the labels in
        it."""
        for redraws in range(self.max_redraws + 1):
            box = self.draw_box(image_size)
            cropped = crop_labels(labels, image_size, box)
            if redraws == self.max_redraws or self.is_varied(cropped):
                return box, cropped

    def draw_box(self, image_size: tuple[int, int]) -> CropBox:
        height, width = (min(side, limit) for side, limit in zip(image_size, self.size, strict=True))
        top = torch.randint(image_size[0] - height + 1, ()).item()
        left = torch.randint(image_size[1] - width + 1, ()).item()
        return CropBox(top, left, height, width)

    def is_varied(self, labels: np.ndarray) -> bool:
        if labels.dtype == np.uint8:  # counted as they are; NumPy would copy them into integers of 64 bits
            counts = np.array(PIL.Image.fromarray(labels).histogram())
        else:
            counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
        counts[IGNORE_INDEX] = 0
        return bool((counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum())


def crop_labels(labels: np.ndarray, size: tuple[int, int], box: CropBox) -> np.ndarray:
    """Labels (H, W) at `size` (height, width), at each pixel the nearest as torch's `nearest` takes it, in the box."""
    rows, columns = (
        # in float32, as torch: the floor of a multiple differs from that of the exact ratio in a few sizes
        np.floor(np.arange(first, first + count, dtype=np.float32) * np.float32(old / new)).astype(np.intp)
        for old, new, first, count in zip(labels.shape, size, box[:2], box[2:], strict=True)
    )
    return labels.take(rows, axis=0, mode="clip").take(columns, axis=1, mode="clip")


@dataclasses.dataclass
class ColorShift:
    """
    One draw of the photometric distortion, on grey levels 0..255: brightness is added; contrast multiplies, before or
    after the next two; saturation multiplies that of HSV; hue turns it by a share of the circle.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: float = 0.0

    def __call__(self, image: np.ndarray) -> None:
        """Changes an image (3, H, W), float32, whole grey levels 0..255, in place."""
        if self.brightness != 0.0:
            image += self.brightness
            clip_levels(image)
        if self.contrast_first:
            self.scale_contrast(image)
        if self.saturation != 1.0:
            scale_saturation(image, self.saturation)
        if self.hue != 0.0:
            turn_hue(image, self.hue)
        if not self.contrast_first:
            self.scale_contrast(image)

    def scale_contrast(self, image: np.ndarray) -> None:
        if self.contrast != 1.0:
            image *= self.contrast
            clip_levels(image)


@dataclasses.dataclass
class PhotometricDistortion:
    """
    Draws, each with probability one half: brightness plus up to `brightness` grey levels, contrast and saturation
    times a factor, hue turned by `-hue` to `hue - 1` steps of two degrees; and which of these contrast comes before.
    """

    brightness: float = 32
    contrast: Sequence[float] = (0.5, 1.5)
    saturation: Sequence[float] = (0.5, 1.5)
    hue: int = 18

    def draw(self) -> ColorShift:
        apply = (torch.rand(5) < 0.5).tolist()
        return ColorShift(
            brightness=uniform(-self.brightness, self.brightness) if apply[0] else 0.0,
            contrast=uniform(*self.contrast) if apply[1] else 1.0,
            contrast_first=apply[2],
            saturation=uniform(*self.saturation) if apply[3] else 1.0,
            hue=torch.randint(-self.hue, self.hue, ()).item() / 180 if apply[4] and self.hue else 0.0,
        )


def clip_levels(image: np.ndarray) -> None:
    """Rounds down to whole grey levels 0..255, in place."""
    np.clip(image, 0, 255, out=image)
    np.floor(image, out=image)


def channel_range(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest of three channels, and by how much it exceeds the smallest."""
    red, green, blue = image
    largest = np.maximum(red, green)
    np.maximum(largest, blue, out=largest)
    spread = np.minimum(red, green)
    np.minimum(spread, blue, out=spread)
    return largest, np.subtract(largest, spread, out=spread)


def scale_saturation(image: np.ndarray, factor: float) -> None:
    """
    Scales the saturation S = (max - min) / max of HSV, at most to 1, keeping hue and value, in place: every channel's
    distance from the largest is multiplied by min(factor, 1 / S).
    """
    largest, factors = channel_range(image)
    factors += TINY
    np.divide(largest, factors, out=factors)
    np.minimum(factors, factor, out=factors)
    np.subtract(largest, image, out=image)
    image *= factors
    np.subtract(largest, image, out=image)
    np.rint(image, out=image)


def turn_hue(image: np.ndarray, turn: float) -> None:
    """Adds `turn`, a share of the circle, to the hue of HSV, in place; rounded as torchvision's `adjust_hue`."""
    image *= 1 / 255
    largest, spread = channel_range(image)
    is_red = image[0] == largest
    is_green = (image[1] == largest) > is_red  # where two channels are the largest, the first of them counts
    is_blue = ~(is_red | is_green)
    saturation = spread / (largest + TINY)
    spread += TINY
    np.subtract(largest, image, out=image)
    image /= spread

    red, green, blue = image
    hue = green + 4
    hue -= red
    hue *= is_blue.astype(np.float32)
    for start, nearer, farther, is_largest in ((2, red, blue, is_green), (0, blue, green, is_red)):
        sixths = nearer + start
        sixths -= farther
        sixths *= is_largest.astype(np.float32)
        hue += sixths
    hue *= 1 / 6
    hue += 1
    hue -= np.floor(hue)
    hue += turn
    hue -= np.floor(hue)
    hue *= 6
    sector = np.floor(hue)
    hue -= sector

    # One channel holds the value, one the least, and the third rises between them in even sectors, falls in odd ones.
    is_odd = sector * 0.5
    is_odd -= np.floor(is_odd)
    is_odd += is_odd
    direction = is_odd * -2
    direction += 1
    least = 1 - saturation
    least *= largest
    hue *= saturation
    hue *= direction
    is_odd -= 1
    is_odd *= saturation
    is_odd += 1
    is_odd += hue
    between = np.multiply(is_odd, largest, out=is_odd)
    sector *= 1000
    for index, center in enumerate((2500, 1500, 3500)):
        # 0 where the channel is the third; elsewhere beyond the value, or below the least, where clipping takes it
        channel = image[index]
        np.subtract(sector, center, out=channel)
        np.abs(channel, out=channel)
        np.subtract(*((1500, channel) if index else (channel, 1500)), out=channel)
        channel += between
        np.maximum(channel, least, out=channel)
        np.minimum(channel, largest, out=channel)
    image *= 255 + 1.0 - 1e-3
    np.floor(image, out=image)


@dataclasses.dataclass
class Augmentation:
    """
    What is drawn for one image.

    Attributes:
        size: Height and width to which it is resized.
        box: What is cut from that.
        labels: Labels (height, width) of the box.
        is_mirrored: Whether left and right are then swapped.
        color: What then happens to colours, if anything.
    """

    size: tuple[int, int]
    box: CropBox
    labels: np.ndarray
    is_mirrored: bool = False
    color: ColorShift | None = None


class SegmentationTrainTransform(nn.Module):
    """
    Random resize, class-limited crop, mirror, photometric distortion, normalisation and padding to the crop.

    Args:
        crop_size (`tuple[int, int]`): Height and width of what comes out.
        size (`dict[str, int]`): `shortest_edge` and `longest_edge` that ratio 1 fits the image into.
        ratio_range: Of the random resize, drawn uniformly.
        cat_max_ratio: Largest share of one class in a crop.
        flip_probability: Of mirroring.
        photometric_distortion: Whether colours are distorted.
        image_mean, image_std: Of images in 0..1.

    Draws from torch's global random generator.
    """

    def __init__(
        self,
        crop_size: tuple[int, int] = (512, 512),
        size: dict[str, int] | None = None,
        ratio_range: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip_probability: float = 0.5,
        photometric_distortion: bool = True,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        self.crop_size = crop_size
        self.size = size or {"shortest_edge": 512, "longest_edge": 2048}
        self.ratio_range = ratio_range
        self.crop = ClassLimitedCrop(crop_size, cat_max_ratio)
        self.flip_probability = flip_probability
        self.distortion = PhotometricDistortion() if photometric_distortion else None
        self.mean, self.std = (np.float32(channels).reshape(3, 1, 1) for channels in (image_mean, image_std))

    def draw_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width: the largest that fit `size` times a random ratio."""
        ratio = uniform(*self.ratio_range)
        return fitted_size(image_size, SizeDict(**{key: int(side * ratio) for key, side in self.size.items()}))

    def draw(self, labels: np.ndarray) -> Augmentation:
        size = self.draw_size(labels.shape)
        box, cropped = self.crop.draw(labels, size)
        is_mirrored = torch.rand(()).item() < self.flip_probability
        return Augmentation(
            size, box, cropped, is_mirrored, self.distortion.draw() if self.distortion is not None else None
        )

    def apply(self, image: np.ndarray, augmentation: Augmentation) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, H, W), uint8 -> what [`forward`] returns, for this draw."""
        box, is_mirrored = augmentation.box, augmentation.is_mirrored
        resized = BilinearResize(image, augmentation.size, box, is_mirrored)
        pixel_values = np.empty((3, *self.crop_size), np.float32)
        pixel_values[:, box.height :], pixel_values[:, :, box.width :] = 0, 0
        for rows in bands(box.height, box.width):
            band = resized.band(rows).astype(np.float32)
            if augmentation.color is not None:
                augmentation.color(band)
            band *= 1 / 255
            band -= self.mean
            np.divide(band, self.std, out=pixel_values[:, rows, : box.width])
        padded_labels = np.full(self.crop_size, IGNORE_INDEX, np.int64)
        padded_labels[: box.height, : box.width] = augmentation.labels[:, :: -1 if is_mirrored else 1]
        return torch.from_numpy(pixel_values), torch.from_numpy(padded_labels)

    def forward(self, image: PIL.Image.Image | np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Image of any mode, or RGB as (3, H, W), uint8; and labels (H, W), integers -> (3, *crop_size), float32, and
        (*crop_size), int64.
        """
        if isinstance(image, PIL.Image.Image):
            image = np.asarray(to_eight_bit(image).convert("RGB")).transpose(2, 0, 1)
        return self.apply(image, self.draw(labels))
