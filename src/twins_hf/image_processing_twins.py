# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image processor of the Twins models on torchvision, the default."""

import torch
import torchvision.transforms.v2.functional as tvF
from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_twins import ROUND_HALF_UP, TwinsImageProcessingMixin, TwinsImageProcessorKwargs  # noqa: F401


def resize_to_grey_levels(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Image (..., C, H, W) of values 0..255 at `size` (height, width), in whole grey levels, float32: bilinear without
    antialiasing. (torch's own uint8 path is further from OpenCV's.)
    """
    # In float32 the last bits depend on how threads share the image, and with them, now and then, a grey level.
    image = image.double() if image.device.type == "cpu" else image.float()
    return tvF.resize(image, list(size), antialias=False).add_(ROUND_HALF_UP).floor_().float()


class TwinsImageProcessor(TwinsImageProcessingMixin, TorchvisionBackend):
    __doc__ = TwinsImageProcessingMixin.__doc__

    def resize(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return resize_to_grey_levels(image, size)


__all__ = ["TwinsImageProcessor"]
