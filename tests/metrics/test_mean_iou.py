"""The streaming `mean_iou` against its definition, against the Hub's algorithm, and against misuse."""

import os
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

import twins_hf.metrics

KEYS = {"mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou", "per_category_accuracy"}
NUM_LABELS = 6
SETTINGS = {"num_labels": NUM_LABELS, "ignore_index": 255}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = Path(twins_hf.metrics.__file__).parent / "mean_iou"
    return evaluate.load(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def metric(loaded):
    loaded.histogram = np.zeros((0, 3), np.int64)
    return loaded


def random_maps(seed=0, low=0, high=NUM_LABELS, ignore=255, absent=4, dtype=np.int64):
    """Predictions and labels of four sizes: half of the pixels right, some labels and some predictions `ignore`."""
    rng = np.random.default_rng(seed)
    present = [value for value in range(low, high) if value != absent]
    predictions, labels = [], []
    for shape in [(7, 9), (12, 5), (1, 30), (16, 16)]:
        label = rng.choice(present, shape)
        prediction = np.where(rng.random(shape) < 0.5, label, rng.choice(present, shape))
        labels.append(np.where(rng.random(shape) < 0.1, ignore, label).astype(dtype))
        predictions.append(np.where(rng.random(shape) < 0.1, ignore, prediction).astype(dtype))
    return predictions, labels


def textbook(predictions, labels, num_labels, ignore_index):
    """IoU and accuracy of every class by counting one pixel at a time; None for a class that does not occur."""
    pixels = [
        (int(p), int(t))
        for prediction, label in zip(predictions, labels, strict=True)
        for p, t in zip(prediction.flat, label.flat, strict=True)
        if t != ignore_index
    ]
    iou, accuracy = [], []
    for c in range(num_labels):
        both = sum(p == c and t == c for p, t in pixels)
        either = sum(p == c or t == c for p, t in pixels)
        labelled = sum(t == c for _, t in pixels)
        iou.append(both / either if either else None)
        accuracy.append(both / labelled if labelled else None)
    right = sum(p == t for p, t in pixels) / len(pixels)
    return iou, accuracy, right


def hub(predictions, labels, num_labels, ignore_index, nan_to_num=None, label_map=None, reduce_labels=False):
    """The Hub's algorithm: whole maps relabelled in place, then three histograms an image, summed."""
    areas = {"both": np.zeros(num_labels), "predicted": np.zeros(num_labels), "labelled": np.zeros(num_labels)}
    for prediction, label in zip(predictions, labels, strict=True):
        label = np.array(label)
        if label_map is not None:
            for before, after in label_map.items():
                label[label == before] = after
        if reduce_labels:
            label[label == 0] = 255
            label -= 1
            label[label == 254] = 255
        prediction, label = np.asarray(prediction)[label != ignore_index], label[label != ignore_index]
        for name, values in [("both", label[label == prediction]), ("predicted", prediction), ("labelled", label)]:
            areas[name] += np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0]
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        iou = areas["both"] / (areas["predicted"] + areas["labelled"] - areas["both"])
        accuracy = areas["both"] / areas["labelled"]
        scores = {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": areas["both"].sum() / areas["labelled"].sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
    if nan_to_num is not None:
        scores = {name: np.nan_to_num(score, nan=nan_to_num) for name, score in scores.items()}
    return scores


def assert_same_scores(scores, expected):
    assert scores.keys() == KEYS
    for name in KEYS:
        np.testing.assert_allclose(scores[name], expected[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_definition(metric, seed):
    predictions, labels = random_maps(seed)
    iou, accuracy, right = textbook(predictions, labels, **SETTINGS)
    scores = metric.compute(predictions=predictions, references=labels, **SETTINGS)
    assert iou[4] is None and np.isnan(scores["per_category_iou"][4])
    seen = [value for value in iou if value is not None]
    assert scores["mean_iou"] == pytest.approx(sum(seen) / len(seen), abs=1e-12)
    seen = [value for value in accuracy if value is not None]
    assert scores["mean_accuracy"] == pytest.approx(sum(seen) / len(seen), abs=1e-12)
    assert scores["overall_accuracy"] == pytest.approx(right, abs=1e-12)
    np.testing.assert_allclose(scores["per_category_iou"], np.array(iou, float), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores["per_category_accuracy"], np.array(accuracy, float), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "maps, settings",
    [
        ({}, {}),
        ({"dtype": np.uint8}, {}),
        ({}, {"nan_to_num": 0}),
        ({}, {"nan_to_num": -1.5}),
        ({"ignore": -100}, {"ignore_index": -100}),
        ({"ignore": -1}, {"ignore_index": -1}),
        ({"ignore": 65535, "dtype": np.uint16}, {"ignore_index": 65535}),
        ({"ignore": 0}, {"ignore_index": 0}),
        ({"high": 7, "ignore": 0}, {"reduce_labels": True, "num_labels": 7}),
        ({"high": 7, "ignore": 0, "dtype": np.uint8}, {"reduce_labels": True, "num_labels": 7}),
        ({"low": 1, "high": 7}, {"reduce_labels": True, "num_labels": 7}),
        ({"high": 300, "ignore": 400}, {"num_labels": 300, "ignore_index": 400}),
        ({}, {"label_map": {1: 2, 5: 255}}),
        ({}, {"label_map": {0: 1, 1: 0}}),
        ({}, {"label_map": {0: 1, 1: 2, 2: 3}}),
        ({}, {"label_map": {5: 0, 255: 1}, "reduce_labels": True}),
    ],
)
def test_scores_are_those_of_the_hub(metric, maps, settings):
    predictions, labels = random_maps(**maps)
    settings = SETTINGS | settings
    metric.add_batch(predictions=predictions, references=labels)
    assert_same_scores(metric.compute(**settings), hub(predictions, labels, **settings))


def test_predicting_the_ignored_value_misses_the_label_and_counts_for_no_class(metric):
    scores = metric.compute(predictions=[[[0, 255, 1, 1]]], references=[[[0, 0, 1, 255]]], **SETTINGS)
    np.testing.assert_array_equal(scores["per_category_iou"][:2], [0.5, 1.0])
    assert scores["overall_accuracy"] == 2 / 3


def test_predictions_on_ignored_pixels_never_matter(metric):
    predictions, labels = random_maps()
    expected = metric.compute(predictions=predictions, references=labels, **SETTINGS)
    wild = [np.where(label == 255, 2**20, prediction) for prediction, label in zip(predictions, labels, strict=True)]
    assert_same_scores(metric.compute(predictions=wild, references=labels, **SETTINGS), expected)


def test_one_by_one_is_the_same_as_in_batches(metric):
    predictions, labels = random_maps()
    for prediction, label in zip(predictions, labels, strict=True):
        metric.add(prediction=prediction, reference=label)
    one_by_one = metric.histogram
    in_batch = metric.compute(**SETTINGS)
    metric.add_batch(predictions=predictions[:3], references=labels[:3])
    metric.add_batch(predictions=predictions[3:], references=labels[3:])
    np.testing.assert_array_equal(metric.histogram, one_by_one)
    assert_same_scores(metric.compute(**SETTINGS), in_batch)


def test_compute_adds_its_maps_to_those_added_before(metric):
    predictions, labels = random_maps()
    metric.add_batch(predictions=predictions[:1], references=labels[:1])
    scores = metric.compute(predictions=predictions[1:], references=labels[1:], **SETTINGS)
    assert_same_scores(scores, hub(predictions, labels, **SETTINGS))


@pytest.mark.parametrize("ignore", [255, -100])
def test_parts_of_a_set_add_up_by_concatenating_padded_histograms(metric, ignore):
    predictions, labels = random_maps(ignore=ignore)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        metric.add_batch(predictions=predictions[part], references=labels[part])
        parts.append(np.pad(metric.histogram, ((0, 7), (0, 0))))
        metric.histogram = np.zeros((0, 3), np.int64)
    metric.histogram = torch.from_numpy(np.concatenate(parts))
    settings = SETTINGS | {"ignore_index": ignore}
    assert_same_scores(metric.compute(**settings), hub(predictions, labels, **settings))


def test_histogram_counts_each_pair_of_values_once_in_order(metric):
    metric.add(prediction=[[1, 1, 0]], reference=[[1, 1, -100]])
    metric.add(prediction=[[1, 300, 0]], reference=[[1, 0, 0]])
    assert metric.histogram.dtype == np.int64
    assert metric.histogram.tolist() == [[-100, 0, 1], [0, 0, 1], [0, 300, 1], [1, 1, 3]]


@pytest.mark.parametrize(
    "convert",
    [
        lambda maps: torch.tensor(np.stack(maps)),
        lambda maps: [torch.tensor(m) for m in maps],
        lambda maps: tuple(m.astype(np.int8) for m in maps),
        lambda maps: np.stack(maps).astype(np.uint64),
        lambda maps: [m.astype(np.int32).T.copy().T for m in maps],
        lambda maps: [Image.fromarray(m.astype(np.uint8)) for m in maps],
        lambda maps: [m.tolist() for m in maps],
        lambda maps: np.stack(maps).tolist(),
    ],
    ids=["tensor", "tensors", "tuple int8", "array uint64", "strided", "images", "list of lists", "nested list"],
)
def test_every_kind_of_map_counts_the_same(metric, convert):
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 6, (3, 4, 5)), rng.integers(0, 6, (3, 4, 5))
    metric.add_batch(predictions=convert(list(predictions)), references=labels)
    metric.add_batch(predictions=predictions, references=convert(list(labels)))
    twice = np.concatenate([predictions, predictions]), np.concatenate([labels, labels])
    assert_same_scores(metric.compute(**SETTINGS), hub(*twice, **SETTINGS))


def test_a_single_map_may_stand_for_a_batch_and_may_be_boolean(metric):
    label = np.array([[True, False], [True, True]])
    metric.add_batch(predictions=~label, references=Image.fromarray(label))
    metric.add_batch(predictions=label, references=torch.tensor(label))
    assert metric.histogram.tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 3], [1, 1, 3]]


def test_classes_that_do_not_occur_are_nan_without_a_warning(metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metric.compute(predictions=[[[1, 2]]], references=[[[255, 255]]], **SETTINGS)
        assert all(np.isnan(scores[name]).all() for name in KEYS)
        scores = metric.compute(predictions=[[[1, 2]]], references=[[[255, 255]]], nan_to_num=0, **SETTINGS)
        assert all((scores[name] == 0).all() for name in KEYS)


def test_compute_forgets_what_it_scored(metric):
    metric.compute(predictions=[[[1]]], references=[[[1]]], **SETTINGS)
    assert metric.histogram.shape == (0, 3)
    with pytest.raises(ValueError, match="nothing to score"):
        metric.compute(**SETTINGS)


@pytest.mark.parametrize(
    "predictions, references, error, message",
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), ValueError, r"\(2, 3\).*\(3, 2\)"),
        (np.zeros((2, 3, 3), int), np.zeros((3, 3, 3), int), ValueError, "2 predictions .* 3 references"),
        ([[[0]], [[0, 1]]], [[[0]], [[0], [1]]], ValueError, r"predictions\[1\].*\(1, 2\).*\(2, 1\)"),
        (np.zeros((1, 1, 2, 2), int), np.zeros((1, 2, 2), int), ValueError, r"predictions\[0\] has \(1, 2, 2\)"),
        ([[[0.5]]], [[[0]]], TypeError, "predictions.*float64"),
        ([[[0]]], torch.zeros(1, 1, 1), TypeError, "references.*float32"),
        ([[[0]], [[0]]], [[[0]], [[2**40]]], ValueError, r"references\[1\].*32 bits.*1099511627776"),
        ([[[0]]], None, ValueError, "together"),
    ],
)
def test_maps_that_do_not_match_are_refused_and_change_nothing(metric, predictions, references, error, message):
    metric.add(prediction=[[1, 2]], reference=[[1, 1]])
    before = metric.histogram
    with pytest.raises(error, match=message):
        metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(error, match=message):
        metric.compute(predictions=predictions, references=references, **SETTINGS)
    np.testing.assert_array_equal(metric.histogram, before)


@pytest.mark.parametrize(
    "prediction, reference, settings, message",
    [
        ([[0, 0]], [[6, 6]], {}, r"label value 6 on 2 pixels .*0\.\.5 with num_labels=6.* ignore_index=255"),
        ([[0, 0]], [[-1, 0]], {}, "label value -1 on 1 pixels"),
        ([[0, 0]], [[8, 0]], {"reduce_labels": True}, r"label value 8 \(mapped to 7\) on 1 pixels"),
        ([[0, 0]], [[0, 1]], {"reduce_labels": True, "ignore_index": 9}, r"label value 0 \(mapped to 255\)"),
        ([[0, 0]], [[2, 0]], {"label_map": {2: 7}}, r"label value 2 \(mapped to 7\) on 1 pixels"),
        ([[7, 7, 0]], [[0, 1, 1]], {}, "predicted value 7 on 2 pixels .*num_labels=6"),
        ([[-1, 0]], [[0, 1]], {}, "predicted value -1 on 1 pixels"),
    ],
)
def test_values_that_are_no_class_are_refused_and_change_nothing(metric, prediction, reference, settings, message):
    metric.add(prediction=[[1, 2]], reference=[[1, 1]])
    before = metric.histogram
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[prediction], references=[reference], **SETTINGS | settings)
    np.testing.assert_array_equal(metric.histogram, before)
    assert metric.compute(**SETTINGS)["overall_accuracy"] == 0.5


@pytest.mark.parametrize("rows", [np.zeros((2, 2), int), np.zeros(3, int), np.zeros((1, 3)), [[0, 0, -1]]])
def test_a_malformed_histogram_is_refused_and_changes_nothing(metric, rows):
    metric.add(prediction=[[1]], reference=[[1]])
    with pytest.raises(ValueError, match="a histogram is"):
        metric.histogram = rows
    assert metric.histogram.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("ignore", [255, -100])
def test_what_is_kept_does_not_grow_with_the_set_and_nothing_is_written(metric, ignore):
    predictions, labels = random_maps(ignore=ignore)
    metric.add_batch(predictions=predictions, references=labels)
    pairs, kept = len(metric.histogram), metric._table.nbytes + metric._rows.nbytes
    for _ in range(20):
        metric.add_batch(predictions=predictions, references=labels)
    assert len(metric.histogram) == pairs
    assert metric._table.nbytes + metric._rows.nbytes == kept
    metric.compute(**SETTINGS | {"ignore_index": ignore})
    assert os.listdir(metric.data_dir) == []


def test_scores_of_given_maps_alone_leave_the_state_out(metric):
    predictions, labels = random_maps()
    metric.add(prediction=[[1]], reference=[[1]])
    scores = metric._compute(predictions=predictions, references=labels, **SETTINGS)
    assert_same_scores(scores, hub(predictions, labels, **SETTINGS))
    assert metric.histogram.tolist() == [[1, 1, 1]]


def test_loading_for_one_of_several_processes_gives_a_working_metric(tmp_path):
    folder = Path(twins_hf.metrics.__file__).parent / "mean_iou"
    metric = evaluate.load(str(folder), num_process=2, process_id=1, cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[[1]]], references=[[[1]]], **SETTINGS)["mean_iou"] == 1.0
