import colorsys

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors

from twins_hf.data.transforms import (
    PhotometricDistortion,
    RandomClassLimitedCrop,
    RandomFittedResize,
    SegmentationTrainTransform,
)


def example(height=60, width=90, seed=0):
    rng = np.random.default_rng(seed)
    image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image, rng.integers(0, 4, (height, width))


@pytest.mark.parametrize("size", [(60, 90), (20, 30), (200, 20)])
def test_what_comes_out_has_the_crops_size_and_types(size):
    transform = SegmentationTrainTransform(crop_size=(48, 64), size={"shortest_edge": 48, "longest_edge": 192})
    torch.manual_seed(0)
    for _ in range(10):
        pixel_values, labels = transform(*example(*size))
        assert pixel_values.shape == (3, 48, 64) and pixel_values.dtype == torch.float32
        assert labels.shape == (48, 64) and labels.dtype == torch.int64
        is_padding = labels == 255
        assert (pixel_values[:, is_padding] == 0).all()


def test_the_same_seed_draws_the_same_crop_and_another_seed_another():
    transform = SegmentationTrainTransform(crop_size=(48, 48), size={"shortest_edge": 48, "longest_edge": 192})
    crops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        crops.append(transform(*example()))
    assert all(torch.equal(a, b) for a, b in zip(crops[0], crops[1], strict=True))
    assert not torch.equal(crops[0][0], crops[2][0])


def test_without_any_randomness_the_image_is_only_normalised():
    image, labels = example(48, 48)
    transform = SegmentationTrainTransform(
        crop_size=(48, 48),
        size={"shortest_edge": 48, "longest_edge": 192},
        ratio_range=(1.0, 1.0),
        flip_probability=0.0,
        photometric_distortion=False,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    pixel_values, found = transform(image, labels)
    np.testing.assert_allclose(pixel_values.permute(1, 2, 0).numpy() * 255, np.asarray(image), atol=1e-4)
    np.testing.assert_array_equal(found, labels)


def test_image_and_labels_go_through_the_same_geometry():
    labels = np.random.default_rng(0).integers(0, 4, (10, 15)).repeat(8, 0).repeat(8, 1)
    image = PIL.Image.fromarray(np.repeat((labels * 60).astype(np.uint8)[..., None], 3, axis=2))
    transform = SegmentationTrainTransform(
        crop_size=(64, 64),
        size={"shortest_edge": 80, "longest_edge": 320},
        photometric_distortion=False,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    torch.manual_seed(0)
    for _ in range(20):
        pixel_values, found = transform(image, labels)
        is_real = found != 255
        matches = (pixel_values[0] * 255 / 60).round() == found
        assert matches[is_real].float().mean() > 0.8  # bilinear edges are between classes


def test_scales_are_uniform_and_keep_the_ratio():
    resize = RandomFittedResize({"shortest_edge": 512, "longest_edge": 2048}, (0.5, 2.0))
    image = tv_tensors.Image(torch.zeros(3, 600, 800, dtype=torch.uint8))
    torch.manual_seed(0)
    sizes = np.array([resize.make_params([image])["size"] for _ in range(4000)])
    assert sizes[:, 0].min() >= 256 and sizes[:, 0].max() <= 1024
    np.testing.assert_allclose(np.quantile(sizes[:, 0], [0.25, 0.5, 0.75]), [448, 640, 832], rtol=0.03)
    assert np.abs(sizes[:, 1] - sizes[:, 0] * 4 / 3).max() <= 1


def test_crops_are_drawn_evenly_over_the_image():
    crop = RandomClassLimitedCrop((4, 4))
    torch.manual_seed(0)
    boxes = np.array([crop.draw_box((6, 9)) for _ in range(6000)])
    assert (np.bincount(boxes[:, 0]) / 6000 == pytest.approx([1 / 3] * 3, abs=0.03)) and boxes[:, 0].max() == 2
    assert np.bincount(boxes[:, 1]) / 6000 == pytest.approx([1 / 6] * 6, abs=0.03)
    assert (boxes[:, 2:] == 4).all()
    assert crop.draw_box((3, 9))[2:] == (3, 4)


@pytest.mark.parametrize(
    ("labels", "is_varied"),
    [
        ([0, 0, 0, 0], False),
        ([0, 0, 1, 1], True),
        ([0, 0, 0, 1], False),  # three quarters are too many
        ([0, 0, 0, 1, 1], True),
        ([0, 255, 255, 255], False),
        ([0, 1, 255, 255, 255, 255, 255], True),  # shares are of the labelled pixels
        ([255, 255], False),
    ],
)
def test_a_crop_needs_two_classes_of_which_none_fills_three_quarters(labels, is_varied):
    assert RandomClassLimitedCrop((1, 1)).is_varied(torch.tensor([labels])) == is_varied


def test_a_crop_is_drawn_again_at_most_ten_times():
    crop = RandomClassLimitedCrop((2, 2))
    drawn = []
    crop.draw_box = lambda size: drawn.append(size) or (0, 0, 2, 2)
    crop.make_params([tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.int64))])
    assert len(drawn) == 11
    drawn.clear()
    crop.make_params([tv_tensors.Mask(torch.eye(8, dtype=torch.int64))])
    assert len(drawn) == 1


def test_each_distortion_has_probability_one_half_and_its_range():
    distortion = PhotometricDistortion()
    torch.manual_seed(0)
    drawn = [distortion.make_params([]) for _ in range(4000)]
    for name, neutral, low, high in [
        ("brightness", 0.0, -32, 32),
        ("contrast", 1.0, 0.5, 1.5),
        ("saturation", 1.0, 0.5, 1.5),
        ("hue", 0.0, -18 / 180, 17 / 180),
    ]:
        values = np.array([params[name] for params in drawn])
        applied = values[values != neutral]
        assert len(applied) / 4000 == pytest.approx(0.5, abs=0.04)
        assert low <= applied.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < applied.max() <= high
        assert applied.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    assert np.mean([params["contrast_first"] for params in drawn]) == pytest.approx(0.5, abs=0.04)


def distort(image, **params):
    neutral = {"brightness": 0.0, "contrast": 1.0, "contrast_first": True, "saturation": 1.0, "hue": 0.0}
    return PhotometricDistortion().transform(tv_tensors.Image(image), {**neutral, **params})


def test_brightness_is_added_and_contrast_multiplied_within_0_and_255():
    image = torch.tensor([0, 100, 250], dtype=torch.uint8).view(3, 1, 1)
    assert distort(image, brightness=20.0).flatten().tolist() == [20, 120, 255]
    assert distort(image, brightness=-20.0).flatten().tolist() == [0, 80, 230]
    assert distort(image, contrast=1.5).flatten().tolist() == [0, 150, 255]
    assert distort(image, brightness=20.0, contrast=0.5).flatten().tolist() == [10, 60, 127]


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, 0.0), (1.5, 0.0), (1.0, 0.05), (1.0, -0.1), (1.3, 0.08)])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = distort(image, saturation=saturation, hue=hue)
    for pixel, ours in zip(image.flatten(1).T.tolist(), found.flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        expected = colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v)
        assert np.abs(np.array(expected) * 255 - ours).max() <= 1.6


def test_labels_keep_their_values_under_distortion():
    mask = tv_tensors.Mask(torch.arange(12).view(3, 4))
    assert torch.equal(
        PhotometricDistortion()(tv_tensors.Image(torch.zeros(3, 3, 4, dtype=torch.uint8)), mask)[1], mask
    )
