"""Options of a run, from the command line, a YAML or JSON file, or both."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..configuration_twins import VARIANTS, TwinsConfig
from ..evaluation import MEAN_IOU
from .optimization import PUBLISHED, SCHEDULES


def option(default, text: str, **metadata):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """Which model is trained or scored."""

    model_name_or_path: str | None = option(
        None,
        "Checkpoint to start from: a folder or Hub model id, of timm too, or a file of MMSegmentation or the authors.",
    )
    variant: str = option(
        "svt-s", "Architecture that starts from random weights, without --model_name_or_path.", choices=list(VARIANTS)
    )
    config_overrides: str | None = option(
        None, "Fields of TwinsConfig that shall differ, as JSON: '{\"decoder_hidden_size\": 128}'."
    )
    freeze_encoder: bool = option(False, "Train the heads only.")
    lora_rank: int | None = option(
        None,
        "Train low-rank adapters of the encoder's linear layers in place of its weights (needs peft), and the heads.",
    )
    model_revision: str = option("main", "Branch, tag or commit of a Hub model.")
    ignore_mismatched_sizes: bool = option(
        False, "Train new classifiers where the checkpoint has another number of classes."
    )


@dataclass
class DataArguments:
    """What the model is trained and scored on, and how images are prepared."""

    dataset_name: str = option(
        "scenes",
        "'scenes' (generated), a folder of images/ and annotations/ with objectInfo150.txt (ADE20K) or id2label.json, "
        "a folder of parquet files, or a Hub dataset id; 'ade20k' is downloaded.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a Hub dataset.")
    image_column_name: str = option("image", "Column of images in a Hub or parquet dataset.")
    label_column_name: str = option("label", "Column of masks in a Hub or parquet dataset.")
    train_split_name: str = option("train", "Training split of a Hub or parquet dataset.")
    validation_split_name: str = option("validation", "Validation split of a Hub or parquet dataset.")
    train_val_split: float = option(0.15, "Share of the training split to validate on where there is no other.")
    id2label: str | None = option(None, "JSON file of class names, in place of the dataset's own.")
    do_reduce_labels: bool | None = option(
        None, "Masks hold 0 for unlabelled and class ids from 1. By default true for ADE20K and 'scenes' only."
    )
    streaming: bool = option(False, "Read the training split of a Hub or parquet dataset as it is needed.")
    skip_corrupt: bool = option(
        False, "Train without files that cannot be used, which are named, in place of ending the run."
    )
    max_train_samples: int | None = option(None, "Use only the first so many training images.")
    max_eval_samples: int | None = option(None, "Use only the first so many validation images.")
    preprocessing_num_workers: int | None = option(None, "Processes that check the files before training.")
    crop_size: int | None = option(None, "Side of the training crop in pixels (default: the processor's, 512).")
    shortest_edge: int | None = option(
        None, "Images are fitted into this shorter side (default: the processor's, 512)"
    )
    longest_edge: int | None = option(None, "and this longer side (default: the processor's, 2048).")
    ratio_range: list[float] = option([0.5, 2.0], "Smallest and largest random scale of training images.")
    cat_max_ratio: float = option(0.75, "Largest share of one class in a training crop.")
    photometric_distortion: bool = option(True, "Distort brightness, contrast, saturation and hue in training.")


@dataclass
class TrainingArguments:
    """How the run goes. The defaults are the paper's UPerNet setting on ADE20K for 8 processes."""

    output_dir: str = option("outputs", "Folder for the model, scores, pictures and checkpoints.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that already holds a run.")
    eval_only: bool = option(False, "Score --model_name_or_path and stop.")
    max_steps: int = option(160_000, "Iterations, each an update of the weights.")
    total_train_batch_size: int | None = option(
        None,
        "Training crops per iteration, split over processes and forward passes; in place of "
        "--gradient_accumulation_steps.",
    )
    per_device_train_batch_size: int = option(
        2, "Training crops per process and forward pass, at least 2; with --total_train_batch_size at most so many."
    )
    auto_find_batch_size: bool = option(
        False, "Where memory runs out, start anew with smaller forward passes and more of them per iteration."
    )
    per_device_eval_batch_size: int = option(1, "Images of one size per process and forward pass in evaluation.")
    gradient_accumulation_steps: int = option(1, "Forward passes per iteration.")
    learning_rate: float = option(6e-5, "Peak of AdamW's learning rate.")
    weight_decay: float = option(0.01, "Weight decay, but for the encoder's LayerNorms and position encodings.")
    decay_norms: bool = option(False, "Decay those too, as the published Semantic FPN runs did.")
    layer_decay: float = option(
        1.0, "Factor of the learning rate from each of the encoder's blocks to the one before."
    )
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.999, "AdamW's second beta.")
    max_grad_norm: float | None = option(None, "Clip gradients to this norm (default: they are not clipped).")
    lr_scheduler_type: str = option(
        PUBLISHED,
        "'published': polynomial decay from the first iteration, times a warm-up; or one of transformers, whose "
        "'polynomial' decays from the end of the warm-up, as MMSegmentation 1.x does.",
        choices=list(SCHEDULES),
    )
    warmup_steps: int | None = option(None, "Iterations of warm-up (default: 1500, at most a tenth of --max_steps).")
    lr_power: float = option(1.0, "Power of a polynomial decay.")
    lr_end: float = option(0.0, "Learning rate that a polynomial decay ends with.")
    ema_decay: float | None = option(
        None, "Score and save an exponential moving average of the weights, of this decay: 0.999."
    )
    mixed_precision: str = option("no", "Precision of the forward pass.", choices=["no", "fp16", "bf16"])
    gradient_checkpointing: bool = option(False, "Compute the encoder's blocks twice to save memory.")
    torch_compile_backend: str | None = option(None, "Compile the model in training: 'inductor'.")
    seed: int = option(42, "Seed of weights, sampling and augmentation.")
    logging_steps: int = option(50, "Iterations between reports.")
    eval_steps: int | None = option(
        None, "Iterations between evaluations, the best model of which is kept in 'best' (default: only at the end)."
    )
    save_steps: int = option(2000, "Iterations between checkpoints; 0 for none.")
    save_total_limit: int = option(3, "Keep only the newest so many checkpoints; 0 for all.")
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint folder to go on from, or 'latest': the newest that is whole, from the start if there is none.",
    )
    max_nonfinite: int = option(0, "Leave out so many iterations whose loss is not finite before the run ends.")
    inference_mode: str = option(
        "whole", "Evaluate images whole, or in windows of the crop size that slide.", choices=["whole", "slide"]
    )
    scales: list[float] = option([1.0], "Scales whose mean is evaluated; published: 0.5 0.75 1.0 1.25 1.5 1.75.")
    flip: bool = option(False, "Evaluate each scale mirrored too.")
    save_predictions: bool = option(
        False, "With --eval_only: save label maps as PNG in the values of the dataset's masks (ADE20K: 1 to 150)."
    )
    metric: str = option(MEAN_IOU, "What evaluate.load takes: a path, or 'mean_iou' for the Hub's own.")
    num_pictures: int = option(
        4, "Validation images drawn beside truth and prediction; with --eval_only, the worst so many too."
    )
    dataloader_num_workers: int | None = option(
        None,
        "Workers per process that decode and augment (default: 4 beside a GPU, none beside a CPU they would slow).",
    )
    report_to: list[str] | None = option(
        None,
        "Trackers of accelerate: tensorboard, wandb, trackio, ..., 'all', 'none' (default: tensorboard if installed).",
    )
    use_cpu: bool = option(False, "Run on the CPU even where there is a GPU.")
    push_to_hub: bool = option(False, "Upload the result to the Hub.")
    hub_model_id: str | None = option(None, "Hub repository to upload to (default: the output folder's name).")
    hub_private_repo: bool = option(False, "Make that repository private.")


def parse_arguments(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """
    Options of `argv`, whose first word may be a YAML or JSON file of options; those on the command line win. The
    program ends with a message if an option is unknown or its value does not fit.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments),
        description=description,
        usage="%(prog)s [FILE.yaml | FILE.json] [options]",
        allow_abbrev=False,
    )
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        try:
            argv = options_of_file(argv[0]) + argv[1:]
        except (OSError, ValueError, yaml.YAMLError) as error:
            parser.error(f"{argv[0]}: {error}")
    model_args, data_args, training_args, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}")
    problem = find_problem(model_args, data_args, training_args)
    if problem:
        parser.error(problem)
    return model_args, data_args, training_args


class Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and numbers: `no` is a word, and 1e-6 a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$", re.IGNORECASE), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def options_of_file(path: str) -> list[str]:
    """Options in a YAML or JSON file, as command-line words, so that both are checked alike."""
    text = Path(path).read_text(encoding="utf-8")
    options = json.loads(text) if path.endswith(".json") else yaml.load(text, Loader)
    if not isinstance(options, dict):
        raise ValueError("the file must be a mapping of options to values.")
    words = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


AT_LEAST = {
    0: ("save_steps", "save_total_limit", "max_nonfinite", "num_pictures"),
    1: (
        "max_train_samples",
        "max_eval_samples",
        "crop_size",
        "shortest_edge",
        "longest_edge",
        "max_steps",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "eval_steps",
        "lora_rank",
    ),
    2: ("per_device_train_batch_size", "total_train_batch_size"),  # batch norm on maps of one pixel needs two samples
}


def find_problem(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> str | None:
    """The first thing that types cannot tell, as a sentence."""
    given = {**vars(model_args), **vars(data_args), **vars(training_args)}
    for least, names in AT_LEAST.items():
        for name in names:
            if given[name] is not None and given[name] < least:
                return f"--{name} {given[name]} must be at least {least}."
    if training_args.total_train_batch_size is not None and training_args.gradient_accumulation_steps != 1:
        return "--total_train_batch_size gives the --gradient_accumulation_steps: only one of the two can be set."
    if model_args.freeze_encoder and model_args.lora_rank is not None:
        return "--freeze_encoder does not go with --lora_rank, which trains the encoder's adapters."
    for name in ("ema_decay", "layer_decay"):
        if given[name] is not None and not 0 < given[name] <= 1:
            return f"--{name} {given[name]} must lie in (0, 1]."
    if not 0 <= training_args.lr_end <= training_args.learning_rate:
        return f"--lr_end {training_args.lr_end} must lie between 0 and --learning_rate {training_args.learning_rate}."
    low, high = data_args.ratio_range if len(data_args.ratio_range) == 2 else (0, 0)
    if not 0 < low <= high:
        return f"--ratio_range {data_args.ratio_range} must be two positive numbers, the smaller first."
    if training_args.warmup_steps is not None and not 0 <= training_args.warmup_steps <= training_args.max_steps:
        return f"--warmup_steps {training_args.warmup_steps} must lie between 0 and --max_steps."
    if training_args.eval_only and model_args.model_name_or_path is None:
        return "--eval_only needs --model_name_or_path."
    if not training_args.scales or min(training_args.scales) <= 0:
        return f"--scales {training_args.scales} must be positive."
    if training_args.save_predictions and not training_args.eval_only:
        return "--save_predictions goes with --eval_only."
    if training_args.eval_only and training_args.push_to_hub:
        return "--push_to_hub uploads a trained model: it does not go with --eval_only."
    if training_args.lr_end and training_args.lr_scheduler_type not in (PUBLISHED, "polynomial"):
        return (
            f"--lr_end {training_args.lr_end} does not go with --lr_scheduler_type {training_args.lr_scheduler_type}."
        )
    if model_args.config_overrides is not None:
        try:
            overrides = json.loads(model_args.config_overrides)
        except ValueError as error:
            return f"--config_overrides {model_args.config_overrides} is no JSON ({error})."
        if not isinstance(overrides, dict):
            return f"--config_overrides {model_args.config_overrides} must be a JSON object."
        known = {field.name for field in dataclasses.fields(TwinsConfig)} | {"out_features", "out_indices"}
        if overrides.keys() - known:
            return f"--config_overrides: TwinsConfig has no {', '.join(sorted(overrides.keys() - known))}."
    return None
