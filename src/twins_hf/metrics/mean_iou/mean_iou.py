"""Mean intersection over union, streaming.

The `mean_iou` of the Hugging Face Hub counts, image by image, the pixels of each class in the label, in the prediction
and in both. All it needs for that is how many pixels carry which pair of (label value, predicted value). This module
keeps those counts and nothing else: memory does not grow with the set, and `ignore_index`, `label_map` and
`reduce_labels`, which act on single values, are applied to the counts once, in `compute`. The scores are the same.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Intersection over union of a class: the pixels that label and prediction both give to it, divided by those that either
does, both summed over all images. The mean is taken over the classes that occur in a label or a prediction.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions, references: segmentation maps of shape (height, width), any integer type or bool; a sequence of maps
        (arrays, tensors on the CPU, PIL images or nested lists, each of its own size), an array of shape
        (batch, height, width), or one array or image of shape (height, width).
    num_labels (`int`): number of classes; labels are 0..num_labels-1.
    ignore_index (`int`): label value, after `label_map` and `reduce_labels`, whose pixels are not counted.
    nan_to_num (`float`, *optional*): stands in for the score of a class that does not occur, which is nan otherwise.
        The means still skip such a class.
    label_map (`dict[int, int]`, *optional*): new values of label values, replaced one after the other in the order of
        the dictionary, so that `{0: 1, 1: 2}` takes 0 to 2.
    reduce_labels (`bool`, *optional*, defaults to `False`): whether label 0 becomes 255, 255 stays, and every other
        label is lowered by one. Follows `label_map`.

Returns:
    `dict` of `mean_iou`, `mean_accuracy`, `overall_accuracy` (`float`) and `per_category_iou`,
    `per_category_accuracy` (arrays of shape (num_labels,)), all in 0..1 or nan.

Example:

    >>> metric.add_batch(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]])
    >>> metric.compute(num_labels=2, ignore_index=255)["per_category_iou"]
    array([0.5, 0.5])
"""

_CITATION = """
@misc{mmseg2020,
    title = {{MMSegmentation}: OpenMMLab Semantic Segmentation Toolbox and Benchmark},
    author = {{MMSegmentation Contributors}},
    year = {2020},
    url = {https://github.com/open-mmlab/mmsegmentation}
}
"""

_SIDE = 256  # pairs of values 0..255 are counted in a table of this side, pairs with any other value by sorting


class MeanIoU(evaluate.Metric):
    """Drop-in for the Hub's `mean_iou`; `evaluate.load` on this file's folder returns an instance.

    It differs where the Hub drops values in silence: a label or a prediction that is neither a class nor
    `ignore_index` is an error. No cache file is written; `num_process` and `process_id` are accepted and do nothing,
    because processes are brought together through `histogram`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._reset()

    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    @property
    def histogram(self):
        """All that was added: int64 rows of (label, prediction, pixels), shape (pairs, 3), sorted, each pair once.

        Assigning rows replaces the state. They may repeat a pair or count no pixels, so that parts of a set add up by
        concatenation, and those of several processes by gathering rows padded with zeros:

            rows = accelerator.pad_across_processes(torch.from_numpy(metric.histogram).to(accelerator.device))
            metric.histogram = accelerator.gather(rows).cpu()
        """
        return _as_rows(self._table, self._rows)

    @histogram.setter
    def histogram(self, rows):
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind not in "iu" or (rows[:, 2] < 0).any():
            raise ValueError(
                "a histogram is integer rows of (label, prediction, pixels >= 0), "
                f"got an array of shape {rows.shape} and type {rows.dtype}"
            )
        self._reset()
        self._rows = _sum_rows(rows.astype(np.int64))

    def _reset(self):
        self._table = np.zeros(_SIDE**2, np.int64)
        self._rows = np.zeros((0, 3), np.int64)

    def add(self, *, prediction, reference):
        """Counts the pixels of one image, two maps of the same shape. Raises as `add_batch` does."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions, references):
        """Counts the pixels of a batch of images.

        Raises `TypeError` for maps that are not of integers and `ValueError` where the numbers of maps or the shapes
        of a pair differ; the state is then as it was.
        """
        table, rows = _count(predictions, references)
        self._table += table
        if len(rows):
            self._rows = _sum_rows(np.concatenate([self._rows, rows]))

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Adds the maps, if given, returns the scores of everything added and forgets it.

        Raises `ValueError` if nothing was added or if a value that counts is not among the classes, and what
        `add_batch` raises; the state is then as it was.
        """
        rows = self.histogram
        if predictions is not None or references is not None:
            rows = np.concatenate([rows, _as_rows(*_count(predictions, references))])
        scores = _score(rows, **kwargs)
        self._reset()
        return scores

    def _compute(self, predictions, references, **kwargs):
        """The scores of these maps alone, as example scripts call it on the Hub's metric; the state takes no part."""
        return _score(_as_rows(*_count(predictions, references)), **kwargs)


def _as_maps(maps, name):
    """A batch in any accepted form -> list of integer arrays (height, width), without copying arrays."""
    if hasattr(maps, "__array__") or hasattr(maps, "__array_interface__"):
        maps = np.asarray(maps)
        maps = maps[None] if maps.ndim == 2 else maps
    maps = [np.asarray(m) for m in maps]
    for i, m in enumerate(maps):
        if m.dtype.kind not in "biu":
            raise TypeError(f"segmentation maps hold integers, but {name}[{i}] is of type {m.dtype}")
        if m.ndim != 2:
            raise ValueError(f"segmentation maps have the shape (height, width), but {name}[{i}] has {m.shape}")
    return maps


def _count(predictions, references):
    """Batch of maps -> joint histogram in two parts: flat table of pairs within 0..255, rows of all other pairs."""
    if predictions is None or references is None:
        raise ValueError("predictions and references are needed together, one of them is None")
    predictions, references = _as_maps(predictions, "predictions"), _as_maps(references, "references")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions do not match {len(references)} references")
    table, rows = np.zeros(_SIDE**2, np.int64), [np.zeros((0, 3), np.int64)]
    for i, (prediction, label) in enumerate(zip(predictions, references, strict=True)):
        if prediction.shape != label.shape:
            raise ValueError(f"predictions[{i}] has the shape {prediction.shape}, references[{i}] {label.shape}")
        label, prediction, pixels = _runs(label, prediction)
        # the OR of all values is within 0..255 if and only if each of them is, and is cheaper than their extremes
        if all(0 <= np.bitwise_or.reduce(m, axis=None) < _SIDE for m in (label, prediction)):
            pairs = label.astype(np.uint16)  # bincount widens it, still faster than computing in 64 bits
            pairs *= _SIDE
            pairs += prediction.astype(np.uint16, copy=False)
            table += np.bincount(pairs, pixels, minlength=_SIDE**2).astype(np.int64, copy=False)
        else:
            for name, m in (("predictions", prediction), ("references", label)):
                if int(m.min()) < -(2**31) or int(m.max()) >= 2**31:
                    raise ValueError(f"{name}[{i}] holds values of more than 32 bits: {m.min()} to {m.max()}")
            pairs = (label.astype(np.int64) << 32) | (prediction.astype(np.int64) & 0xFFFFFFFF)
            pairs, place = np.unique(pairs, return_inverse=True)
            rows.append(
                np.column_stack([pairs >> 32, pairs.astype(np.int32), np.bincount(place, pixels).astype(np.int64)])
            )
    return table, np.concatenate(rows)


def _runs(label, prediction):
    """Values and lengths of the runs of equal pairs that two maps consist of; of noise, all values and `None`."""
    label, prediction = label.ravel(), prediction.ravel()
    is_end = np.ones(label.size, bool)
    np.not_equal(label[1:], label[:-1], out=is_end[:-1])
    is_end[:-1] |= prediction[1:] != prediction[:-1]
    if 8 * np.count_nonzero(is_end) > label.size:
        return label, prediction, None
    (ends,) = np.nonzero(is_end)
    return label[ends], prediction[ends], np.diff(ends, prepend=-1)


def _sum_rows(rows):
    """Rows of (label, prediction, pixels) -> the same sorted, each pair once and none without pixels."""
    pairs, inverse = np.unique(rows[:, :2], axis=0, return_inverse=True)
    pixels = np.zeros(len(pairs), np.int64)
    np.add.at(pixels, inverse.ravel(), rows[:, 2])
    return np.column_stack([pairs, pixels])[pixels > 0]


def _as_rows(table, rows):
    """The two parts of a histogram -> its rows (label, prediction, pixels)."""
    (pairs,) = np.nonzero(table)
    return _sum_rows(np.concatenate([np.column_stack([pairs // _SIDE, pairs % _SIDE, table[pairs]]), rows]))


def _check_classes(what, given, mapped, pixels, num_labels, ignore_index):
    """Raises `ValueError` for the first `mapped` value that is neither a class nor `ignore_index`."""
    outside = (mapped != ignore_index) & ((mapped < 0) | (mapped >= num_labels))
    if outside.any():
        value, became = given[outside][0], mapped[outside][0]
        became = "" if became == value else f" (mapped to {became})"
        raise ValueError(
            f"{what} value {value}{became} on {pixels[given == value].sum()} pixels is neither a class, "
            f"0..{num_labels - 1} with num_labels={num_labels}, nor ignore_index={ignore_index}"
        )


def confusion_matrix(histogram, num_labels, ignore_index, label_map=None, reduce_labels=False):
    """Rows of (label, prediction, pixels) -> int64 pixels of shape (num_labels, num_labels + 1), by label, prediction.

    The last column holds predictions of an `ignore_index` that is no class. Raises `ValueError` for a label, or a
    prediction where the label counts, that is neither a class nor `ignore_index`.
    """
    given, prediction, pixels = histogram.T
    label = given.copy()
    for old, new in (label_map or {}).items():
        label[label == old] = new
    if reduce_labels:
        label = np.where((label == 0) | (label == 255), 255, label - 1)
    counts = label != ignore_index
    given, label, prediction, pixels = given[counts], label[counts], prediction[counts], pixels[counts]
    _check_classes("label", given, label, pixels, num_labels, ignore_index)
    _check_classes("predicted", prediction, prediction, pixels, num_labels, ignore_index)
    matrix = np.zeros((num_labels, num_labels + 1), np.int64)
    is_class = (prediction >= 0) & (prediction < num_labels)
    np.add.at(matrix, (label, np.where(is_class, prediction, num_labels)), pixels)
    return matrix


def iou_scores(matrix, nan_to_num=None):
    """Confusion matrix, label class by predicted class, with or without further columns -> scores as of `compute`."""
    hit, label_area = matrix.diagonal(), matrix.sum(axis=1)
    predicted_area = matrix[:, : len(matrix)].sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: nothing to score
        iou, accuracy = hit / (label_area + predicted_area - hit), hit / label_area
        scores = {
            "mean_iou": np.nansum(iou) / np.sum(~np.isnan(iou)),
            "mean_accuracy": np.nansum(accuracy) / np.sum(~np.isnan(accuracy)),
            "overall_accuracy": hit.sum() / label_area.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
    if nan_to_num is not None:
        scores = {name: np.nan_to_num(score, nan=nan_to_num) for name, score in scores.items()}
    return scores


def _score(histogram, num_labels, ignore_index, nan_to_num=None, label_map=None, reduce_labels=False):
    if not len(histogram):
        raise ValueError("nothing to score: no pixels have been added")
    return iou_scores(confusion_matrix(histogram, num_labels, ignore_index, label_map, reduce_labels), nan_to_num)
