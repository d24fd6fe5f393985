"""Parameter groups and learning rate of the published runs."""

import torch
from torch import nn

from ..modeling_twins import TwinsForSemanticSegmentation, TwinsPositionEncoding

WARMUP_RATIO = 1e-6  # learning rate of the first iteration over the peak


def parameter_groups(model: TwinsForSemanticSegmentation, weight_decay: float) -> list[dict]:
    """
    Two groups for AdamW: the encoder's LayerNorms and position encodings, weights and biases, are not decayed;
    everything else is, the heads' batch norms and all other biases included.
    """
    exempt = {
        parameter
        for module in model.twins.modules()
        if isinstance(module, (nn.LayerNorm, TwinsPositionEncoding))
        for parameter in module.parameters()
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in exempt], "weight_decay": 0.0},
    ]


def decay_factor(step: int, max_steps: int, warmup_steps: int, power: float = 1.0) -> float:
    """
    Learning rate over its peak at iteration `step`, from 0: polynomial decay to 0 at `max_steps`, times, before
    `warmup_steps`, a linear rise from 1e-6. (The product is how the published runs were trained.)
    """
    factor = max(0.0, 1 - step / max_steps) ** power
    if step < warmup_steps:
        factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
    return factor


def build_optimizer(
    model: TwinsForSemanticSegmentation,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    max_steps: int,
    warmup_steps: int,
    power: float,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with its groups, and the schedule, which takes one step an iteration."""
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: decay_factor(step, max_steps, warmup_steps, power)
    )
    return optimizer, scheduler
