import numpy as np
import pytest
import torch

from twins_hf import resizing_twins
from twins_hf.resizing_twins import BilinearResize, pack_pixels, resize_bilinear, resize_bilinear_whole

SIZES = [
    ((37, 50), (16, 22)),
    ((37, 50), (55, 71)),
    ((37, 50), (37, 50)),
    ((37, 50), (37, 13)),
    ((31, 3), (7, 64)),  # one side shrinks, the other grows
    ((1, 1), (5, 4)),
    ((1, 40), (1, 17)),
    ((23, 1), (50, 3)),
    ((64, 48), (1, 1)),
    ((768, 1024), (512, 683)),
]


def random_image(size, num_channels=3):
    return np.random.default_rng(0).integers(0, 256, (num_channels, *size), dtype=np.uint8)


@pytest.fixture(params=["one band", "many bands"])
def bands(request, monkeypatch):
    if request.param == "many bands":
        monkeypatch.setattr(resizing_twins, "BAND_PIXELS", 100)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_bands_of_packed_pixels_give_the_bits_of_the_plain_form(bands, old, new):
    image = random_image(old)
    found, expected = resize_bilinear(image, new), resize_bilinear_whole(image.astype(np.int32), new)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert np.array_equal(resize_bilinear(pack_pixels(image), new), expected)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_the_plain_form_takes_any_channels_of_arrays_and_tensors(num_channels):
    image = random_image((37, 50), num_channels).astype(np.int32)
    expected = np.stack([resize_bilinear(np.stack([channel] * 3).astype(np.uint8), (16, 71))[0] for channel in image])
    assert np.array_equal(resize_bilinear_whole(image, (16, 71)), expected)
    assert np.array_equal(resize_bilinear_whole(torch.from_numpy(image), (16, 71)).numpy(), expected)


@pytest.mark.parametrize("old", [(37, 50), (20, 90), (1, 1)])
@pytest.mark.parametrize("new", [(24, 33), (80, 61)])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_box_is_what_it_cuts_from_the_whole(old, new, is_mirrored):
    image = random_image(old)
    whole = resize_bilinear_whole(image.astype(np.int32), new)
    for top, left, height, width in [(0, 0, *new), (5, 7, 11, 13), (new[0] - 1, new[1] - 1, 1, 1), (3, 0, 20, new[1])]:
        expected = whole[:, top : top + height, left : left + width][..., :: -1 if is_mirrored else 1]
        resize = BilinearResize(image, new, (top, left, height, width), is_mirrored)
        assert np.array_equal(resize.band(slice(0, height)), expected)
        assert np.array_equal(resize.band(slice(height // 2, height)), expected[:, height // 2 :])


def test_planes_of_any_memory_layout_are_resized():
    image = random_image((37, 50))
    interleaved = np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)
    for layout in (interleaved, np.asfortranarray(image)):
        assert np.array_equal(resize_bilinear(layout, (16, 22)), resize_bilinear(image, (16, 22)))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resizing_is_opencvs(old, new):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is what this test compares with, and in the test extra")
    image = random_image(old)
    expected = cv2.resize(np.ascontiguousarray(image.transpose(1, 2, 0)), new[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_bilinear(image, new).transpose(1, 2, 0), expected)
