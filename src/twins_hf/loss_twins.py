# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Cross-entropy of logits at the size of their labels, in the memory of one image."""

import torch

from .convolution_twins import resize


class ResizedCrossEntropy(torch.autograd.Function):
    """
    The sum of cross-entropies of logits (B, num_labels, h, w), resized to the labels (B, H, W).

    Probabilities at the labels' size exist for one image at a time; what waits for the way back is the gradient, which
    is known with them and has the size of the logits.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        total, gradients = logits.new_zeros((), dtype=torch.float32), []
        for image_logits, image_labels in zip(logits.split(1), labels, strict=True):
            scores = resize(image_logits.float(), labels.shape[-2:])
            log_probabilities = scores.permute(0, 2, 3, 1).log_softmax(dim=-1)[0]  # (H, W, num_labels)
            del scores
            is_labelled = (image_labels != ignore_index)[..., None]
            target = image_labels[..., None].where(is_labelled, 0)
            total -= (log_probabilities.gather(-1, target) * is_labelled).sum()
            if ctx.needs_input_grad[0]:
                gradient = log_probabilities.exp_()
                gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=gradient.dtype))
                gradient = gradient.mul_(is_labelled).permute(2, 0, 1)[None]
                gradients.append(
                    torch.ops.aten.upsample_bilinear2d_backward(
                        gradient, labels.shape[-2:], image_logits.shape, False, None, None
                    )
                )
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.dtype = logits.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None, None


def resized_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The sum of cross-entropies of logits (B, num_labels, h, w), resized to the labels (B, H, W), in float32."""
    if torch.compiler.is_compiling():  # which finds the steps worth fusing itself
        scores = resize(logits.float(), labels.shape[-2:])
        return torch.nn.functional.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="sum")
    return ResizedCrossEntropy.apply(logits, labels, ignore_index)
