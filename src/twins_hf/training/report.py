"""What a run leaves in writing: scores as JSON and Markdown, and the model card."""

import json
import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.loading import SegmentationData
from ..evaluation import per_class_table
from ..visualization import bar_chart, confusion_picture
from .preparation import Run
from .scoring import scalars

DECODER_NAMES = {"upernet": "UPerNet", "fpn": "Semantic FPN"}


def write_results(prepared: Run, results: dict) -> None:
    """`all_results.json`, `per_class.md`, and pictures of both the classes' IoU and the confusion matrix."""
    names = list(prepared.data.id2label.values())
    stored = scalars(results)
    for key in ("eval_per_category_iou", "eval_per_category_accuracy"):
        stored[key] = {
            name: None if math.isnan(value) else float(value) for name, value in zip(names, results[key], strict=True)
        }
    (prepared.output_dir / "all_results.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    table = class_table(results, prepared.data)
    (prepared.output_dir / "per_class.md").write_text(table + "\n", encoding="utf-8")
    short_names = [name.split(",")[0] for name in names]
    bar_chart(short_names, results["eval_per_category_iou"]).save(prepared.output_dir / "per_class.png")
    if "eval_confusion_matrix" in results:
        matrix = results["eval_confusion_matrix"]
        confusion_picture(matrix[:, : len(names)], short_names).save(prepared.output_dir / "confusion_matrix.png")


def class_table(results: dict, data: SegmentationData) -> str:
    return per_class_table({name.removeprefix("eval_"): value for name, value in results.items()}, data.id2label)


def write_model_card(prepared: Run, results: dict) -> None:
    """`README.md`: what was trained on what, how, and what it scores."""
    model_args, data_args, args, data = prepared.model_args, prepared.data_args, prepared.args, prepared.data
    scores = {
        "mean_iou": "Mean IoU",
        "mean_accuracy": "Mean accuracy",
        "overall_accuracy": "Pixel accuracy",
    }
    dataset = Path(data.name).name
    card_data = ModelCardData(
        model_name=prepared.output_dir.resolve().name,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["twins", "image-segmentation", "vision"],
        base_model=None if model_args.model_name_or_path is None else Path(model_args.model_name_or_path).name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split="validation",
                metric_type=metric,
                metric_name=title,
                metric_value=float(results[f"eval_{metric}"]),
            )
            for metric, title in scores.items()
        ],
    )
    start = model_args.model_name_or_path or f"random weights of {model_args.variant}"
    if model_args.config_overrides:
        start += f" with {model_args.config_overrides}"
    head, sizes = DECODER_NAMES[prepared.model.config.decoder_type], prepared.image_processor
    lines = [
        f"---\n{card_data.to_yaml()}\n---",
        f"# {prepared.output_dir.resolve().name}",
        f"Twins (arXiv [2104.13840](https://arxiv.org/abs/2104.13840)) with {head} for semantic "
        "segmentation, trained with `twins_hf`.",
        "```python\nimport twins_hf\nfrom transformers import pipeline\n\n"
        f'segment = pipeline("image-segmentation", "{prepared.hub_model_id or prepared.output_dir}")\n'
        'segment("photo.jpg")\n```',
        "## Data",
        f"{dataset}: {prepared.train_size} training and {len(data.splits['validation'])} validation images, "
        f"{len(data.id2label)} classes.",
        "## Training",
        f"Started from {start}. {results['train_steps']} iterations of {prepared.total_batch_size} crops of "
        f"{sizes.crop_size.height}x{sizes.crop_size.width}, scales {data_args.ratio_range[0]} to "
        f"{data_args.ratio_range[1]} of {dict(sizes.size)}; AdamW with learning rate {args.learning_rate:g} and "
        f"weight decay {args.weight_decay:g}, polynomial decay of power {args.lr_power:g}; "
        f"precision {args.mixed_precision}; "
        f"seed {args.seed}. Loss at the end: {results['train_loss']:.4f}.",
        "## Scores",
        "On the validation images, each whole and at its own size:",
        "| "
        + " | ".join(scores.values())
        + " |\n| ---: | ---: | ---: |\n| "
        + " | ".join(f"{100 * results[f'eval_{metric}']:.2f}" for metric in scores)
        + " |",
        class_table(results, data),
    ]
    ModelCard("\n\n".join(lines) + "\n").save(prepared.output_dir / "README.md")
