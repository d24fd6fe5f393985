# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image processor of the Twins models on torchvision, the default."""

import torch
from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_twins import TwinsImageProcessingMixin, TwinsImageProcessorKwargs, resize_bilinear  # noqa: F401


class TwinsImageProcessor(TwinsImageProcessingMixin, TorchvisionBackend):
    __doc__ = TwinsImageProcessingMixin.__doc__

    def resize(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return resize_bilinear(image.round().int() if image.is_floating_point() else image.int(), size).float()


__all__ = ["TwinsImageProcessor"]
