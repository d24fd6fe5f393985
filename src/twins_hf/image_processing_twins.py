# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image processor of the Twins models on torchvision, the default."""

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_twins import TwinsImageProcessingMixin, TwinsImageProcessorKwargs  # noqa: F401
from .resizing_twins import resize_bilinear, resize_bilinear_whole


class TwinsImageProcessor(TwinsImageProcessingMixin, TorchvisionBackend):
    __doc__ = TwinsImageProcessingMixin.__doc__

    def resize(self, image: torch.Tensor | np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        if isinstance(image, np.ndarray):  # packed pixels
            return torch.from_numpy(resize_bilinear(image, size))
        if image.dtype == torch.uint8 and len(image) == 3 and image.device.type == "cpu":
            return torch.from_numpy(resize_bilinear(image.numpy(), size))
        return resize_bilinear_whole(image.round().int() if image.is_floating_point() else image.int(), size).float()


__all__ = ["TwinsImageProcessor"]
