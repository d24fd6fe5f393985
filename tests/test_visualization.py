import numpy as np
import PIL.Image

from twins_hf.visualization import comparison, overlay, palette


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
