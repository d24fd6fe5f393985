import colorsys

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from twins_hf.data.transforms import (
    ClassLimitedCrop,
    ColorShift,
    CropBox,
    PhotometricDistortion,
    SegmentationTrainTransform,
    crop_labels,
)
from twins_hf.resizing_twins import resize_bilinear_whole


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


def scale_levels(image, factor, offset):
    return (image * factor + offset).clamp(0, 255).to(torch.uint8)


def saturate(image, factor):
    """Every channel's distance from the largest times the factor, until the smallest channel is 0."""
    image = image.float()
    largest, smallest = image.amax(0), image.amin(0)
    factor = (largest / (largest - smallest).clamp(min=1e-6)).clamp(max=factor)
    return (largest - (largest - image) * factor).round().clamp(0, 255).to(torch.uint8)


def compose_plainly(image, labels, augmentation, crop_size):
    """The protocol's steps one by one, each on the whole image of 8 bits."""
    box, color = augmentation.box, augmentation.color
    image = resize_bilinear_whole(tvF.pil_to_tensor(image).int(), augmentation.size).to(torch.uint8)
    labels = tvF.resize(tv_tensors.Mask(torch.from_numpy(labels)), augmentation.size).as_subclass(torch.Tensor)
    image, labels = tvF.crop(image, *box), tvF.crop(labels, *box)
    if augmentation.is_mirrored:
        image, labels = image.flip(-1), labels.flip(-1)
    image = scale_levels(image, 1.0, color.brightness)
    if color.contrast_first:
        image = scale_levels(image, color.contrast, 0.0)
    if color.saturation != 1.0:
        image = saturate(image, color.saturation)
    if color.hue != 0.0:
        image = tvF.adjust_hue(image, color.hue)
    if not color.contrast_first:
        image = scale_levels(image, color.contrast, 0.0)
    image = tvF.normalize(tvF.to_dtype(image, torch.float32, scale=True), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    padding = (0, crop_size[1] - box.width, 0, crop_size[0] - box.height)
    return nn.functional.pad(image, padding), nn.functional.pad(labels, padding, value=255)


def photograph(height, width, seed):
    """Smooth colours under noise, with grey, black and white patches; labels in patches too."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC)) + rng.normal(
        0, 6, (height, width, 3)
    )
    image = image.clip(0, 255).astype(np.uint8)
    for level in (0, 77, 255):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        image[top : top + 8, left : left + 8] = level
    labels = rng.integers(0, 5, (height // 16 + 1, width // 16 + 1)).repeat(16, 0).repeat(16, 1)[:height, :width]
    labels[rng.random((height, width)) < 0.1] = 255
    return PIL.Image.fromarray(image), labels


@pytest.mark.parametrize("crop_size", [(64, 48), (300, 200)])
def test_the_crop_is_bit_for_bit_that_of_the_plain_composition(crop_size):
    transform = SegmentationTrainTransform(crop_size, {"shortest_edge": 96, "longest_edge": 384})
    torch.manual_seed(0)
    for seed in range(60):
        image, labels = photograph(*np.random.default_rng(seed).integers(20, 200, 2), seed)
        state = torch.get_rng_state()
        augmentation = transform.draw(labels)
        expected = compose_plainly(image, labels, augmentation, crop_size)
        torch.set_rng_state(state)
        for ours, plain in zip(transform(image, labels), expected, strict=True):
            assert torch.equal(ours, plain), augmentation


def test_every_colour_turns_as_torchvision_turns_it():
    """All combinations of 18 levels in each channel, for all hues that are drawn."""
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(3, len(levels), -1)
    for step in [*range(-18, 0), *range(1, 18)]:
        ours = image.numpy().astype(np.float32)
        ColorShift(hue=step / 180)(ours)
        assert np.array_equal(ours, tvF.adjust_hue(image, step / 180).numpy()), step


@pytest.mark.parametrize(("old", "new"), [(8, 920), (8, 503), (683, 341), (360, 720), (31, 31), (5, 3)])
def test_labels_are_resized_as_torchs_nearest(old, new):
    labels = np.arange(old * 2).reshape(2, old)
    found = crop_labels(labels, (2, new), CropBox(0, 0, 2, new))
    assert torch.equal(torch.from_numpy(found), tvF.resize(tv_tensors.Mask(torch.from_numpy(labels)), (2, new)))


def test_arrays_and_label_types_change_nothing():
    image, labels = photograph(70, 90, 0)
    transform = SegmentationTrainTransform((48, 48), {"shortest_edge": 64, "longest_edge": 256})
    results = []
    for given in ((image, labels), (np.asarray(image).transpose(2, 0, 1), labels.astype(np.uint8))):
        torch.manual_seed(3)
        results.append(transform(*given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(result[1].dtype == torch.int64 for result in results)


@pytest.fixture(scope="module")
def drawn_geometry():
    """
    Scale, left end, top and mirroring of 1500 crops of an image whose red grows to the right and green downwards, read
    from the crops themselves.
    """
    ramp = np.arange(64, dtype=np.uint8) * 4
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)])
    labels = np.indices((64, 64)).sum(0) // 2 % 2
    transform = SegmentationTrainTransform(
        (24, 24), {"shortest_edge": 64, "longest_edge": 256}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    transform.distortion = None
    torch.manual_seed(0)
    rows = []
    for _ in range(1500):
        red, green, _ = transform(image, labels)[0] * 255 / 4  # columns and rows of the image
        slope = (red[0, 20] - red[0, 4]).item() / 16
        scale = 1 / abs(slope)
        first = min(red[0, 4].item(), red[0, 19].item())  # 4.5 pixels from the end; the ends themselves are clamped
        left, top = ((start + 0.5) * scale - 4.5 for start in (first, green[4, 0].item()))
        room = int(64 * scale + 0.5) - 24
        rows.append((scale, left / room, top / room, slope < 0))
    return np.array(rows).T


def test_scales_of_crops_are_uniform(drawn_geometry):
    scales = drawn_geometry[0]
    assert 0.48 < scales.min() < 0.53 and 1.95 < scales.max() < 2.05
    np.testing.assert_allclose(np.quantile(scales, [0.25, 0.5, 0.75]), [0.875, 1.25, 1.625], atol=0.06)


def test_crops_lie_evenly_over_the_image_and_half_are_mirrored(drawn_geometry):
    scales, left, top, mirrored = drawn_geometry
    for position in (left, top):
        assert -0.1 < position.min() < 0.03 and 0.97 < position.max() < 1.1
        np.testing.assert_allclose(np.quantile(position, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.08 and abs(np.corrcoef(scales, mirrored)[0, 1]) < 0.08
    assert mirrored.mean() == pytest.approx(0.5, abs=0.04)


def test_colours_of_crops_shift_as_often_and_as_far_as_the_protocol_says():
    pixels = np.empty((3, 8, 8), np.uint8)
    pixels[:] = np.reshape([160, 80, 80], (3, 1, 1))
    labels = np.indices((8, 8)).sum(0) % 2
    transform = SegmentationTrainTransform(
        (8, 8), {"height": 8, "width": 8}, (1.0, 1.0), image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    torch.manual_seed(0)
    colors = np.array([transform(pixels, labels)[0][:, 0, 0].numpy() for _ in range(3000)]) * 255
    hues, saturations, values = np.array([colorsys.rgb_to_hsv(*color / 255) for color in colors]).T
    hues = (hues + 0.5) % 1 - 0.5
    unchanged = (np.abs(colors - [160, 80, 80]).max(axis=1) < 0.5).mean()
    assert unchanged == pytest.approx(1 / 16, abs=0.02)
    assert (np.abs(hues) > 0.004).mean() == pytest.approx(0.5 * 35 / 36, abs=0.03)
    assert -0.107 < hues.min() < -0.09 and 0.08 < hues.max() < 0.102
    values = values * 255
    assert (np.abs(values - 160) > 0.5).mean() == pytest.approx(0.75, abs=0.03)
    assert values.min() < 80 and values.max() > 254 and values.mean() == pytest.approx(160, abs=3)
    assert saturations.min() < 0.27 and saturations.max() > 0.7


def test_scales_are_uniform_and_keep_the_ratio():
    transform = SegmentationTrainTransform()
    torch.manual_seed(0)
    sizes = np.array([transform.draw_size((600, 800)) for _ in range(4000)])
    assert sizes[:, 0].min() >= 256 and sizes[:, 0].max() <= 1024
    np.testing.assert_allclose(np.quantile(sizes[:, 0], [0.25, 0.5, 0.75]), [448, 640, 832], rtol=0.03)
    assert np.abs(sizes[:, 1] - sizes[:, 0] * 4 / 3).max() <= 1


def test_crops_are_drawn_evenly_over_the_image():
    crop = ClassLimitedCrop((4, 4))
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
    assert ClassLimitedCrop((1, 1)).is_varied(np.array([labels])) == is_varied


def test_a_crop_is_drawn_again_at_most_ten_times():
    crop = ClassLimitedCrop((2, 2))
    drawn = []
    crop.draw_box = lambda size: drawn.append(size) or CropBox(0, 0, 2, 2)
    crop.draw(np.zeros((8, 8), np.uint8), (8, 8))
    assert len(drawn) == 11
    drawn.clear()
    crop.draw(np.eye(8, dtype=np.uint8), (8, 8))
    assert len(drawn) == 1


def test_each_distortion_has_probability_one_half_and_its_range():
    distortion = PhotometricDistortion()
    torch.manual_seed(0)
    drawn = [vars(distortion.draw()) for _ in range(4000)]
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


def distort(image, **shift):
    pixels = image.numpy().astype(np.float32)
    ColorShift(**shift)(pixels)
    return torch.from_numpy(pixels)


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
