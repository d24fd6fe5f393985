"""The generated set: repeatable, balanced, unlabelled in places, and not to be told by colour."""

import numpy as np
import pytest

from twins_hf.data import scenes
from twins_hf.data.scenes import SCENE_CLASSES, draw_scene, load_scenes

NUM_CLASSES = len(SCENE_CLASSES)


def as_arrays(numbers):
    return [tuple(np.asarray(picture) for picture in draw_scene(0, number)) for number in numbers]


@pytest.fixture(scope="module")
def training_scenes():
    return as_arrays(range(0, 120, 2))


@pytest.fixture(scope="module")
def validation_scenes():
    return as_arrays(range(1, 40, 2))


@pytest.fixture(scope="module")
def histograms(training_scenes):
    """Pixels by mask value for each scene, (scenes, classes + 1)."""
    return np.array([np.bincount(mask.ravel(), minlength=NUM_CLASSES + 1) for _, mask in training_scenes])


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("scenes")
    return cache_dir, load_scenes(num_train=3, num_validation=2, cache_dir=cache_dir)


def test_class_names_are_those_of_the_ade20k_benchmark():
    assert len(set(SCENE_CLASSES)) == NUM_CLASSES == 11
    assert {"building, edifice", "windowpane, window", "car, auto, automobile, machine, motorcar"} <= set(
        SCENE_CLASSES
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_scene_is_the_same_each_time_it_is_drawn(index):
    for first, second in zip(draw_scene(3, index), draw_scene(3, index), strict=True):
        assert first.size == second.size and first.tobytes() == second.tobytes()


def test_seed_and_index_each_change_the_scene():
    pictures = [draw_scene(*key)[0] for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_masks_fit_their_images_and_hold_nothing_but_the_classes_and_zero(training_scenes):
    for image, mask in training_scenes:
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (*mask.shape, 3)
        assert mask.max() <= NUM_CLASSES


def test_sizes_stay_within_a_tenth_of_the_one_asked_for_and_differ():
    sizes = {draw_scene(0, index, image_size=(64, 96))[0].size for index in range(20)}
    assert len(sizes) > 10
    for width, height in sizes:
        assert 57 <= min(width, height) <= 71 and 86 <= max(width, height) <= 106


def test_edges_in_the_mask_are_edges_in_the_image():
    """Shifting the masks by a pixel, any way, makes their classes less uniform in colour."""

    def spread(image, mask, shift):
        pixels, labels = image[8:-8, 8:-8], np.roll(mask, shift, (0, 1))[8:-8, 8:-8]
        return sum(pixels[labels == label].var(0).sum() * (labels == label).sum() for label in np.unique(labels))

    shifts = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    rooms = [scene for scene in as_arrays(range(40)) if scenes.FLOOR in scene[1]]
    totals = {shift: sum(spread(*room, shift) for room in rooms) for shift in shifts}
    assert min(totals, key=totals.get) == (0, 0)


def test_every_class_has_a_hundredth_of_the_pixels_and_is_in_a_tenth_of_the_scenes(histograms):
    labelled = histograms[:, 1:]
    assert (labelled.sum(0) / labelled.sum() >= 0.01).all()
    assert ((labelled > 0).mean(0) >= 0.1).all()


def test_between_one_and_eight_hundredths_of_the_pixels_are_unlabelled(histograms):
    assert 0.01 <= histograms[:, 0].sum() / histograms.sum() <= 0.08


def test_colour_alone_does_not_tell_the_classes_apart(training_scenes, validation_scenes):
    """A classifier of pixels by the nearest mean colour stays below a mean IoU of 0.45."""
    labels = range(1, NUM_CLASSES + 1)
    means = [np.concatenate([image[mask == label] for image, mask in training_scenes]).mean(0) for label in labels]
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), dtype=np.int64)
    for image, mask in validation_scenes:
        nearest = np.argmin([((image - mean) ** 2).sum(-1) for mean in means], axis=0)
        np.add.at(confusion, (mask[mask > 0] - 1, nearest[mask > 0]), 1)
    intersection = confusion.diagonal()
    assert (intersection / (confusion.sum(0) + confusion.sum(1) - intersection)).mean() < 0.45


def test_training_and_validation_scenes_differ(small_set):
    _, splits = small_set
    pictures = [row["image"].tobytes() for split in splits.values() for row in split]
    assert len(set(pictures)) == len(pictures) == 5


def test_rows_are_the_drawn_scenes_under_their_file_names(small_set):
    _, splits = small_set
    assert {split: rows["file_name"] for split, rows in splits.items()} == {
        "train": ["scene_train_00000.png", "scene_train_00001.png", "scene_train_00002.png"],
        "validation": ["scene_validation_00000.png", "scene_validation_00001.png"],
    }
    image, label = draw_scene(0, 2)
    assert splits["train"][1]["image"].tobytes() == image.tobytes()
    assert splits["train"][1]["label"].tobytes() == label.tobytes()
    assert splits["train"][1]["label"].mode == "L"


def test_the_second_load_reads_the_cache(small_set, monkeypatch):
    cache_dir, first = small_set
    written = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*.arrow")}

    def refuse(*_):
        raise AssertionError("a scene was drawn again")

    monkeypatch.setattr(scenes, "draw_scene", refuse)
    second = load_scenes(num_train=3, num_validation=2, cache_dir=cache_dir)
    assert second.cache_files == first.cache_files
    assert {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*.arrow")} == written
    for split in first:
        assert [row["image"].tobytes() for row in second[split]] == [row["image"].tobytes() for row in first[split]]


def test_changed_drawing_code_is_not_answered_from_the_cache(small_set, monkeypatch, tmp_path):
    cache_dir, first = small_set
    changed = tmp_path / "scenes.py"
    changed.write_text("another drawing")
    monkeypatch.setattr(scenes, "__file__", str(changed))
    assert load_scenes(num_train=3, num_validation=2, cache_dir=cache_dir).cache_files != first.cache_files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train must be an integer of at least 1, got 0"),
        ({"num_validation": -2}, "num_validation must be an integer of at least 1, got -2"),
        ({"num_train": 2.5}, "num_train must be an integer of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"image_size": (192, 10)}, "width must be an integer of at least 64, got 10"),
    ],
)
def test_an_argument_out_of_range_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_scenes(**arguments)


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="index must be an integer of at least 0, got -1"):
        draw_scene(0, -1)
