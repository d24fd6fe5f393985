"""The training loop: iterations, reports, checkpoints and evaluations, from wherever the run is to its end."""

import contextlib
import copy
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.logging import get_logger
from accelerate.utils import find_executable_batch_size, gather_object
from datasets import Dataset
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.streams import StreamedTrainingStream, TrainingStream
from ..data.transforms import SegmentationTrainTransform
from ..image_processing_pil_twins import IGNORE_INDEX
from ..modeling_twins import TwinsForSemanticSegmentation, TwinsSegmenterOutput
from ..visualization import training_curves
from .checkpoints import (
    Progress,
    TrainingStopped,
    checkpoint_folders,
    newest_whole_checkpoint,
    replace_folder,
    save_checkpoint,
)
from .optimization import build_scheduler, largest_divisor, parameter_groups
from .preparation import SHARDED, Run
from .scoring import scalars, score

logger = get_logger(__name__)

BEST = "best"  # folder of the model with the highest mean IoU


class StopSignals:
    """
    While it is entered, SIGTERM and SIGINT are noted, for the loop to end after an iteration; a second one kills.

    Attributes:
        received: Number of the signal that came.
        is_interruptible: Whether it ends the loop at once, since a checkpoint holds all that was done.
    """

    def __init__(self):
        self.received: int | None = None
        self.is_interruptible = False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if self.is_interruptible:
            raise self.stop("during an evaluation")

    def stop(self, when: str) -> TrainingStopped:
        number = signal.SIGTERM if self.received is None else self.received  # it may have come to another process
        return TrainingStopped(f"stopped by {signal.Signals(number).name} {when}.", exit_code=128 + number)


def ignore_stop_signals(worker_id: int) -> None:
    """Data workers live as long as the loop, which a signal to the whole process group does not end at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Snapshot:
    """What a forward pass changes though no optimizer step follows: batch norm's statistics and the random state."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.model = model
        self.device = device
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.random_state = torch.get_rng_state()
        self.cuda_random_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)
        torch.set_rng_state(self.random_state)
        if self.cuda_random_state is not None:
            torch.cuda.set_rng_state(self.cuda_random_state, self.device)


class Window:
    """Figures of the iterations since the last report."""

    def __init__(self, first_step: int, device: torch.device):
        self.first_step = first_step
        self.started = time.perf_counter()
        self.sums = torch.zeros(5, device=device)  # iterations, loss, auxiliary loss, labelled and right pixels
        self.grad_norm = math.nan  # of the last iteration

    @property
    def elapsed(self) -> float:
        """Seconds since the start, pauses left out."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    @torch.no_grad()
    def add(self, outputs: TwinsSegmenterOutput, labels: torch.Tensor, accumulation: int) -> None:
        """Adds a forward pass, one of `accumulation` of an iteration; accuracy is taken at the logits' size."""
        labels = nn.functional.interpolate(labels[:, None].float(), size=outputs.logits.shape[-2:])[:, 0]  # nearest
        is_labelled = labels != IGNORE_INDEX
        is_right = (outputs.logits.argmax(dim=1) == labels) & is_labelled
        auxiliary_loss = outputs.loss.new_zeros(()) if outputs.auxiliary_loss is None else outputs.auxiliary_loss
        means = torch.stack([torch.ones_like(outputs.loss), outputs.loss, auxiliary_loss]).float() / accumulation
        self.sums += torch.cat([means, torch.stack([is_labelled.sum(), is_right.sum()]).float()])

    def figures(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes."""
        num_steps, loss, auxiliary_loss, labelled, right = accelerator.reduce(self.sums, "mean").tolist()
        figures = {
            "loss": loss / num_steps if num_steps else math.nan,
            "accuracy": right / max(labelled, 1.0),
            "grad_norm": self.grad_norm,
        }
        if auxiliary_loss:
            figures["auxiliary_loss"] = auxiliary_loss / num_steps
        return figures


def train(prepared: Run) -> tuple[TwinsForSemanticSegmentation, dict]:
    """
    Trains a run's model, in batches that fit into memory if that is asked for.

    Returns:
        The model to score and save (with `--ema_decay` the averaged one, LoRA's adapters merged), and the training's
        figures.

    Raises:
        `TrainingStopped`: if the run ended before its last iteration.
    """
    args, accelerator, model, progress = prepared.args, prepared.accelerator, prepared.model, prepared.progress
    accelerator.register_for_checkpointing(progress)
    averaged = None
    if args.ema_decay is not None:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        accelerator.register_for_checkpointing(averaged)
    if not args.auto_find_batch_size:
        return train_in_batches(prepared.batch_size, prepared, averaged)

    share = prepared.batch_size * accelerator.gradient_accumulation_steps
    initial = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    before = Snapshot(model, accelerator.device)

    def reduce_batch_size() -> int:
        """Sets the next smaller size with the same crops an iteration, and everything else as it was at the start."""
        smaller = largest_divisor(share, prepared.batch_size - 1)
        if smaller < 2:
            raise TrainingStopped(f"memory does not suffice for forward passes of {prepared.batch_size} crops.")
        logger.warning(f"Out of memory with {prepared.batch_size} crops a forward pass: trying {smaller}.")
        prepared.batch_size, accelerator.gradient_accumulation_steps = smaller, share // smaller
        if progress.step and checkpoint_folders(prepared.output_dir):
            prepared.checkpoint = newest_whole_checkpoint(prepared.output_dir)
        accelerator.free_memory()
        model.zero_grad()
        model.load_state_dict(initial)
        before.restore()
        progress.load_state_dict(Progress().state_dict())
        if averaged is not None:
            averaged.n_averaged.zero_()
        return smaller

    return find_executable_batch_size(
        train_in_batches, starting_batch_size=prepared.batch_size, reduce_batch_size_fn=reduce_batch_size
    )(prepared, averaged)


def train_in_batches(
    batch_size: int, prepared: Run, averaged: AveragedModel | None
) -> tuple[TwinsForSemanticSegmentation, dict]:
    """[`train`] with `batch_size` crops a forward pass."""
    args, accelerator, progress = prepared.args, prepared.accelerator, prepared.progress
    total_batch_size, accumulation = prepared.total_batch_size, accelerator.gradient_accumulation_steps
    warmup_steps = min(1500, args.max_steps // 10) if args.warmup_steps is None else args.warmup_steps

    model = prepared.model.train()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.decay_norms, args.layer_decay)
    group_names = [group["name"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2))
    scheduler = build_scheduler(
        optimizer, args.learning_rate, args.lr_scheduler_type, args.max_steps, warmup_steps, args.lr_power, args.lr_end
    )
    if accelerator.state.deepspeed_plugin is not None:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {"train_micro_batch_size_per_gpu": batch_size, "gradient_accumulation_steps": accumulation}
        settings["gradient_clipping"] = args.max_grad_norm or 0.0
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if prepared.checkpoint is not None:
        accelerator.load_state(str(prepared.checkpoint))
        logger.info(f"Resumed from {prepared.checkpoint} at iteration {progress.step}")
    elif accelerator.is_main_process and args.overwrite_output_dir:
        for stale in [*checkpoint_folders(prepared.output_dir), prepared.output_dir / BEST]:
            shutil.rmtree(stale, ignore_errors=True)
    batches = training_batches(prepared, batch_size)

    logger.info(
        f"Training on {prepared.train_size} images, {total_batch_size} crops an iteration "
        f"({accelerator.num_processes} process(es) x {accumulation} forward pass(es) x {batch_size}), "
        f"iterations {progress.step + 1} to {args.max_steps}"
    )
    first_step, started = progress.step, time.perf_counter()
    window = Window(progress.step, accelerator.device)
    skipped_files: set[str] = set()
    evaluated_step = 0
    bar = tqdm(total=args.max_steps, initial=first_step, desc="Training", disable=not accelerator.is_main_process)

    def is_every(steps: int | None) -> bool:
        """Whether so many iterations have passed, or a multiple of them."""
        return bool(steps) and progress.step % steps == 0

    with StopSignals() as signals, bar:
        while True:
            if is_every(args.eval_steps) and evaluated_step < progress.step < args.max_steps:
                with window.pause():
                    signals.is_interruptible = args.save_steps > 0
                    evaluate(prepared, finished_model(prepared, model, averaged))
                    signals.is_interruptible = False
                evaluated_step = progress.step
            if progress.step == args.max_steps:
                break

            before = Snapshot(prepared.model, accelerator.device)
            names: list[str] = []
            not_finite, is_stopped = None, False
            for _ in range(accumulation):
                batch = take_batch(batches, progress.step + 1)
                names += batch.pop("name")
                note_skipped(batch.pop("skipped"), skipped_files)
                with accelerator.accumulate(model):
                    if not_finite is None:
                        outputs = model(**batch)
                        is_finite, is_stopped = agree(accelerator, outputs.loss, signals)
                        not_finite = None if is_finite else "loss"
                    if not_finite is None:
                        accelerator.backward(outputs.loss)
                        window.add(outputs, batch["labels"], accumulation)
                    if not_finite is None and accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                        window.grad_norm = float(grad_norm)
                        if accelerator.scaler is None and not math.isfinite(window.grad_norm):
                            not_finite = "gradient norm"  # (a gradient scaler looks after it itself)
                    if not_finite is None:
                        optimizer.step()
                    optimizer.zero_grad()

            if not_finite is not None:
                before.restore()
                refuse_nonfinite(prepared, not_finite, names)
            elif averaged is not None:
                averaged.update_parameters(prepared.model)
            learning_rates = dict(zip(group_names, scheduler.get_last_lr(), strict=True))
            scheduler.step()
            progress.step += 1
            progress.position += total_batch_size
            bar.update()

            is_last = progress.step == args.max_steps
            if is_every(args.logging_steps) or is_last:
                report(prepared, window, learning_rates, bar)
                window = Window(progress.step, accelerator.device)
            is_due = is_every(args.save_steps) or is_every(args.eval_steps) or is_last
            if (args.save_steps and is_due) or is_stopped:
                with window.pause():
                    save_checkpoint(accelerator, prepared.output_dir, progress.step, args.save_total_limit)
            if is_stopped:
                raise signals.stop(f"after iteration {progress.step} of {args.max_steps}")

    skipped_files = set(gather_object(sorted(skipped_files)))
    runtime = time.perf_counter() - started
    losses = [record["train/loss"] for record in progress.history if "train/loss" in record]
    return finished_model(prepared, model, averaged), {
        "train_loss": losses[-1],
        "train_runtime": runtime,
        "train_steps": progress.step,
        "train_samples_per_second": (progress.step - first_step) * total_batch_size / runtime,
        "train_nonfinite_steps": progress.nonfinite,
        "train_skipped_files": len(skipped_files),
    }


def training_batches(prepared: Run, batch_size: int) -> Iterator[dict]:
    """Batches of this process from the run's position on, on its device."""
    accelerator, progress, data, data_args = (
        prepared.accelerator,
        prepared.progress,
        prepared.data,
        prepared.data_args,
    )
    image_processor = prepared.image_processor
    transform = SegmentationTrainTransform(
        crop_size=(image_processor.crop_size.height, image_processor.crop_size.width),
        size=dict(image_processor.size),
        ratio_range=data_args.ratio_range,
        cat_max_ratio=data_args.cat_max_ratio,
        photometric_distortion=data_args.photometric_distortion,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
    rows, do_reduce_labels, seed = data.splits["train"], data.do_reduce_labels, prepared.args.seed
    settings = {
        "batch_size": batch_size,
        "num_workers": prepared.num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": ignore_stop_signals,
        "generator": torch.Generator(),  # a loader's start must not move the random state that was resumed
    }
    if isinstance(rows, Dataset):
        stop = prepared.args.max_steps * prepared.total_batch_size
        stream = TrainingStream(
            rows, do_reduce_labels, transform, seed, progress.position, stop, data_args.skip_corrupt
        )
        return iter(accelerator.prepare(DataLoader(stream, **settings)))
    stream = StreamedTrainingStream(
        rows,
        do_reduce_labels,
        len(data.id2label),
        transform,
        seed,
        start=progress.position // accelerator.num_processes,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        skip_corrupt=data_args.skip_corrupt,
    )
    return iter(DataLoaderShard(stream, device=accelerator.device, **settings))


def take_batch(batches: Iterator[dict], step: int) -> dict:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        # A worker's error leads with its traceback.
        reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        raise TrainingStopped(
            f"iteration {step}: {reason} (--skip_corrupt true goes on without such files.)", is_local=True
        ) from error


def note_skipped(skipped: list[str], known: set[str]) -> None:
    for name in {name for names in skipped for name in names.splitlines()} - known:
        known.add(name)
        logger.warning(f"Skipped {name}: it cannot be used.", main_process_only=False)


def agree(accelerator: Accelerator, loss: torch.Tensor, signals: StopSignals) -> tuple[bool, bool]:
    """Whether the loss is finite in every process, and whether a stop signal came to any."""
    flags = torch.tensor([0.0, float(signals.received is not None)], device=loss.device)
    flags[0] = (~loss.detach().isfinite()).float()
    num_nonfinite, num_stopped = accelerator.reduce(flags, "sum").tolist()
    return num_nonfinite == 0, num_stopped > 0


def refuse_nonfinite(prepared: Run, what: str, names: list[str]) -> None:
    """Counts an iteration that was left out, names the files of its batch, and ends the run if there were too many."""
    progress, accelerator = prepared.progress, prepared.accelerator
    files = ", ".join(sorted(set(gather_object(names))))
    message = f"the {what} of iteration {progress.step + 1} is not finite; its batch: {files}."
    if progress.nonfinite >= prepared.args.max_nonfinite:
        folder = save_checkpoint(accelerator, prepared.output_dir, progress.step, prepared.args.save_total_limit)
        raise TrainingStopped(f"{message} {folder} holds the state from before it.")
    progress.nonfinite += 1
    logger.warning(f"Left out: {message}")


def report(prepared: Run, window: Window, learning_rates: dict[str, float], bar: tqdm) -> None:
    """Writes what a window of iterations came to into the log, the progress bar, the history and the trackers."""
    progress, accelerator, max_steps = prepared.progress, prepared.accelerator, prepared.args.max_steps
    num_steps = progress.step - window.first_step
    figures = window.figures(accelerator)
    rate = num_steps * prepared.total_batch_size / window.elapsed
    eta = time.strftime("%H:%M:%S", time.gmtime((max_steps - progress.step) * window.elapsed / num_steps))
    memory = memory_in_use(accelerator.device)
    learning_rate = max(learning_rates.values())
    bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{learning_rate:.2e}", images_per_s=f"{rate:.2f}")
    auxiliary = f" (auxiliary {figures['auxiliary_loss']:.4f})" if "auxiliary_loss" in figures else ""
    logger.info(
        f"iteration {progress.step}/{max_steps}: loss {figures['loss']:.4f}{auxiliary}, accuracy "
        f"{100 * figures['accuracy']:.1f}, learning rate {learning_rate:.3e}, gradient norm "
        f"{figures['grad_norm']:.3g}, {rate:.2f} images/s, {memory:.2f} GB, {eta} to go"
    )
    record = {f"train/{name}": value for name, value in figures.items()}
    record |= {"train/images_per_second": rate, "train/memory_gb": memory}
    record |= {f"train/learning_rate/{name}": value for name, value in learning_rates.items()}
    accelerator.log(record, step=progress.step)
    progress.history.append({"step": progress.step, **record})


def memory_in_use(device: torch.device) -> float:
    """In GB: the most that tensors took on a GPU so far, or what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def evaluate(prepared: Run, model: TwinsForSemanticSegmentation) -> dict:
    """Scores a model, keeps it in the folder `best` if none before it had a higher mean IoU, and draws the curves."""
    progress, output_dir = prepared.progress, prepared.output_dir
    results = score(prepared, model, progress.step)
    record = {f"eval/{name.removeprefix('eval_')}": value for name, value in scalars(results).items()}
    progress.history.append({"step": progress.step, **record})
    is_best = results["eval_mean_iou"] > progress.best_mean_iou
    progress.best_mean_iou = max(progress.best_mean_iou, results["eval_mean_iou"])
    if prepared.accelerator.is_main_process:
        training_curves(progress.history).save(output_dir / "training.png")
        if is_best and prepared.args.eval_steps is not None:
            replace_folder(output_dir / BEST, lambda folder: save_model(prepared, model, folder))
    prepared.accelerator.wait_for_everyone()
    return results


def save_model(prepared: Run, model: TwinsForSemanticSegmentation, folder: Path) -> None:
    """A folder for `from_pretrained`."""
    model.save_pretrained(folder)
    prepared.image_processor.save_pretrained(folder)


def finished_model(
    prepared: Run, model: torch.nn.Module, averaged: AveragedModel | None
) -> TwinsForSemanticSegmentation:
    """
    The model to score and save, in every process: the trained one, or the averaged one, with LoRA's adapters merged;
    of a sharded `model` (FSDP, DeepSpeed) a copy that is whole.
    """
    accelerator = prepared.accelerator
    if accelerator.distributed_type in SHARDED:
        return assemble(prepared, accelerator.get_state_dict(model))
    weights = prepared.model if averaged is None else averaged.module
    if prepared.lora is None:
        return weights
    adapted = copy.deepcopy(prepared.lora)
    adapted.model.load_state_dict(weights.state_dict())
    return adapted.merge_and_unload()


def assemble(prepared: Run, state_dict: dict[str, torch.Tensor]) -> TwinsForSemanticSegmentation:
    """A whole model in every process from a `state_dict` that only the main process needs to have."""
    accelerator, folder = prepared.accelerator, prepared.output_dir / ".whole-model"
    if accelerator.is_main_process:
        model = TwinsForSemanticSegmentation(prepared.model.config)
        model.load_state_dict(state_dict)
        model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    model = TwinsForSemanticSegmentation.from_pretrained(folder).to(accelerator.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    return model
