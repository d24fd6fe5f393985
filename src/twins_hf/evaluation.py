"""A dataset through a model into the metric, over any number of processes."""

import math
from pathlib import Path

import evaluate
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .data.loading import SegmentationData, read_example, undecoded
from .image_processing_pil_twins import IGNORE_INDEX
from .inference import predict_label_maps
from .visualization import comparison

MEAN_IOU = str(Path(__file__).parent / "metrics" / "mean_iou")


class ProcessedExamples(Dataset):
    """Rows of a split at `indices`, decoded and preprocessed: (index, example, pixel_values (C, H, W))."""

    def __init__(self, data: SegmentationData, split: str, indices: range, image_processor: BaseImageProcessor):
        self.rows = undecoded(data.splits[split])
        self.do_reduce_labels = data.do_reduce_labels
        self.indices = indices
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int):
        index = self.indices[position]
        example = read_example(self.rows[index], index, self.do_reduce_labels)
        pixel_values = self.image_processor(example.image, return_tensors="pt")["pixel_values"][0]
        return index, example, pixel_values


def evaluate_segmentation(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    data: SegmentationData,
    split: str = "validation",
    accelerator: Accelerator | None = None,
    metric: str = MEAN_IOU,
    batch_size: int = 1,
    num_workers: int = 0,
    picture_folder: Path | None = None,
    num_pictures: int = 4,
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
        batch_size: Images of one size that share a forward pass, per process.
        num_workers: Processes that decode and preprocess, per process.
        picture_folder: Where the first `num_pictures` images are drawn beside truth and prediction, as PNG.

    Returns:
        `mean_iou`, `mean_accuracy`, `overall_accuracy` (floats in [0, 1]), `per_category_iou` and
        `per_category_accuracy` (one a class, nan where a class neither occurs nor is predicted), in every process.

    Raises:
        `ValueError`: if the model has another number of classes than the dataset, or a file cannot be used.
    """
    if model.config.num_labels != len(data.id2label):
        raise ValueError(f"the model has {model.config.num_labels} classes but {data.name} has {len(data.id2label)}.")
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    scorer = evaluate.load(metric)
    indices = range(accelerator.process_index, len(data.splits[split]), accelerator.num_processes)
    examples = DataLoader(
        ProcessedExamples(data, split, indices, image_processor),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    was_training = model.training
    model.eval()
    pairs = []
    steps = math.ceil(len(data.splits[split]) / (accelerator.num_processes * batch_size))
    progress = tqdm(total=steps, desc="Evaluating", unit="batch", disable=not accelerator.is_main_process)
    for batch in examples:
        sizes = [example.labels.shape for _, example, _ in batch]
        with accelerator.autocast():
            label_maps = predict_label_maps(model, image_processor, [pixels for *_, pixels in batch], sizes)
        for (index, example, _), label_map in zip(batch, label_maps, strict=True):
            prediction, reference = label_map.numpy().astype(np.int32), example.labels.astype(np.int32)
            if hasattr(scorer, "histogram"):
                scorer.add(prediction=prediction, reference=reference)
            else:
                pairs.append((prediction, reference))
            if picture_folder is not None and index < num_pictures:
                name = Path(example.name).stem.replace(" ", "_")
                picture = comparison(example.image, prediction, data.id2label, example.labels)
                picture.save(picture_folder / f"{name}.png")
        progress.update()
    progress.close()
    model.train(was_training)

    if hasattr(scorer, "histogram"):
        scorer.histogram = np.concatenate(gather_object([scorer.histogram]))
    else:  # a metric that keeps all maps: every process scores all of them
        for prediction, reference in gather_object(pairs):
            scorer.add(prediction=prediction, reference=reference)
    return scorer.compute(num_labels=len(data.id2label), ignore_index=IGNORE_INDEX)


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
