"""A fine-tuning run from its arguments to the saved model, driven by accelerate."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast, set_seed
from datasets import Dataset
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..configuration_twins import TwinsConfig
from ..conversion import convert_checkpoint, is_twins
from ..data.ade20k import ADE20K_CLASSES
from ..data.loading import SegmentationData, check_examples, load_segmentation_data, read_example, undecoded
from ..data.transforms import SegmentationTrainTransform
from ..evaluation import authors_mean_iou, evaluate_segmentation
from ..image_processing_twins import TwinsImageProcessor
from ..modeling_twins import TwinsForSemanticSegmentation
from ..publishing import add_model_code
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .optimization import build_optimizer
from .report import scalars, write_model_card, write_results

logger = get_logger(__name__)


class TrainingStream(torch.utils.data.Dataset):
    """
    An endless shuffled and augmented stream of crops, cut from position `start` to `stop`. What stands at a position
    depends on the seed and the position alone: not on the number of processes or workers, nor on where a run resumed.
    """

    def __init__(
        self,
        rows: Dataset,
        do_reduce_labels: bool,
        transform: SegmentationTrainTransform,
        seed: int,
        start: int,
        stop: int,
    ):
        self.rows = undecoded(rows)
        self.do_reduce_labels = do_reduce_labels
        self.transform = transform
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def draw_epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def __getitem__(self, offset: int) -> dict[str, torch.Tensor]:
        position = self.start + offset
        epoch, rank = divmod(position, len(self.rows))
        index = int(self.draw_epoch_order(epoch)[rank])
        example = read_example(self.rows[index], index, self.do_reduce_labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0]))
            pixel_values, labels = self.transform(example.image, example.labels)
        return {"pixel_values": pixel_values, "labels": labels}


@dataclasses.dataclass
class Progress:
    """What a checkpoint knows beside weights, optimizer, schedule and random states."""

    step: int = 0

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


@dataclasses.dataclass
class Run:
    """Everything a run needs, built and checked before it starts."""

    model_args: ModelArguments
    data_args: DataArguments
    args: TrainingArguments
    accelerator: Accelerator
    output_dir: Path
    data: SegmentationData
    model: TwinsForSemanticSegmentation
    image_processor: TwinsImageProcessor
    checkpoint: Path | None
    hub_model_id: str | None


def prepare_run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Run:
    """
    Builds a run and checks whatever can be known before it starts: the output folder, the checkpoint, the Hub
    repository, every image and mask, and that model and dataset have the same classes.

    Raises:
        `ValueError`, `OSError`: naming the option or file that does not fit.
    """
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    if args.report_to is not None and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise ValueError(f"--report_to {args.report_to}: that tracker is not installed.")
    logger.info(f"Running on {accelerator.num_processes} process(es), {accelerator.device}, {args.mixed_precision=}")
    output_dir = Path(args.output_dir)
    with accelerator.main_process_first():
        check_output_dir(output_dir, args)
    set_seed(args.seed)

    with accelerator.local_main_process_first():  # one process of a machine fills the datasets cache
        data = load_segmentation_data(
            data_args.dataset_name,
            data_args.dataset_config_name,
            data_args.image_column_name,
            data_args.label_column_name,
            data_args.train_split_name,
            data_args.validation_split_name,
            data_args.train_val_split,
            data_args.id2label,
            data_args.do_reduce_labels,
            seed=0 if data_args.dataset_name == "scenes" else args.seed,
        )
        for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
            if limit is not None:
                data.splits[split] = data.splits[split].select(range(min(limit, len(data.splits[split]))))
    with tempfile.TemporaryDirectory() as folder:
        pretrained = find_pretrained(model_args, Path(folder))
        model = build_model(model_args, pretrained, data, args.eval_only)
        image_processor = build_image_processor(pretrained, data_args, data)
    prepared = Run(
        model_args,
        data_args,
        args,
        accelerator,
        output_dir,
        data,
        model,
        image_processor,
        checkpoint=find_checkpoint(output_dir, args.resume_from_checkpoint),
        hub_model_id=create_hub_repository(args, output_dir) if accelerator.is_main_process else None,
    )
    with accelerator.local_main_process_first():  # last, since it reads every file
        for split in ["validation"] if args.eval_only else data.splits:
            check_examples(data, split, data_args.preprocessing_num_workers)
    return prepared


def check_output_dir(output_dir: Path, args: TrainingArguments) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written to ({error}).") from error
    holds_run = (output_dir / "all_results.json").exists() or any(output_dir.glob("checkpoint-*"))
    if holds_run and not (args.overwrite_output_dir or args.eval_only or args.resume_from_checkpoint):
        raise ValueError(
            f"--output_dir {output_dir} already holds a run: choose another, pass --resume_from_checkpoint latest to "
            "go on with it, or --overwrite_output_dir to start anew."
        )


def find_pretrained(model_args: ModelArguments, folder: Path) -> dict[str, str | None] | None:
    """Arguments of `from_pretrained` for the checkpoint to start from, if any; one of another source is converted into
    `folder`."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        return None
    if is_twins(name, revision):
        return {"pretrained_model_name_or_path": name, "revision": revision}
    convert_checkpoint(name, folder / "converted", revision=revision)
    return {"pretrained_model_name_or_path": str(folder / "converted")}


def build_model(
    model_args: ModelArguments, pretrained: dict[str, str | None] | None, data: SegmentationData, eval_only: bool
) -> TwinsForSemanticSegmentation:
    """A model of the dataset's classes: the checkpoint's, or a variant's with random weights."""
    overrides = json.loads(model_args.config_overrides or "{}")
    labels = {"id2label": data.id2label, "label2id": {name: class_id for class_id, name in data.id2label.items()}}
    if pretrained is None:
        return TwinsForSemanticSegmentation(TwinsConfig.from_variant(model_args.variant, **{**overrides, **labels}))

    name = model_args.model_name_or_path
    config = TwinsConfig.from_pretrained(**pretrained, **overrides)
    is_segmenter = segments(config)
    if eval_only and not is_segmenter:
        raise ValueError(f"--model_name_or_path {name} is no TwinsForSemanticSegmentation but {config.architectures}.")
    if is_segmenter and config.num_labels != len(data.id2label):
        if eval_only or not model_args.ignore_mismatched_sizes:
            advice = "" if eval_only else " To train new classifiers, pass --ignore_mismatched_sizes."
            raise ValueError(
                f"--model_name_or_path {name} has {config.num_labels} classes but --dataset_name {data.name} has "
                f"{len(data.id2label)}.{advice}"
            )
    if not is_segmenter and config.window_sizes is not None and "norm_after_stage" not in overrides:
        config.norm_after_stage = True  # SVT's segmentors norm each stage's output, its classifiers do not
    if not eval_only:
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    return TwinsForSemanticSegmentation.from_pretrained(
        **pretrained, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes
    )


def segments(config: TwinsConfig) -> bool:
    """Whether a checkpoint of this configuration has a segmentation model's heads."""
    return TwinsForSemanticSegmentation.__name__ in (config.architectures or [])


def build_image_processor(
    pretrained: dict[str, str | None] | None, data_args: DataArguments, data: SegmentationData
) -> TwinsImageProcessor:
    """The processor of a segmentation checkpoint, or a new one, with the sizes that were asked for."""
    if pretrained is not None and segments(TwinsConfig.from_pretrained(**pretrained)):
        image_processor = TwinsImageProcessor.from_pretrained(**pretrained)
    else:  # an ImageNet checkpoint's processor crops the middle
        image_processor = TwinsImageProcessor()
    settings = image_processor.to_dict()
    settings["do_reduce_labels"] = data.do_reduce_labels
    for key in ("shortest_edge", "longest_edge"):
        if getattr(data_args, key) is not None:
            settings["size"] = {**settings["size"], key: getattr(data_args, key)}
    if data_args.crop_size is not None:
        settings["crop_size"] = data_args.crop_size
    return TwinsImageProcessor.from_dict(settings)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """Folder of the checkpoint to resume from, if any."""
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != "latest":
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: there is no such folder.")
        return checkpoint
    checkpoints = checkpoint_folders(output_dir)
    if not checkpoints:
        raise ValueError(f"--resume_from_checkpoint latest: {output_dir} has no checkpoint.")
    return checkpoints[-1]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def create_hub_repository(args: TrainingArguments, output_dir: Path) -> str | None:
    if not args.push_to_hub:
        return None
    api = HfApi()
    api.whoami()  # a token that is not valid is refused here; create_repo lets it pass where the repository exists
    name = args.hub_model_id or output_dir.resolve().name
    return api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def run(prepared: Run) -> dict:
    """
    Trains (unless `--eval_only`), scores, and writes the results into the output folder: model, processor,
    `all_results.json`, `per_class.md`, the model card `README.md` and `overlays/`.

    Returns:
        What `all_results.json` holds.
    """
    args, accelerator = prepared.args, prepared.accelerator
    if args.report_to is not None:
        accelerator.init_trackers("twins_hf", config=tracked_settings(prepared))
    prepared.model.to(accelerator.device)
    results = {} if args.eval_only else train(prepared)
    results |= score(prepared)
    if not args.eval_only and accelerator.is_main_process:
        prepared.model.save_pretrained(prepared.output_dir)
        prepared.image_processor.save_pretrained(prepared.output_dir)
        write_model_card(prepared, results)
    if accelerator.is_main_process:
        write_results(prepared, results)
        logger.info(f"Results are in {prepared.output_dir}")
        if prepared.hub_model_id is not None:
            publish(prepared.output_dir, prepared.hub_model_id)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def publish(output_dir: Path, hub_model_id: str) -> None:
    """Uploads the results, but for checkpoints, with the model's code beside them."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "upload"
        shutil.copytree(output_dir, folder, ignore=shutil.ignore_patterns("*checkpoint-*"))
        add_model_code(folder)
        HfApi().upload_folder(repo_id=hub_model_id, folder_path=folder, commit_message="Upload by twins_hf")


def train(prepared: Run) -> dict:
    """Trains `prepared.model` in place; returns the training's figures."""
    args, accelerator, output_dir = prepared.args, prepared.accelerator, prepared.output_dir
    batch_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    warmup_steps = min(1500, args.max_steps // 10) if args.warmup_steps is None else args.warmup_steps

    model = prepared.model.train()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer, scheduler = build_optimizer(
        model,
        args.learning_rate,
        args.weight_decay,
        (args.adam_beta1, args.adam_beta2),
        args.max_steps,
        warmup_steps,
        args.lr_power,
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if prepared.checkpoint is not None:
        accelerator.load_state(str(prepared.checkpoint))
        logger.info(f"Resumed from {prepared.checkpoint} at iteration {progress.step}")

    elif accelerator.is_main_process:
        for stale in checkpoint_folders(output_dir):  # of a run that --overwrite_output_dir replaces
            shutil.rmtree(stale)

    image_processor = prepared.image_processor
    transform = SegmentationTrainTransform(
        crop_size=(image_processor.crop_size.height, image_processor.crop_size.width),
        size=dict(image_processor.size),
        ratio_range=prepared.data_args.ratio_range,
        cat_max_ratio=prepared.data_args.cat_max_ratio,
        photometric_distortion=prepared.data_args.photometric_distortion,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
    )
    stream = TrainingStream(
        prepared.data.splits["train"],
        prepared.data.do_reduce_labels,
        transform,
        args.seed,
        start=progress.step * batch_size,
        stop=args.max_steps * batch_size,
    )
    batches = iter(
        accelerator.prepare(
            DataLoader(
                stream,
                batch_size=args.per_device_train_batch_size,
                num_workers=num_workers(prepared),
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator(),  # a loader's start must not move the random state that was resumed
            )
        )
    )

    logger.info(
        f"Training on {len(prepared.data.splits['train'])} images, {batch_size} crops an iteration, "
        f"iterations {progress.step + 1} to {args.max_steps}"
    )
    bar = tqdm(
        total=args.max_steps,
        initial=progress.step,
        desc="Training",
        unit="it",
        disable=not accelerator.is_main_process,
    )
    first_step, started = progress.step, time.perf_counter()
    window_step, window_started = first_step, started
    window_loss = torch.zeros((), device=accelerator.device)
    loss = math.nan  # mean over the last window
    while progress.step < args.max_steps:
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                batch_loss = model(**next(batches)).loss
                accelerator.backward(batch_loss)
                optimizer.step()
                optimizer.zero_grad()
            window_loss += batch_loss.detach() / args.gradient_accumulation_steps
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        progress.step += 1
        bar.update()

        if progress.step % args.logging_steps == 0 or progress.step == args.max_steps:
            elapsed = time.perf_counter() - window_started
            loss = accelerator.reduce(window_loss, "mean").item() / (progress.step - window_step)
            rate = (progress.step - window_step) * batch_size / elapsed
            eta = (args.max_steps - progress.step) * batch_size / rate
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", images_per_s=f"{rate:.2f}")
            logger.info(
                f"iteration {progress.step}/{args.max_steps}: loss {loss:.4f}, learning rate {learning_rate:.3e}, "
                f"{rate:.2f} images/s, {time.strftime('%H:%M:%S', time.gmtime(eta))} to go"
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} before iteration {progress.step}.")
            accelerator.log(
                {"train/loss": loss, "train/learning_rate": learning_rate, "train/images_per_second": rate},
                step=progress.step,
            )
            window_loss.zero_()
            window_step, window_started = progress.step, time.perf_counter()

        if args.save_steps and progress.step % args.save_steps == 0:
            save_checkpoint(accelerator, output_dir, progress.step, args.save_total_limit)
        if args.eval_steps and progress.step % args.eval_steps == 0 and progress.step < args.max_steps:
            results = score(prepared)
            accelerator.log({f"eval/{name}": value for name, value in scalars(results).items()}, step=progress.step)
            window_started = time.perf_counter()
    bar.close()

    runtime = time.perf_counter() - started
    trained = progress.step - first_step
    return {
        "train_loss": loss,
        "train_runtime": runtime,
        "train_steps": progress.step,
        "train_samples_per_second": trained * batch_size / runtime,
    }


def num_workers(prepared: Run) -> int:
    if prepared.args.dataloader_num_workers is not None:
        return prepared.args.dataloader_num_workers
    return 0 if prepared.accelerator.device.type == "cpu" else 4


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int | None) -> None:
    """Writes `checkpoint-<step>`: whole under another name first, so that a folder of this name is complete."""
    folder, partial = output_dir / f"checkpoint-{step}", output_dir / f".partial-checkpoint-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in checkpoint_folders(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def score(prepared: Run) -> dict:
    """Scores on the validation split, the names prefixed `eval_`; draws overlays. With `--eval_only` draws the worst
    images too, and goes on with an evaluation that was stopped."""
    args, accelerator = prepared.args, prepared.accelerator
    for buffer in prepared.model.buffers():  # batch norm's statistics differ between processes that train
        buffer.copy_(broadcast(buffer))
    picture_folder = prepared.output_dir / "overlays"
    picture_folder.mkdir(exist_ok=True)
    folders = {}
    if args.eval_only:
        folders = {
            "worst_folder": prepared.output_dir / "worst",
            "log_folder": prepared.output_dir / "evaluation-in-progress",
            "prediction_folder": prepared.output_dir / "predictions" if args.save_predictions else None,
        }
    started = time.perf_counter()
    results = evaluate_segmentation(
        prepared.model,
        prepared.image_processor,
        prepared.data,
        accelerator=accelerator,
        metric=args.metric,
        batch_size=args.per_device_eval_batch_size,
        num_workers=num_workers(prepared),
        mode=args.inference_mode,
        scales=args.scales,
        flip=args.flip,
        picture_folder=picture_folder,
        num_pictures=args.num_pictures,
        **folders,
    )
    runtime = time.perf_counter() - started
    logger.info(
        f"mean IoU {100 * results['mean_iou']:.2f}, mean accuracy {100 * results['mean_accuracy']:.2f}, "
        f"pixel accuracy {100 * results['overall_accuracy']:.2f}"
    )
    if "confusion_matrix" in results and list(prepared.data.id2label.values()) == list(ADE20K_CLASSES):
        results["mean_iou_authors"] = authors_mean_iou(results["confusion_matrix"])
    num_images = len(prepared.data.splits["validation"])
    results |= {"runtime": runtime, "samples": num_images, "samples_per_second": num_images / runtime}
    return {f"eval_{name}": value for name, value in results.items()}


def tracked_settings(prepared: Run) -> dict:
    settings = {}
    for arguments in (prepared.model_args, prepared.data_args, prepared.args):
        settings |= {name: str(value) for name, value in vars(arguments).items()}
    return settings
