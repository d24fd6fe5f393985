"""The table of published results, with what checkpoints score here beside it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from .configuration_twins import VARIANTS, TwinsConfig
from .conversion import load_model
from .data.ade20k import ADE20K_CLASSES
from .data.loading import SegmentationData
from .evaluation import authors_mean_iou, evaluate_segmentation
from .image_processing_twins import TwinsImageProcessor
from .inference import MULTI_SCALES
from .modeling_twins import TwinsForSemanticSegmentation

# Mean IoU on ADE20K's validation split in percent, single-scale and multi-scale + flip, of the six variants in order.
PUBLISHED = {
    ("authors", "upernet"): "46.2/47.5 47.1/48.4 48.6/49.8 46.2/47.1 47.4/48.9 48.8/50.2",
    ("mmseg", "upernet"): "46.04/46.92 47.91/48.64 49.35/50.08 46.08/46.96 48.04/48.87 49.65/50.63",
    ("mmseg", "fpn"): "43.26/44.11 45.66/46.48 45.94/46.70 44.47/45.42 46.77/47.47 46.55/47.74",
}
METHODS = {"upernet": ("UPerNet", "160k"), "fpn": ("Semantic FPN", "80k")}


@dataclass
class CheckpointResult:
    """
    What one checkpoint scores.

    Attributes:
        name: Folder, file or Hub model id.
        variant: One of the published ones, or `None`.
        decoder_type: `"upernet"` or `"fpn"`.
        crop_size: Side of the training crops.
        memory: Peak GPU memory of the single-scale evaluation in GB (10^9 bytes), or `None` without a GPU.
        images_per_second: Of the single-scale evaluation, from files to label maps, all processes together.
        mean_iou: Single-scale, in [0, 1].
        mean_iou_multi_scale: Multi-scale + flip, or `None`.
        authors_mean_iou, authors_mean_iou_multi_scale: The same as [`authors_mean_iou`] counts them, for ADE20K.
    """

    name: str
    variant: str | None
    decoder_type: str
    crop_size: int
    memory: float | None
    images_per_second: float
    mean_iou: float
    mean_iou_multi_scale: float | None
    authors_mean_iou: float | None
    authors_mean_iou_multi_scale: float | None


def find_variant(config: TwinsConfig) -> str | None:
    """The published variant that a configuration is of."""
    for variant in VARIANTS:
        published = TwinsConfig.from_variant(variant)
        names = ("hidden_sizes", "depths", "num_attention_heads", "mlp_ratios", "window_sizes")
        if all(list(getattr(config, n) or []) == list(getattr(published, n) or []) for n in names):
            return variant
    return None


def score_checkpoint(
    checkpoint: str,
    data: SegmentationData,
    accelerator: Accelerator,
    multi_scale: bool = True,
    log_folder: Path | None = None,
) -> CheckpointResult:
    """
    Scores a checkpoint, of any source that [`load_model`] takes, by the published protocol: single-scale, and with
    `multi_scale` at six scales and mirrored.

    Raises:
        `ValueError`: if it is no segmentation model, or has another number of classes than the dataset.
    """
    model, _ = load_model(checkpoint)
    if not isinstance(model, TwinsForSemanticSegmentation):
        raise ValueError(f"{checkpoint}: it is no segmentation model but a {type(model).__name__}.")
    model = model.to(accelerator.device).eval()
    if Path(checkpoint, "preprocessor_config.json").is_file():
        image_processor = TwinsImageProcessor.from_pretrained(checkpoint)
    else:
        image_processor = TwinsImageProcessor()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    started = time.perf_counter()
    runs = [evaluate_segmentation(model, image_processor, data, accelerator=accelerator, log_folder=log_folder)]
    elapsed = time.perf_counter() - started
    memory = None
    if accelerator.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(accelerator.device) / 1e9
    if multi_scale:
        options = {"scales": MULTI_SCALES, "flip": True, "log_folder": log_folder}
        runs.append(evaluate_segmentation(model, image_processor, data, accelerator=accelerator, **options))
    means = [float(run["mean_iou"]) for run in runs]
    is_ade20k = list(data.id2label.values()) == list(ADE20K_CLASSES)
    authors = [authors_mean_iou(run["confusion_matrix"]) if is_ade20k else None for run in runs]
    return CheckpointResult(
        name=checkpoint,
        variant=find_variant(model.config),
        decoder_type=model.config.decoder_type,
        crop_size=image_processor.crop_size["height"],
        memory=memory,
        images_per_second=len(data.splits["validation"]) / elapsed,
        mean_iou=means[0],
        mean_iou_multi_scale=means[1] if multi_scale else None,
        authors_mean_iou=authors[0],
        authors_mean_iou_multi_scale=authors[1] if multi_scale else None,
    )


def published(source: str, decoder_type: str, variant: str | None) -> tuple[str, str]:
    """Published single-scale and multi-scale + flip mean IoU, or dashes."""
    row = PUBLISHED.get((source, decoder_type))
    if row is None or variant is None:
        return "-", "-"
    return tuple(row.split()[list(VARIANTS).index(variant)].split("/"))


def results_table(results: Sequence[CheckpointResult], data: SegmentationData) -> str:
    """Markdown: a row for each checkpoint in the columns of the published table, ours beside theirs."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    columns = ["Method", "Backbone", "Crop Size", "Lr schd", "Mem (GB)", "Inf time (fps)"]
    columns += ["mIoU", "mIoU(ms+flip)", "of 144", "of 144 (ms+flip)"]
    columns += ["authors' mIoU", "authors' mIoU(ms+flip)", "MMSegmentation's mIoU", "MMSegmentation's mIoU(ms+flip)"]
    rows = []
    for result in results:
        method, schedule = METHODS[result.decoder_type]
        rows.append(
            [
                method,
                f"{(result.variant or 'other').upper()} ({Path(result.name).name})",
                f"{result.crop_size}x{result.crop_size}",
                schedule if result.variant else "-",
                "-" if result.memory is None else f"{result.memory:.2f}",
                f"{result.images_per_second:.2f}",
                percent(result.mean_iou),
                percent(result.mean_iou_multi_scale),
                percent(result.authors_mean_iou),
                percent(result.authors_mean_iou_multi_scale),
                *published("authors", result.decoder_type, result.variant),
                *published("mmseg", result.decoder_type, result.variant),
            ]
        )
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"# Results on {Path(data.name).name}, {len(data.splits['validation'])} images\n\n{table}\n\n"
        'mIoU is the mean over all classes that occur. "Of 144" is the mean as the authors\' histogram counted '
        "ADE20K's 150 classes, which their published numbers are; MMSegmentation's are true means. Memory is a GPU's; "
        "frames per second run from file to label map, over all processes; `Lr schd` is the published schedule.\n"
    )
