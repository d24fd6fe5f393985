# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of logits at the size of their labels, in the memory of a few rows of an image."""

import torch

from .convolution_twins import resize, shifted_upsampling


class ResizedCrossEntropy(torch.autograd.Function):
    """
    The sum of cross-entropies of logits (B, num_labels, h, w), resized to the labels (B, H, W).

    Probabilities at the labels' size exist for a band of rows at a time; what waits for the way back is the gradient,
    which is known with them and has the size of the logits.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        _, num_labels, height, width = logits.shape
        dtype = torch.promote_types(logits.dtype, torch.float32)
        size, total = labels.shape[-2:], logits.new_zeros((), dtype=dtype)
        upsampling = shifted_upsampling(size[0], height, total)[:, 1::3].contiguous()  # the middle taps: (H, h)
        positions = logits.to(dtype).permute(0, 2, 3, 1).flatten(2)  # (B, h, w * num_labels)
        gradient = torch.zeros_like(positions) if ctx.needs_input_grad[0] else None
        num_rows = max(1, 2**20 // (size[1] * num_labels))
        with torch.autocast(logits.device.type, enabled=False):
            for image, image_labels in enumerate(labels):
                for rows, band_labels in zip(upsampling.split(num_rows), image_labels.split(num_rows), strict=True):
                    band = (rows @ positions[image]).view(1, -1, width, num_labels).permute(0, 3, 1, 2)
                    band = resize(band, band_labels.shape).permute(0, 2, 3, 1)  # (1, rows, W, num_labels)
                    log_probabilities = band.log_softmax(dim=-1)
                    is_labelled = (band_labels != ignore_index)[None, ..., None]
                    target = band_labels[None, ..., None].where(is_labelled, 0)
                    total -= (log_probabilities.gather(-1, target) * is_labelled).sum()
                    if gradient is None:
                        continue
                    differences = log_probabilities.exp_()
                    differences.scatter_add_(-1, target, -torch.ones_like(target, dtype=differences.dtype))
                    narrowed = torch.ops.aten.upsample_bilinear2d_backward(
                        differences.mul_(is_labelled).permute(0, 3, 1, 2),
                        band_labels.shape,
                        (1, num_labels, len(rows), width),
                        False,
                    )
                    gradient[image].addmm_(rows.T, narrowed.permute(0, 2, 3, 1).view(len(rows), -1))
        if gradient is not None:
            ctx.save_for_backward(gradient.unflatten(2, (width, num_labels)).permute(0, 3, 1, 2))
            ctx.dtype = logits.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None


def resized_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The sum of cross-entropies of logits (B, num_labels, h, w), resized to the labels (B, H, W), in float32 at
    least."""
    if torch.compiler.is_compiling():  # which finds the steps worth fusing itself
        scores = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[-2:])
        return torch.nn.functional.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="sum")
    return ResizedCrossEntropy.apply(logits, labels, ignore_index)
