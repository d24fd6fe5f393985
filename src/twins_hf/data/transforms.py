"""The training transform behind the published numbers, on torchvision.transforms.v2."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict

from ..image_processing_pil_twins import IGNORE_INDEX, fitted_size, resize_bilinear, to_eight_bit


def uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


class RandomFittedResize(v2.Transform):
    """Resizes to the largest size that fits `size` times a ratio drawn uniformly from `ratio_range`."""

    def __init__(self, size: dict[str, int], ratio_range: Sequence[float] = (0.5, 2.0)):
        super().__init__()
        self.size = size
        self.ratio_range = ratio_range

    def make_params(self, flat_inputs):
        ratio = uniform(*self.ratio_range)
        size = SizeDict(**{key: int(side * ratio) for key, side in self.size.items()})
        return {"size": fitted_size(v2.query_size(flat_inputs), size)}

    def transform(self, inpt, params):
        if isinstance(inpt, tv_tensors.Mask):
            return tvF.resize(inpt, params["size"])  # nearest
        return tv_tensors.Image(resize_bilinear(inpt.as_subclass(torch.Tensor).int(), params["size"]).to(torch.uint8))


class RandomClassLimitedCrop(v2.Transform):
    """
    Crops to at most `size` (height, width), drawing again, at most `max_redraws` times, while fewer than two classes
    are in the crop or one fills `cat_max_ratio` of its labelled pixels.
    """

    def __init__(self, size: tuple[int, int], cat_max_ratio: float = 0.75, max_redraws: int = 10):
        super().__init__()
        self.size = size
        self.cat_max_ratio = cat_max_ratio
        self.max_redraws = max_redraws

    def make_params(self, flat_inputs):
        labels = next(inpt for inpt in flat_inputs if isinstance(inpt, tv_tensors.Mask))
        box = self.draw_box(labels.shape[-2:])
        for _ in range(self.max_redraws):
            if self.is_varied(tvF.crop(labels, *box)):
                break
            box = self.draw_box(labels.shape[-2:])
        return {"box": box}

    def draw_box(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width."""
        height, width = (min(side, limit) for side, limit in zip(image_size, self.size, strict=True))
        top = torch.randint(image_size[0] - height + 1, ()).item()
        left = torch.randint(image_size[1] - width + 1, ()).item()
        return top, left, height, width

    def is_varied(self, labels: torch.Tensor) -> bool:
        counts = torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)
        counts[IGNORE_INDEX] = 0
        return bool((counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum())

    def transform(self, inpt, params):
        return tvF.crop(inpt, *params["box"])


class PhotometricDistortion(v2.Transform):
    """
    Each with probability one half, on grey levels 0..255: brightness plus up to `brightness`, contrast times a factor
    (before or after the next two), saturation (in HSV) times a factor, hue turned by `hue` steps of two degrees.
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: int = 18,
    ):
        super().__init__()
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def make_params(self, flat_inputs):
        apply = (torch.rand(5) < 0.5).tolist()
        return {
            "brightness": uniform(-self.brightness, self.brightness) if apply[0] else 0.0,
            "contrast": uniform(*self.contrast) if apply[1] else 1.0,
            "contrast_first": apply[2],
            "saturation": uniform(*self.saturation) if apply[3] else 1.0,
            "hue": torch.randint(-self.hue, self.hue, ()).item() / 180 if apply[4] and self.hue else 0.0,
        }

    def transform(self, inpt, params):
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        image = self.scale(inpt, 1.0, params["brightness"])
        if params["contrast_first"]:
            image = self.scale(image, params["contrast"])
        if params["saturation"] != 1.0:
            image = self.saturate(image, params["saturation"])
        if params["hue"]:
            image = tvF.adjust_hue(image, params["hue"])
        if not params["contrast_first"]:
            image = self.scale(image, params["contrast"])
        return tv_tensors.Image(image)

    @staticmethod
    def scale(image: torch.Tensor, factor: float, offset: float = 0.0) -> torch.Tensor:
        if factor == 1.0 and offset == 0.0:
            return image
        return (image * factor + offset).clamp_(0, 255).to(torch.uint8)

    @staticmethod
    def saturate(image: torch.Tensor, factor: float) -> torch.Tensor:
        """Scales the saturation S = (max - min) / max of HSV, at most to 1, keeping hue and value: every channel's
        distance from the largest is multiplied by min(factor, 1 / S)."""
        image = image.float()
        largest, smallest = image.amax(dim=-3, keepdim=True), image.amin(dim=-3, keepdim=True)
        factor = (largest / (largest - smallest).clamp(min=1e-6)).clamp(max=factor)
        return (largest - (largest - image) * factor).round_().clamp_(0, 255).to(torch.uint8)


class SegmentationTrainTransform(nn.Module):
    """
    Random resize, class-limited crop, mirror, photometric distortion, normalisation and padding to the crop.

    Args:
        crop_size (`tuple[int, int]`): Height and width of what comes out.
        size (`dict[str, int]`): `shortest_edge` and `longest_edge` that ratio 1 fits the image into.
        ratio_range: Of the random resize.
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
        self.augment = v2.Compose(
            [
                RandomFittedResize(size or {"shortest_edge": 512, "longest_edge": 2048}, ratio_range),
                RandomClassLimitedCrop(crop_size, cat_max_ratio),
                v2.RandomHorizontalFlip(flip_probability),
                *([PhotometricDistortion()] if photometric_distortion else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(image_mean, image_std),
            ]
        )

    def forward(self, image: PIL.Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Image of any mode and labels (H, W), int64 -> (3, *crop_size), float32, and (*crop_size), int64."""
        image = tv_tensors.Image(tvF.pil_to_tensor(to_eight_bit(image).convert("RGB")))
        image, labels = self.augment(image, tv_tensors.Mask(torch.from_numpy(labels)))
        bottom, right = (limit - side for limit, side in zip(self.crop_size, labels.shape[-2:], strict=True))
        padding = (0, right, 0, bottom)
        image = nn.functional.pad(image.as_subclass(torch.Tensor), padding)
        return image, nn.functional.pad(labels.as_subclass(torch.Tensor), padding, value=IGNORE_INDEX)
