import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict
from transformers.modeling_outputs import SemanticSegmenterOutput

from twins_hf import TwinsConfig, TwinsImageProcessor, TwinsImageProcessorPil
from twins_hf.image_processing_pil_twins import fitted_size, open_image, resize_labels
from twins_hf.resizing_twins import resize_bilinear_whole

BACKENDS = [TwinsImageProcessor, TwinsImageProcessorPil]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(params=BACKENDS)
def processor_class(request):
    return request.param


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_levels(pixel_values):
    """Normalised (3, H, W) -> grey levels (H, W, 3)."""
    return (pixel_values.numpy().transpose(1, 2, 0) * STD + MEAN) * 255


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 683, (512, 683)),
        (300, 400, (512, 683)),  # 682.67 is rounded, not cut
        (364, 500, (512, 703)),
        (683, 512, (683, 512)),
        (100, 1000, (205, 2048)),  # the long side decides
        (2048, 2048, (512, 512)),
        (1, 5000, (1, 2048)),
    ],
)
def test_images_are_fitted_into_2048_by_512_and_rounded_half_up(height, width, expected):
    assert fitted_size((height, width), SizeDict(shortest_edge=512, longest_edge=2048)) == expected


def test_a_size_without_sides_is_refused():
    with pytest.raises(ValueError, match="shortest_edge"):
        fitted_size((10, 10), SizeDict(max_height=5, max_width=5))


def test_resizing_is_bilinear_without_antialiasing_in_whole_grey_levels(processor_class):
    image = photo(37, 50)
    pixel_values = processor_class(size={"shortest_edge": 16, "longest_edge": 64})(image, return_tensors="pt")
    levels = grey_levels(pixel_values["pixel_values"][0])
    assert np.abs(levels - levels.round()).max() < 1e-3
    expected = np.zeros((16, 22, 3))
    for y in range(16):
        for x in range(22):
            top, left = max(0, (y + 0.5) * 37 / 16 - 0.5), max(0, (x + 0.5) * 50 / 22 - 0.5)
            y0, x0 = int(top), int(left)
            y1, x1, dy, dx = min(y0 + 1, 36), min(x0 + 1, 49), top - y0, left - x0
            upper = image[y0, x0] * (1 - dx) + image[y0, x1] * dx
            expected[y, x] = upper * (1 - dy) + (image[y1, x0] * (1 - dx) + image[y1, x1] * dx) * dy
    assert np.abs(levels - expected).max() < 1  # OpenCV rounds weights to 2048ths, and cuts off twice


@pytest.mark.parametrize("options", [{}, {"do_rescale": False}, {"do_normalize": False}, {"do_center_crop": True}])
def test_a_photograph_and_its_array_of_bytes_integers_or_floats_give_the_same_bits(processor_class, options):
    image = photo(37, 50)
    processor = processor_class(size={"shortest_edge": 24, "longest_edge": 96}, crop_size=20, **options)
    given = [PIL.Image.fromarray(image), image, image.astype(np.int32), image.astype(np.float32)]
    given += [torch.from_numpy(image).permute(2, 0, 1)]
    expected, *others = [processor(each, return_tensors="pt")["pixel_values"] for each in given]
    assert expected.dtype == torch.float32 and expected.is_contiguous()
    assert all(torch.equal(found, expected) for found in others)


def test_without_rescaling_and_normalisation_grey_levels_come_out(processor_class):
    image = photo(37, 50)
    processor = processor_class(size={"shortest_edge": 24, "longest_edge": 96}, do_rescale=False, do_normalize=False)
    (found,) = processor(PIL.Image.fromarray(image), return_tensors="pt")["pixel_values"]
    levels = resize_bilinear_whole(image.transpose(2, 0, 1).astype(np.int32), (24, 32))
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), levels)


@pytest.mark.parametrize("num_channels", [1, 4, 5])
def test_images_of_other_channels_are_resized_too(processor_class, num_channels):
    levels = np.random.default_rng(0).integers(0, 256, (num_channels, 37, 50), dtype=np.uint8)
    settings = {
        "size": {"height": 24, "width": 32},
        "image_mean": [0.5] * num_channels,
        "image_std": [0.2] * num_channels,
    }
    processor = processor_class(do_convert_rgb=False, **settings)
    found = processor(levels, input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]
    expected = resize_bilinear_whole(levels.astype(np.int32), (24, 32))
    np.testing.assert_allclose((found * 0.2 + 0.5) * 255, expected, atol=1e-3)


def test_a_grey_image_that_stays_so_is_normalised_with_every_mean():
    grey = PIL.Image.fromarray(photo(37, 50)).convert("L")
    processor = TwinsImageProcessor(size={"shortest_edge": 24, "longest_edge": 96})
    assert torch.equal(*(processor(grey, do_convert_rgb=convert)["pixel_values"][0] for convert in (False, True)))


def test_the_two_backends_agree():
    images = [photo(40, 61), photo(90, 33, seed=1), photo(64, 64, seed=2)]
    maps = [photo(*image.shape[:2], seed=3)[..., 0] for image in images]
    settings = {"size": {"shortest_edge": 48, "longest_edge": 192}, "do_reduce_labels": True}
    for options in ({}, {"do_center_crop": True, "crop_size": 40}, {"do_resize": False}):
        ours, pil = (backend(**settings)(images, maps, return_tensors="pt", **options) for backend in BACKENDS)
        torch.testing.assert_close(ours["pixel_values"], pil["pixel_values"], rtol=0, atol=1e-5)
        assert torch.equal(ours["labels"], pil["labels"])


def test_a_batch_of_unequal_images_is_padded_at_the_right_and_bottom(processor_class):
    processor = processor_class(size={"shortest_edge": 32, "longest_edge": 128})
    images, maps = [photo(32, 40), photo(48, 32)], [np.ones((32, 40), np.uint8), np.ones((48, 32), np.uint8)]
    batch = processor(images, maps, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 48, 40)
    assert batch["labels"].shape == (2, 48, 40)
    assert (batch["pixel_values"][0, :, 32:] == 0).all() and (batch["pixel_values"][1, :, :, 32:] == 0).all()
    assert (batch["labels"][0, :32] == 1).all() and (batch["labels"][0, 32:] == 255).all()
    alone = processor(images[0], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0, :, :32], alone)


def test_labels_are_reduced_as_ade20k_wants(processor_class):
    segmentation_map = np.array([[0, 1, 2], [150, 255, 3]], dtype=np.uint8)
    batch = processor_class(do_resize=False, do_reduce_labels=True)(photo(2, 3), segmentation_map)
    np.testing.assert_array_equal(batch["labels"][0], [[255, 0, 1], [149, 255, 2]])
    assert segmentation_map[0, 0] == 0  # the caller's map is left alone


def test_labels_are_resized_by_the_floor_of_the_position():
    labels = np.arange(12).reshape(3, 4)
    for size in [(5, 7), (2, 3), (3, 4), (1, 1), (9, 2)]:
        expected = F.interpolate(torch.from_numpy(labels)[None, None].double(), size=size, mode="nearest")[0, 0]
        np.testing.assert_array_equal(resize_labels(labels, size), expected.numpy())


def test_a_center_crop_takes_the_middle_and_pads_what_is_smaller(processor_class):
    image = photo(20, 60)
    processor = processor_class(do_resize=False, do_center_crop=True, crop_size={"height": 32, "width": 32})
    batch = processor(image, np.zeros((20, 60), np.uint8), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    np.testing.assert_allclose(grey_levels(batch["pixel_values"][0])[:20], image[:, 14:46], atol=1e-3)
    assert (batch["labels"][0, :20] == 0).all() and (batch["labels"][0, 20:] == 255).all()


def modes():
    rgb = PIL.Image.fromarray(photo(33, 34)).convert("RGB")
    grey = rgb.convert("L")
    sixteen_bit = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    transparent = rgb.copy()
    transparent.putalpha(128)
    palette = rgb.quantize(16)
    return {
        "rgb": (rgb, np.asarray(rgb)),
        "grey": (grey, np.asarray(grey.convert("RGB"))),
        "one bit": (grey.convert("1"), np.asarray(grey.convert("1").convert("RGB"))),
        "16 bit": (sixteen_bit, np.asarray(grey.convert("RGB"))),
        "32 bit": (sixteen_bit.convert("I"), np.asarray(grey.convert("RGB"))),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
        "cmyk": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "rgba": (transparent, np.asarray(rgb) * (128 / 255) + 255 * (127 / 255)),  # over white, as transformers does
        "16 bit array": (np.asarray(rgb).astype(np.uint16) * 257, np.asarray(rgb)),
        "grey array": (np.asarray(grey)[..., None], np.asarray(grey.convert("RGB"))),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_kind_of_image_becomes_rgb_of_eight_bits(processor_class, mode):
    image, expected = modes()[mode]
    pixel_values = processor_class(do_resize=False)(image, return_tensors="pt")["pixel_values"][0]
    assert np.abs(grey_levels(pixel_values) - expected).max() <= 1.01


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_file_of_sixteen_bits_is_scaled_not_clipped(processor_class, tmp_path, suffix):
    levels = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
    PIL.Image.fromarray(levels * 257).save(tmp_path / f"deep.{suffix}")
    pixel_values = processor_class(do_resize=False)(str(tmp_path / f"deep.{suffix}"), return_tensors="pt")
    np.testing.assert_allclose(grey_levels(pixel_values["pixel_values"][0])[..., 0], levels, atol=1e-3)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_rotated_photograph_comes_out_upright(processor_class, tmp_path, as_file):
    upright = photo(24, 40)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    PIL.Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    image = str(tmp_path / "turned.png") if as_file else PIL.Image.open(tmp_path / "turned.png")
    pixel_values = processor_class(do_resize=False)(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 24, 40)
    np.testing.assert_allclose(grey_levels(pixel_values[0]), upright, atol=1e-3)


def test_a_map_of_another_size_is_refused_with_both_sizes(processor_class):
    with pytest.raises(ValueError, match="image 1 is 40x30 pixels but its segmentation map is 30x40"):
        processor_class()([photo(20, 20), photo(30, 40)], [np.zeros((20, 20), int), np.zeros((40, 30), int)])


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (np.zeros((20, 20, 3), np.uint8), "one integer for each pixel.*20, 20, 3"),
        (np.zeros((20, 20), np.float32), "float32"),
    ],
)
def test_a_map_that_is_none_is_refused(processor_class, segmentation_map, message):
    with pytest.raises(ValueError, match=message):
        processor_class()([photo(20, 20)], [segmentation_map])


def test_fewer_maps_than_images_are_refused(processor_class):
    with pytest.raises(ValueError, match="2 images but 1 segmentation maps"):
        processor_class()([photo(20, 20), photo(20, 20)], [np.zeros((20, 20), int)])


def test_another_interpolation_is_refused(processor_class):
    with pytest.raises(ValueError, match="resample"):
        processor_class()(photo(20, 20), resample=3)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_file_is_named(processor_class, tmp_path, content):
    path = tmp_path / "broken.jpg"
    PIL.Image.fromarray(photo(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    with pytest.raises(ValueError, match="broken.jpg: cannot be read as an image"):
        processor_class()(str(path))


def test_a_missing_file_is_named(processor_class, tmp_path):
    with pytest.raises(ValueError, match="missing.jpg: cannot be read as an image"):
        processor_class()(str(tmp_path / "missing.jpg"))
    with pytest.raises(ValueError, match="missing.jpg"):
        open_image(tmp_path / "missing.jpg")


def test_auto_image_processor_finds_both_backends(tmp_path):
    TwinsConfig().save_pretrained(tmp_path)
    TwinsImageProcessor(do_reduce_labels=True, size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(
        tmp_path
    )
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "TwinsImageProcessor"
    for backend, processor_class in zip(("torchvision", "pil"), BACKENDS, strict=True):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(loaded) is processor_class
        assert loaded.do_reduce_labels and loaded.size.shortest_edge == 64


def test_without_torchvision_the_pil_backend_serves(tmp_path):
    TwinsConfig().save_pretrained(tmp_path)
    TwinsImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import numpy as np, twins_hf\n"
        "from transformers import AutoImageProcessor\n"
        "processor = AutoImageProcessor.from_pretrained(sys.argv[1])\n"
        "assert type(processor) is twins_hf.TwinsImageProcessorPil, type(processor)\n"
        "assert not hasattr(twins_hf, 'TwinsImageProcessor')\n"
        "print(processor(np.zeros((60, 80, 3), np.uint8), return_tensors='pt')['pixel_values'].shape)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "[1, 3, 48, 64]" in finished.stdout, finished.stderr[-2000:]


def test_label_maps_go_through_the_input_size_and_lose_the_padding(processor_class):
    processor = processor_class(size={"shortest_edge": 64, "longest_edge": 256})
    logits = torch.randn(2, 5, 20, 22, generator=torch.Generator().manual_seed(0))
    input_sizes, target_sizes = [(64, 86), (80, 64)], [(30, 40), (50, 40)]
    outputs = SemanticSegmenterOutput(logits=logits)
    found = processor.post_process_semantic_segmentation(outputs, target_sizes, input_sizes)
    scored = processor.post_process_semantic_segmentation(
        outputs, torch.tensor(target_sizes), torch.tensor(input_sizes), return_segmentation_scores=True
    )
    for index, (height, width) in enumerate(input_sizes):
        padded = F.interpolate(logits[index : index + 1], size=(80, 86), mode="bilinear", align_corners=False)
        expected = F.interpolate(
            padded[..., :height, :width], size=target_sizes[index], mode="bilinear", align_corners=False
        )
        assert torch.equal(found[index], expected[0].argmax(0))
        assert torch.equal(scored[index].segmentation_scores, expected[0])
        assert torch.equal(scored[index].segmentation, found[index])


def test_input_sizes_follow_from_the_processors_own_where_the_logits_fit(processor_class):
    processor = processor_class(size={"shortest_edge": 64, "longest_edge": 256})
    outputs = SemanticSegmenterOutput(logits=torch.randn(2, 5, 20, 22))
    target_sizes = [(30, 40), (50, 40)]  # resized to 64x85 and 80x64: logits of 20x22
    derived = processor.post_process_semantic_segmentation(outputs, target_sizes)
    given = processor.post_process_semantic_segmentation(outputs, target_sizes, [(64, 85), (80, 64)])
    assert all(torch.equal(a, b) for a, b in zip(derived, given, strict=True))
    other = SemanticSegmenterOutput(logits=torch.randn(2, 5, 8, 12))
    direct = F.interpolate(other.logits[:1], size=(30, 40), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(processor.post_process_semantic_segmentation(other, target_sizes)[0], direct)


def test_sizes_that_are_not_as_many_as_the_images_are_refused(processor_class):
    outputs = SemanticSegmenterOutput(logits=torch.randn(2, 5, 8, 8))
    with pytest.raises(ValueError, match="target_sizes has 1 entries for 2 images"):
        processor_class().post_process_semantic_segmentation(outputs, [(8, 8)])
    with pytest.raises(ValueError, match="input_sizes has 3 entries for 2 images"):
        processor_class().post_process_semantic_segmentation(outputs, [(8, 8)] * 2, [(8, 8)] * 3)


MEASURE = """
import resource, torch
from transformers.modeling_outputs import SemanticSegmenterOutput
from twins_hf import TwinsImageProcessor
logits = torch.randn(1, 150, 128, 171)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
TwinsImageProcessor().post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), [(1500, 2000)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_photograph_is_post_processed_in_little_memory():
    """All classes at full size at once would be 1.8 GB."""
    finished = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(finished.stdout) * 1024 < 0.4e9


def test_windows_are_cut_with_their_labels_and_their_number_is_checked(processor_class):
    settings = {"size": {"shortest_edge": 64, "longest_edge": 256}, "crop_size": {"height": 48, "width": 48}}
    processor = processor_class(**settings, split_stride=32, do_split_image=True)
    image, labels = np.zeros((64, 80, 3), np.uint8), np.arange(64 * 80).reshape(64, 80) % 7
    inputs = processor(image, labels, return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 48, 48)  # rows from 0 and 16, columns from 0 and 32
    for window, (top, left) in zip(inputs["labels"], [(0, 0), (0, 32), (16, 0), (16, 32)], strict=True):
        np.testing.assert_array_equal(window, labels[top : top + 48, left : left + 48])
    outputs = SemanticSegmenterOutput(logits=torch.zeros(3, 5, 12, 12))
    with pytest.raises(ValueError, match="have 4 windows, but logits have 3"):
        processor.post_process_semantic_segmentation(outputs, [(64, 80)])
    with pytest.raises(ValueError, match="needs target_sizes"):
        processor.post_process_semantic_segmentation(outputs)
