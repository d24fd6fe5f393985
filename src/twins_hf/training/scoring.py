"""The score of a run's model on its validation split."""

import time
from pathlib import Path

import numpy as np
import PIL.Image
from accelerate.logging import get_logger
from accelerate.utils import broadcast

from ..data.ade20k import ADE20K_CLASSES
from ..evaluation import authors_mean_iou, evaluate_segmentation
from ..modeling_twins import TwinsForSemanticSegmentation
from .preparation import Run

logger = get_logger(__name__)


def score(prepared: Run, model: TwinsForSemanticSegmentation, step: int | None = None) -> dict:
    """
    Scores a model on the validation split, the names prefixed `eval_`; draws overlays. With `--eval_only` draws the
    worst images too, and goes on with an evaluation that was stopped.

    Args:
        prepared: The run.
        model: What is scored; not wrapped.
        step: The iteration that trackers note figures and overlays for; `None` leaves them out.
    """
    args, accelerator = prepared.args, prepared.accelerator
    for buffer in model.buffers():  # batch norm's statistics differ between processes that train
        buffer.copy_(broadcast(buffer))
    picture_folder = prepared.output_dir / "overlays"
    picture_folder.mkdir(exist_ok=True, parents=True)
    folders = {}
    if args.eval_only:
        folders = {
            "worst_folder": prepared.output_dir / "worst",
            "log_folder": prepared.output_dir / "evaluation-in-progress",
            "prediction_folder": prepared.output_dir / "predictions" if args.save_predictions else None,
        }
    started = time.perf_counter()
    results = evaluate_segmentation(
        model,
        prepared.image_processor,
        prepared.data,
        accelerator=accelerator,
        metric=args.metric,
        batch_size=args.per_device_eval_batch_size,
        num_workers=prepared.num_workers,
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
    if step is not None:
        accelerator.log({f"eval/{name}": value for name, value in scalars(results).items()}, step=step)
        log_pictures(prepared, picture_folder, step)
    return {f"eval_{name}": value for name, value in results.items()}


def log_pictures(prepared: Run, folder: Path, step: int) -> None:
    """Shows the overlays to those trackers that take pictures."""
    for tracker in prepared.accelerator.trackers:
        if hasattr(tracker, "log_images") and prepared.accelerator.is_main_process:
            for path in sorted(folder.glob("*.png")):
                picture = np.asarray(PIL.Image.open(path).convert("RGB"))[None]
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"overlays/{path.stem}": picture}, step=step, **layout)


def scalars(results: dict) -> dict[str, float]:
    return {name: float(value) for name, value in results.items() if np.ndim(value) == 0}
