"""A dataset through a model into the metric, over any number of processes."""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .data.loading import SegmentationData, example_name, read_example, undecoded
from .image_processing_pil_twins import IGNORE_INDEX
from .inference import InferenceMode, predict_label_maps, prepare_scales
from .metrics.mean_iou.mean_iou import confusion_matrix, iou_scores
from .visualization import comparison

NOTHING = np.zeros((0, 3), np.int64)  # the histogram of no image
MISCOUNTED_CLASSES = (49, 63, 89, 98, 117, 126)
MEAN_IOU = str(Path(__file__).parent / "metrics" / "mean_iou")


class ProcessedExamples(Dataset):
    """Rows of a split at `indices`, decoded and preprocessed: (index, example, pixel_values of each scale)."""

    def __init__(
        self,
        data: SegmentationData,
        split: str,
        indices: Sequence[int],
        image_processor: BaseImageProcessor,
        scales: Sequence[float],
    ):
        self.rows = undecoded(data.splits[split])
        self.do_reduce_labels = data.do_reduce_labels
        self.indices = indices
        self.image_processor = image_processor
        self.scales = scales

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int):
        index = self.indices[position]
        example = read_example(self.rows[index], index, self.do_reduce_labels)
        return index, example, prepare_scales(self.image_processor, example.image, self.scales)


class EvaluationLog:
    """
    The histogram of every image that was scored, one line of JSON each, in one file a process, so that a stopped
    evaluation goes on where it was and counts no image twice.

    Attributes:
        done: Histogram rows (label, prediction, pixels) by the image's index, of earlier starts; in every process the
            same.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[int, list] = broadcast_object_list([self.read() if accelerator.is_main_process else {}])[0]
        self.file = (folder / f"process_{accelerator.process_index}.jsonl").open("a", encoding="utf-8")
        self.file.write("\n")  # ends a line that was cut short

    def read(self) -> dict[int, list]:
        done = {}
        for path in sorted(self.folder.glob("process_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # not cut short
                    record = json.loads(line)
                    done[record["index"]] = record["histogram"]
        return done

    def add(self, index: int, histogram: np.ndarray) -> None:
        self.file.write(json.dumps({"index": index, "histogram": histogram.tolist()}) + "\n")
        self.file.flush()

    def remove(self) -> None:
        """After the last image: what was logged is in the scores."""
        self.file.close()
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


class WorstImages:
    """Pictures of the images with the lowest mean IoU of their own, their names led by it: `0.123_photo.png`."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self.names: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, mean_iou: float, name: str, draw: Callable[[], PIL.Image.Image]) -> None:
        name = f"{mean_iou:.3f}_{name}.png"
        if len(self.names) < self.count or name < self.names[-1]:
            draw().save(self.folder / name)
            self.names = sorted([*self.names, name])
            if len(self.names) > self.count:
                (self.folder / self.names.pop()).unlink(missing_ok=True)

    def keep_worst(self) -> None:
        """Of the pictures of all processes and starts."""
        for path in sorted(self.folder.glob("*.png"))[self.count :]:
            path.unlink()


def evaluate_segmentation(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    data: SegmentationData,
    split: str = "validation",
    accelerator: Accelerator | None = None,
    metric: str = MEAN_IOU,
    batch_size: int = 1,
    num_workers: int = 0,
    mode: InferenceMode = "whole",
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    picture_folder: Path | None = None,
    num_pictures: int = 4,
    worst_folder: Path | None = None,
    prediction_folder: Path | None = None,
    log_folder: Path | None = None,
) -> dict:
    """
    Scores a model on a split; every process takes its share of the images, none is counted twice.

    Args:
        model: A semantic segmentation model on its device. It is left in the mode it comes in.
        image_processor: Its processor.
        data: The dataset.
        split: Which of its splits.
        accelerator: Where there are several processes; each must make the call.
        metric: What `evaluate.load` takes: this library's streaming mean IoU, or the Hub's `"mean_iou"`.
        batch_size: Images of one size that share a forward pass, per process; on a CPU each has its own.
        num_workers: Processes that decode and preprocess, per process.
        mode, scales, flip: How label maps are predicted, as of [`segment`].
        picture_folder: Where the first `num_pictures` images are drawn beside truth and prediction, as PNG.
        worst_folder: Where the `num_pictures` images of the lowest mean IoU are drawn.
        prediction_folder: Where every label map is saved as `<image>.png`, in the values of the dataset's own masks
            (ADE20K: 1 to 150, as its benchmark takes them).
        log_folder: Where the scored images are noted until the end, so that an evaluation which was stopped goes on
            when the same call is made again; one of another model, dataset or setting has another file there.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy` (floats in [0, 1]), `per_category_iou` and
        `per_category_accuracy` (one a class, nan where a class neither occurs nor is predicted), and, of this
        library's metric, `confusion_matrix` (label, prediction; int64 pixels); in every process.

    Raises:
        `ValueError`: if the model has another number of classes than the dataset, a file cannot be used, or two images
            of one name are to be saved.
    """
    num_labels = len(data.id2label)
    if model.config.num_labels != num_labels:
        raise ValueError(f"the model has {model.config.num_labels} classes but {data.name} has {num_labels}.")
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    scorer = evaluate.load(metric)
    is_streaming = hasattr(scorer, "histogram")
    num_images = len(data.splits[split])
    log, done = None, {}
    if log_folder is not None and is_streaming:
        settings = [data.splits[split]._fingerprint, image_processor.to_dict(), mode, list(scales), flip]
        log = EvaluationLog(log_folder / digest(model, settings), accelerator)
        done = log.done
    worst = WorstImages(worst_folder, num_pictures) if worst_folder is not None and is_streaming else None
    if prediction_folder is not None:
        prediction_folder.mkdir(parents=True, exist_ok=True)
        check_names(data, split)

    remaining = [index for index in range(num_images) if index not in done]
    indices = remaining[accelerator.process_index :: accelerator.num_processes]
    examples = DataLoader(
        ProcessedExamples(data, split, indices, image_processor, scales),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    was_training = model.training
    model.eval()
    pairs, matrix = [], np.zeros((num_labels, num_labels + 1), np.int64)
    before = sum((confusion_matrix(np.array(rows), num_labels, IGNORE_INDEX) for rows in done.values()), 0 * matrix)
    progress = tqdm(
        total=math.ceil(num_images / accelerator.num_processes),
        initial=len(done) // accelerator.num_processes,
        desc="Evaluating",
        unit="image",
        disable=not accelerator.is_main_process,
    )
    for batch in examples:
        sizes = [example.labels.shape for _, example, _ in batch]
        with accelerator.autocast():
            label_maps = predict_label_maps(
                model, image_processor, [inputs for *_, inputs in batch], sizes, mode, flip, batch_size
            )
        for (index, example, _), label_map in zip(batch, label_maps, strict=True):
            prediction, reference = label_map.numpy().astype(np.int32), example.labels.astype(np.int32)
            name = Path(example.name).stem.replace(" ", "_")
            draw = partial(comparison, example.image, prediction, data.id2label, example.labels)
            if is_streaming:
                scorer.histogram = NOTHING
                scorer.add(prediction=prediction, reference=reference)
                histogram = scorer.histogram
                image_matrix = confusion_matrix(histogram, num_labels, IGNORE_INDEX)
                matrix += image_matrix
                if worst is not None and image_matrix.any():
                    worst.add(iou_scores(image_matrix)["mean_iou"], name, draw)
                progress.set_postfix(mean_iou=f"{100 * iou_scores(before + matrix)['mean_iou']:.2f}")
            else:
                pairs.append((prediction, reference))
            if picture_folder is not None and index < num_pictures:
                draw().save(picture_folder / f"{name}.png")
            if prediction_folder is not None:
                values = (prediction + data.do_reduce_labels).astype(np.uint8)
                PIL.Image.fromarray(values).save(prediction_folder / f"{name}.png")
            if log is not None:  # last: what it holds is not done again
                log.add(index, histogram)
            progress.update()
    progress.close()
    model.train(was_training)

    if not is_streaming:  # a metric that keeps all maps: every process scores all of them
        for prediction, reference in gather_object(pairs):
            scorer.add(prediction=prediction, reference=reference)
        return scorer.compute(num_labels=num_labels, ignore_index=IGNORE_INDEX)

    matrix = before + sum(gather_object([matrix]))
    labels, predictions = np.nonzero(matrix)
    values = np.where(predictions < num_labels, predictions, IGNORE_INDEX)
    scorer.histogram = np.column_stack([labels, values, matrix[labels, predictions]])
    results = scorer.compute(num_labels=num_labels, ignore_index=IGNORE_INDEX)
    if accelerator.is_main_process:
        if worst is not None:
            worst.keep_worst()
        if log is not None:
            log.remove()
    return {**results, "confusion_matrix": matrix}


def check_names(data: SegmentationData, split: str) -> None:
    """
    Raises:
        `ValueError`: if two images have one name, so that the label map of one would replace the other's.
    """
    names = Counter(Path(example_name(row, index)).stem for index, row in enumerate(undecoded(data.splits[split])))
    name, count = max(names.items(), key=lambda item: item[1])
    if count > 1:
        raise ValueError(f"{data.name}: {count} images are called {name}, so that their label maps cannot be saved.")


def digest(model: PreTrainedModel, settings: list) -> str:
    """Sixteen hexadecimal digits, others where any weight or setting is another."""
    sha = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def authors_mean_iou(matrix: np.ndarray) -> float:
    """
    The mean IoU as the authors' histogram counted ADE20K's 150 classes, from a confusion matrix (150, 150 or more): in
    float32 its bins took six classes into the one before, and the mean is over the other 144. Their published numbers
    are such means.
    """
    num_labels = len(matrix)
    areas = np.stack([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)[:num_labels]])
    for class_id in MISCOUNTED_CLASSES:
        areas[:, class_id - 1] += areas[:, class_id]
        areas[:, class_id] = 0
    hit, label_area, predicted_area = areas
    union = label_area + predicted_area - hit
    return float((hit[union > 0] / union[union > 0]).mean())


def per_class_table(results: dict, id2label: dict[int, str]) -> str:
    """Markdown table of each class's IoU and accuracy in percent, the best first, absent classes last."""
    rows = sorted(
        zip(id2label.values(), results["per_category_iou"], results["per_category_accuracy"], strict=True),
        key=lambda row: -1.0 if math.isnan(row[1]) else row[1],
        reverse=True,
    )
    lines = ["| class | IoU | accuracy |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | " + " | ".join("-" if math.isnan(score) else f"{100 * score:.2f}" for score in scores) + " |"
        for name, *scores in rows
    ]
    return "\n".join(lines)
