import numpy as np
import PIL.Image

from twins_hf.visualization import bar_chart, comparison, confusion_picture, overlay, palette, training_curves


def test_colours_are_distinct():
    assert len({tuple(color) for color in palette(150).tolist()}) == 150


def test_an_overlay_mixes_classes_in_and_leaves_ignored_pixels():
    image = PIL.Image.new("RGB", (3, 1), (100, 100, 100))
    colors = np.array([[200, 0, 0], [0, 200, 0]], dtype=np.uint8)
    painted = overlay(image, np.array([[0, 1, 255]]), colors, opacity=0.5)
    assert np.asarray(painted).tolist() == [[[150, 50, 50], [50, 150, 50], [100, 100, 100]]]


def test_a_comparison_shows_photo_truth_prediction_and_a_legend():
    image = PIL.Image.new("RGB", (200, 100), (100, 100, 100))
    truth, prediction = np.zeros((100, 200), int), np.ones((100, 200), int)
    names = {0: "wall", 1: "building, edifice", 2: "sky"}
    picture = np.asarray(comparison(image, prediction, names, truth))
    assert picture.shape[1] > 3 * 200 and picture.shape[0] > 100
    colors = palette(3)
    for class_id, shown in ((0, True), (1, True), (2, False)):  # the legend's swatches
        assert (picture == colors[class_id]).all(-1).any() == shown
    middle = picture[picture.shape[0] // 2]
    assert [tuple(middle[x]) for x in (100, 312, 524)] == [
        (100, 100, 100),
        tuple(np.asarray(overlay(image, truth, colors))[0, 0]),
        tuple(np.asarray(overlay(image, prediction, colors))[0, 0]),
    ]
    assert comparison(image, prediction, names).width < picture.shape[1]


def test_a_bar_chart_has_the_longest_bar_on_top_and_leaves_absent_classes_out():
    picture = np.asarray(bar_chart(["wall", "sky", "tree"], [0.25, float("nan"), 0.75]))
    blue = (picture == (70, 110, 180)).all(-1)
    lengths = [int(row.sum()) for row in blue if row.any()]
    assert set(lengths) == {301, 101} and lengths[0] == 301


def test_a_confusion_matrix_is_dark_where_pixels_are():
    matrix = np.array([[8, 2, 0], [0, 0, 0], [5, 0, 5]])
    picture = np.asarray(confusion_picture(matrix[:, [0, 1, 2]], ["wall", "sky", "tree"]).convert("L"))
    cell = 22
    left = picture.shape[1] - 12 - 3 * cell
    shades = picture[left + cell // 2 :: cell, left + cell // 2 :: cell][:3, :3]
    expected = 255 * (1 - np.sqrt([[0.8, 0.2, 0], [0, 0, 0], [0.5, 0, 0.5]]))
    np.testing.assert_allclose(shades, expected, atol=1)
    without_sky = confusion_picture(np.array([[8, 0, 1], [0, 0, 0], [5, 0, 5]]), ["wall", "sky", "tree"])
    assert without_sky.width == picture.shape[1] - cell  # it neither occurs nor is predicted


def test_training_curves_have_a_panel_for_each_figure_that_was_recorded():
    history = [{"step": step, "train/loss": 4.0 - step, "train/accuracy": step / 8} for step in range(1, 4)]
    two = training_curves(history)
    three = training_curves([*history, {"step": 3, "eval/mean_iou": 0.4}])
    assert three.height == two.height * 3 // 2
    is_line = (np.asarray(two) == (70, 110, 180)).all(axis=-1)
    falling, rising = np.split(is_line, 2)
    for panel, sign in ((falling, 1), (rising, -1)):  # the loss goes down from left to right, the accuracy up
        rows, columns = np.nonzero(panel)
        assert np.corrcoef(rows, columns)[0, 1] * sign > 0.9


def test_a_figure_that_is_not_finite_leaves_a_gap():
    picture = training_curves([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("nan")}])
    assert picture.height < 300
