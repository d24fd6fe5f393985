import dataclasses
import math

import evaluate
import numpy as np
import PIL.Image
import pytest
from conftest import randomize
from datasets import DatasetDict

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor
from twins_hf.data import load_segmentation_data, read_example
from twins_hf.data.loading import undecoded
from twins_hf.evaluation import MEAN_IOU, authors_mean_iou, evaluate_segmentation, per_class_table
from twins_hf.inference import segment


@pytest.fixture
def processor():
    return TwinsImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (1, 1)])
def test_a_set_scores_as_its_images_one_by_one(tiny_model, processor, image_folder, batch_size, num_workers):
    data = load_segmentation_data(str(image_folder))
    rows = undecoded(data.splits["train"])
    metric = evaluate.load(MEAN_IOU)
    for index in range(len(rows)):
        example = read_example(rows[index], index, data.do_reduce_labels)
        metric.add(prediction=segment(tiny_model, processor, [example.image])[0], reference=example.labels)
    expected = metric.compute(num_labels=3, ignore_index=255)
    found = evaluate_segmentation(tiny_model, processor, data, "train", batch_size=batch_size, num_workers=num_workers)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    matrix = found["confusion_matrix"]
    assert matrix.shape == (3, 4) and matrix.sum() == sum(
        (read_example(row, index, False).labels != 255).sum() for index, row in enumerate(rows)
    )


def test_the_first_images_are_drawn(tiny_model, processor, image_folder, tmp_path):
    data = load_segmentation_data(str(image_folder))
    (tmp_path / "overlays").mkdir()
    evaluate_segmentation(tiny_model, processor, data, "train", picture_folder=tmp_path / "overlays", num_pictures=3)
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == [f"photo_{i}.png" for i in range(3)]


def test_a_model_in_training_is_scored_in_evaluation_and_left_in_training(tiny_model, processor, image_folder):
    data = load_segmentation_data(str(image_folder))
    expected = evaluate_segmentation(tiny_model, processor, data)["per_category_iou"]
    tiny_model.train()
    before = tiny_model.decode_head.fpn_bottleneck.batch_norm.running_mean.clone()
    np.testing.assert_array_equal(evaluate_segmentation(tiny_model, processor, data)["per_category_iou"], expected)
    assert tiny_model.training
    assert (tiny_model.decode_head.fpn_bottleneck.batch_norm.running_mean == before).all()


def test_a_model_of_another_number_of_classes_is_refused(tiny_config, processor, image_folder):
    config = TwinsConfig(**{**tiny_config.to_diff_dict(), "id2label": dict(enumerate("abcd"))})
    model = randomize(TwinsForSemanticSegmentation(config))
    with pytest.raises(ValueError, match="the model has 4 classes but .*photos has 3"):
        evaluate_segmentation(model, processor, load_segmentation_data(str(image_folder)))


def test_the_table_lists_the_best_class_first_and_absent_ones_last():
    results = {"per_category_iou": [0.25, math.nan, 0.5], "per_category_accuracy": [0.5, math.nan, 0.75]}
    table = per_class_table(results, {0: "wall", 1: "sky", 2: "tree"})
    assert table.splitlines()[2:] == ["| tree | 50.00 | 75.00 |", "| wall | 25.00 | 50.00 |", "| sky | - | - |"]


PLAIN_METRIC = '''
import datasets
import evaluate
import numpy as np


class PlainMeanIoU(evaluate.Metric):
    """Keeps all maps and counts class by class, as the Hub's does."""

    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": maps, "references": maps})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, num_labels, ignore_index):
        pairs = [(np.array(p), np.array(r)) for p, r in zip(predictions, references)]
        pairs = [(p[r != ignore_index], r[r != ignore_index]) for p, r in pairs]
        hits, labels, union = (np.zeros(num_labels) for _ in range(3))
        for prediction, reference in pairs:
            for k in range(num_labels):
                hits[k] += ((prediction == k) & (reference == k)).sum()
                labels[k] += (reference == k).sum()
                union[k] += ((prediction == k) | (reference == k)).sum()
        return {
            "mean_iou": np.nanmean(hits / union),
            "mean_accuracy": np.nanmean(hits / labels),
            "overall_accuracy": hits.sum() / labels.sum(),
            "per_category_iou": hits / union,
            "per_category_accuracy": hits / labels,
        }
'''


def test_a_metric_that_keeps_all_maps_serves_as_well(tiny_model, processor, image_folder, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "plain.py").write_text(PLAIN_METRIC)
    data = load_segmentation_data(str(image_folder))
    expected = evaluate_segmentation(tiny_model, processor, data, "train")
    found = evaluate_segmentation(tiny_model, processor, data, "train", metric=str(tmp_path / "plain"))
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


def test_a_stopped_evaluation_goes_on_and_counts_no_image_twice(tiny_model, processor, image_folder, tmp_path):
    data = load_segmentation_data(str(image_folder))
    whole = evaluate_segmentation(tiny_model, processor, data, "train")
    runs = []
    hook = tiny_model.register_forward_pre_hook(lambda module, args: runs.append(len(runs)))
    with pytest.raises(KeyboardInterrupt):
        stop = tiny_model.register_forward_hook(
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if runs[2:] else None
        )
        evaluate_segmentation(tiny_model, processor, data, "train", log_folder=tmp_path / "log")
    stop.remove()
    (log,) = (tmp_path / "log").glob("*/process_0.jsonl")
    text = log.read_text()
    assert text.count("histogram") == 2
    log.write_text(text + text.splitlines()[-1][:40])  # killed while it wrote the third
    # With other settings it begins anew, beside this one.
    evaluate_segmentation(tiny_model, processor, data, "train", log_folder=tmp_path / "log", flip=True)
    runs.clear()
    resumed = evaluate_segmentation(tiny_model, processor, data, "train", log_folder=tmp_path / "log")
    assert len(runs) == 2 and not (tmp_path / "log").exists()
    np.testing.assert_array_equal(resumed["confusion_matrix"], whole["confusion_matrix"])
    hook.remove()


def test_the_worst_images_are_drawn_and_named_by_their_score(tiny_model, processor, image_folder, tmp_path):
    data = load_segmentation_data(str(image_folder))
    evaluate_segmentation(tiny_model, processor, data, "train", worst_folder=tmp_path / "worst", num_pictures=2)
    scores = {}
    for index in range(4):
        one = dataclasses.replace(data, splits=DatasetDict(train=data.splits["train"].select([index])))
        scores[f"photo_{index}"] = evaluate_segmentation(tiny_model, processor, one, "train")["mean_iou"]
    expected = sorted(f"{score:.3f}_{name}.png" for name, score in scores.items())[:2]
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == expected


@pytest.mark.parametrize("do_reduce_labels", [False, True])
def test_predictions_are_saved_in_the_values_of_the_masks(
    tiny_model, processor, image_folder, tmp_path, do_reduce_labels
):
    data = load_segmentation_data(str(image_folder))
    (expected,) = segment(tiny_model, processor, [read_example(undecoded(data.splits["train"])[0], 0, False).image])
    data.do_reduce_labels = do_reduce_labels
    evaluate_segmentation(tiny_model, processor, data, "train", prediction_folder=tmp_path / "predictions")
    assert len(list((tmp_path / "predictions").iterdir())) == 4
    saved = PIL.Image.open(tmp_path / "predictions" / "photo_0.png")
    assert saved.mode == "L"
    np.testing.assert_array_equal(np.asarray(saved), expected.numpy() + do_reduce_labels)


def test_label_maps_that_would_replace_each_other_are_refused(tiny_model, processor, image_folder, tmp_path):
    for kind in ("images", "annotations"):
        (image_folder / kind / "training" / "more").mkdir()
        (image_folder / kind / "training" / "photo_1.png").rename(
            image_folder / kind / "training" / "more" / "photo_0.png"
        )
    data = load_segmentation_data(str(image_folder))
    with pytest.raises(ValueError, match="2 images are called photo_0"):
        evaluate_segmentation(tiny_model, processor, data, "train", prediction_folder=tmp_path / "predictions")


def test_the_authors_mean_takes_six_classes_into_those_before():
    rng = np.random.default_rng(0)
    labels, predictions = (rng.integers(0, 150, 50_000) for _ in range(2))
    predictions = np.where(rng.random(50_000) < 0.5, labels, predictions)
    labels, predictions = labels[labels != 7], predictions[labels != 7]
    predictions[predictions == 7] = 8
    matrix = np.zeros((150, 151), np.int64)
    np.add.at(matrix, (labels, predictions), 1)

    def count(values):  # their bins, one pixel at a time
        counts = np.zeros(150)
        for value in values:
            counts[value - 1 if value in (49, 63, 89, 98, 117, 126) else value] += 1
        return counts

    hit, predicted, labelled = count(labels[labels == predictions]), count(predictions), count(labels)
    with np.errstate(invalid="ignore"):
        iou = hit / (predicted + labelled - hit)
    assert np.isnan(iou).sum() == 7  # those six, and class 7, which occurs nowhere
    assert authors_mean_iou(matrix) == pytest.approx(np.nanmean(iou), abs=1e-12)
