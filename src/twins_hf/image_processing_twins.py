# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Image processor of the Twins models on torchvision, the default."""

import torch
import torchvision.transforms.v2.functional as tvF
from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_pil_twins import TwinsImageProcessingMixin, TwinsImageProcessorKwargs  # noqa: F401


class TwinsImageProcessor(TwinsImageProcessingMixin, TorchvisionBackend):
    __doc__ = TwinsImageProcessingMixin.__doc__

    def resize(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        # In float and rounded: torch's own uint8 path is further from OpenCV's.
        return tvF.resize(image.float(), list(size), antialias=False).round_()


__all__ = ["TwinsImageProcessor"]
