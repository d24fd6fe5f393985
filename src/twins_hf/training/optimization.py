"""Parameter groups, learning rate schedule and batch sizes of the published runs, and what may be changed of them."""

import torch
from torch import nn
from transformers import get_scheduler

from ..modeling_twins import TwinsForSemanticSegmentation, TwinsPositionEncoding

WARMUP_RATIO = 1e-6  # learning rate of the first iteration over the peak
PUBLISHED = "published"
# The first is `decay_factor`, the others are transformers'.
SCHEDULES = (PUBLISHED, "polynomial", "linear", "cosine", "constant", "constant_with_warmup")


def parameter_groups(
    model: TwinsForSemanticSegmentation,
    learning_rate: float,
    weight_decay: float,
    decay_norms: bool = False,
    layer_decay: float = 1.0,
) -> list[dict]:
    """
    Groups for AdamW, without the parameters that are frozen.

    Args:
        model: The model, not wrapped.
        learning_rate: Of the heads and, unless there is a `layer_decay`, of all.
        weight_decay: Of all parameters, biases and the heads' batch norms included, but for the encoder's LayerNorms
            and position encodings (weights and biases), as in the published UPerNet runs.
        decay_norms: Whether it applies to those too, as in the published Semantic FPN runs.
        layer_decay: Layer-wise rate decay: what a block's learning rate is multiplied by for every block after it
            (arXiv 2106.08254, appendix). Patch embeddings, position encodings and the norm after a stage count to the
            block behind them, or to their stage's last; the heads keep `learning_rate`.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and `name` (`decayed` or `exempt`, led by the block's number
        from 0 where there is a `layer_decay`).
    """
    exempt = {
        parameter
        for module in model.twins.modules()
        if isinstance(module, (nn.LayerNorm, TwinsPositionEncoding)) and not decay_norms
        for parameter in module.parameters()
    }
    num_blocks = sum(model.config.depths)
    blocks = block_numbers(model) if layer_decay != 1.0 else {}
    groups = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        block, is_exempt = blocks.get(parameter, num_blocks), parameter in exempt
        if (block, is_exempt) not in groups:
            name = "exempt" if is_exempt else "decayed"
            groups[block, is_exempt] = {
                "params": [],
                "lr": learning_rate * layer_decay ** (num_blocks - block),
                "weight_decay": 0.0 if is_exempt else weight_decay,
                "name": name if block == num_blocks else f"block_{block}_{name}",
            }
        groups[block, is_exempt]["params"].append(parameter)
    return list(groups.values())


def block_numbers(model: TwinsForSemanticSegmentation) -> dict[nn.Parameter, int]:
    """The block, counted through all stages from 0, that each of the encoder's parameters belongs to."""
    numbers = dict.fromkeys(model.twins.embeddings.parameters(), 0)
    first = 0
    for stage in model.twins.stages:
        last = first + len(stage.layers) - 1
        if stage.patch_embeddings is not None:
            numbers |= dict.fromkeys(stage.patch_embeddings.parameters(), first)
        numbers |= dict.fromkeys(stage.position_encoding.parameters(), min(first + 1, last))
        if stage.layernorm is not None:
            numbers |= dict.fromkeys(stage.layernorm.parameters(), last)
        for offset, layer in enumerate(stage.layers):
            numbers |= dict.fromkeys(layer.parameters(), first + offset)
        first = last + 1
    return numbers


def decay_factor(step: int, max_steps: int, warmup_steps: int, power: float = 1.0, end_factor: float = 0.0) -> float:
    """
    Learning rate over its peak at iteration `step`, from 0: polynomial decay to `end_factor` at `max_steps`, times,
    before `warmup_steps`, a linear rise from 1e-6. (The product is how the published runs were trained.)
    """
    factor = end_factor + (1 - end_factor) * max(0.0, 1 - step / max_steps) ** power
    if step < warmup_steps:
        factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO)
    return factor


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    name: str,
    max_steps: int,
    warmup_steps: int,
    power: float,
    end: float,
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    The schedule of that name, which takes one step an iteration; `power` and the last learning rate `end` are those of
    a polynomial one.
    """
    if name == PUBLISHED:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: decay_factor(step, max_steps, warmup_steps, power, end / learning_rate)
        )
    settings = {"power": power, "lr_end": end} if name == "polynomial" else None
    return get_scheduler(name, optimizer, warmup_steps, max_steps, scheduler_specific_kwargs=settings)


def split_batch(total: int | None, per_device: int, accumulation: int, num_processes: int) -> tuple[int, int]:
    """
    Crops of a forward pass, and forward passes of an iteration, in each process.

    Args:
        total: Crops of an iteration over all processes; if `None`, `per_device * accumulation * num_processes`.
        per_device: Crops of a forward pass; at most so many, where there is a `total`.
        accumulation: Forward passes of an iteration, where there is no `total`.
        num_processes: Processes that train.

    Raises:
        `ValueError`: if `total` cannot be split evenly.
    """
    if total is None:
        return per_device, accumulation
    share, rest = divmod(total, num_processes)
    if rest:
        raise ValueError(f"--total_train_batch_size {total} cannot be split evenly over {num_processes} processes.")
    per_device = min(per_device, share)
    if share % per_device:
        raise ValueError(
            f"--total_train_batch_size {total} leaves {share} crops to each of {num_processes} process(es), which "
            f"--per_device_train_batch_size {per_device} does not divide; {largest_divisor(share, per_device)} does."
        )
    return per_device, share // per_device


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)
