"""Everything a run needs, from its options: built and checked before the first iteration."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, is_tensorboard_available, set_seed
from datasets import Dataset
from huggingface_hub import HfApi
from transformers.utils import is_peft_available

from ..configuration_twins import TwinsConfig
from ..conversion import convert_checkpoint, is_twins
from ..data.loading import SegmentationData, check_examples, load_segmentation_data
from ..image_processing_twins import TwinsImageProcessor
from ..modeling_twins import TwinsForSemanticSegmentation
from .arguments import DataArguments, ModelArguments, TrainingArguments
from .checkpoints import Progress, find_checkpoint
from .optimization import split_batch

if TYPE_CHECKING:
    from peft import LoraModel

logger = get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclasses.dataclass
class Run:
    """
    A run before its start.

    Attributes:
        model: The model; its encoder frozen, its LoRA adapters in place, if that was asked for.
        lora: peft's handle on the adapters.
        batch_size: Crops of a forward pass in each process.
        checkpoint: Where the run goes on from.
        hub_model_id: Where the result is uploaded to.
        progress: How far the training is.
    """

    model_args: ModelArguments
    data_args: DataArguments
    args: TrainingArguments
    accelerator: Accelerator
    output_dir: Path
    data: SegmentationData
    model: TwinsForSemanticSegmentation
    lora: "LoraModel | None"
    image_processor: TwinsImageProcessor
    batch_size: int
    checkpoint: Path | None
    hub_model_id: str | None
    progress: Progress = dataclasses.field(default_factory=Progress)

    @property
    def total_batch_size(self) -> int:
        """Crops of an iteration, over all processes."""
        return self.batch_size * self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def train_size(self) -> int | str:
        """Number of training images, which a stream does not know."""
        rows = self.data.splits["train"]
        return len(rows) if isinstance(rows, Dataset) else "streamed"

    @property
    def num_workers(self) -> int:
        if self.args.dataloader_num_workers is not None:
            return self.args.dataloader_num_workers
        return 0 if self.accelerator.device.type == "cpu" else 4


def prepare_run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Run:
    """
    Builds a run and checks whatever can be known before it starts: the output folder, the checkpoint, the Hub
    repository, every image and mask, and that model and dataset have the same classes.

    Raises:
        `ValueError`, `OSError`: naming the option or file that does not fit.
    """
    accelerator = build_accelerator(args, model_args)
    logger.info(f"Running on {accelerator.num_processes} process(es), {accelerator.device}, {args.mixed_precision=}")
    batch_size, accumulation = split_batch(
        args.total_train_batch_size,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.num_processes,
    )
    accelerator.gradient_accumulation_steps = accumulation
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
            streaming=data_args.streaming,
        )
        for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
            if limit is not None:
                rows = data.splits[split]
                is_stored = isinstance(rows, Dataset)
                data.splits[split] = rows.select(range(min(limit, len(rows)))) if is_stored else rows.take(limit)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = find_pretrained(model_args, Path(folder))
        model = build_model(model_args, pretrained, data, args.eval_only)
        image_processor = build_image_processor(pretrained, data_args, data)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    prepared = Run(
        model_args,
        data_args,
        args,
        accelerator,
        output_dir,
        data,
        model,
        lora=choose_trained_weights(model, model_args),
        image_processor=image_processor,
        batch_size=batch_size,
        checkpoint=find_checkpoint(output_dir, args.resume_from_checkpoint, accelerator),
        hub_model_id=create_hub_repository(args, output_dir) if accelerator.is_main_process else None,
    )
    with accelerator.local_main_process_first():  # last, since it reads every file
        for split in ["validation"] if args.eval_only else data.splits:
            check_examples(data, split, data_args.preprocessing_num_workers, data_args.skip_corrupt)
    return prepared


def build_accelerator(args: TrainingArguments, model_args: ModelArguments) -> Accelerator:
    trackers = args.report_to
    if trackers is None:
        trackers = ["tensorboard"] if is_tensorboard_available() and not args.eval_only else []
    elif trackers == ["none"]:
        trackers = []
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        step_scheduler_with_optimizer=False,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir) / "runs")),
        dynamo_backend=args.torch_compile_backend,
    )
    if trackers and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise ValueError(f"--report_to {' '.join(trackers)}: that tracker is not installed.")
    if accelerator.distributed_type in SHARDED:
        for option, value in {**vars(args), **vars(model_args)}.items():
            if option in ("ema_decay", "lora_rank", "auto_find_batch_size") and value:
                raise ValueError(f"--{option} {value} does not go with {accelerator.distributed_type.value}.")
    return accelerator


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
    if not is_segmenter:  # what the published segmentation models have and the classifiers they start from have not
        changed = {"window_padding": "mmseg", "decoder_hidden_size": None, "use_auxiliary_head": None}
        changed["norm_after_stage"] = config.window_sizes is not None
        config = TwinsConfig.from_dict({**config.to_dict(), **changed, **overrides})
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


def create_hub_repository(args: TrainingArguments, output_dir: Path) -> str | None:
    if not args.push_to_hub:
        return None
    api = HfApi()
    api.whoami()  # a token that is not valid is refused here; create_repo lets it pass where the repository exists
    name = args.hub_model_id or output_dir.resolve().name
    return api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def choose_trained_weights(model: TwinsForSemanticSegmentation, args: ModelArguments) -> "LoraModel | None":
    """
    Freezes the encoder, or puts LoRA adapters (arXiv 2106.09685) beside its frozen linear layers, as was asked for;
    the heads are trained in any case.

    Raises:
        `ValueError`: if peft, which makes the adapters, is not installed.
    """
    lora = None
    if args.lora_rank is not None:
        if not is_peft_available():
            raise ValueError(f"--lora_rank {args.lora_rank} needs peft, which is not installed.")
        from peft import LoraConfig, LoraModel

        linear = [name for name, module in model.twins.named_modules() if isinstance(module, torch.nn.Linear)]
        config = LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=[f"twins.{name}" for name in linear]
        )
        lora = LoraModel(model, config, "default")  # changes the model in place
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or not name.startswith("twins."))
    elif args.freeze_encoder:
        model.twins.requires_grad_(False)
    return lora
