import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput

from twins_hf import TwinsImageProcessor
from twins_hf.image_processing_pil_twins import largest_class, window_slices
from twins_hf.inference import run_batched, segment


@pytest.fixture
def processor():
    return TwinsImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})


def photos():
    rng = np.random.default_rng(0)
    sizes = [(50, 80), (70, 40), (50, 80), (100, 100)]
    return [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.inference_mode()
def test_a_label_map_is_the_argmax_of_logits_resized_to_the_input_and_then_to_the_image(tiny_model, processor):
    (image,) = photos()[:1]
    (label_map,) = segment(tiny_model, processor, [image])
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    logits = F.interpolate(tiny_model(pixel_values).logits, size=pixel_values.shape[-2:], mode="bilinear")
    expected = F.interpolate(logits, size=(50, 80), mode="bilinear")[0].argmax(0)
    assert torch.equal(label_map, expected)


def test_unequal_images_do_not_influence_each_other(tiny_model, processor):
    together = segment(tiny_model, processor, photos())
    assert [tuple(label_map.shape) for label_map in together] == [(50, 80), (70, 40), (50, 80), (100, 100)]
    for image, label_map in zip(photos(), together, strict=True):
        (alone,) = segment(tiny_model, processor, [image])
        assert (alone == label_map).float().mean() > 0.999  # a batched product may round a tie the other way


def test_images_of_one_size_share_a_forward_pass_but_on_a_cpu():
    class Recorder:
        """Of a model: what it is given, and logits of one class."""

        dtype = torch.float32

        def __init__(self, device):
            self.device, self.batches = torch.device(device), []

        def __call__(self, batch):
            self.batches.append(len(batch))
            return SemanticSegmenterOutput(logits=batch[:, :1])

    pixel_values = [torch.randn(3, *size) for size in ((64, 102), (112, 64), (64, 102), (64, 64), (64, 102))]
    for device, expected in (("meta", [2, 1, 1, 1]), ("cpu", [1] * 5)):
        model = Recorder(device)
        run_batched(model, pixel_values, batch_size=2)
        assert model.batches == expected


def test_the_windows_cover_an_image_and_the_last_is_moved_back():
    slices = window_slices((512, 700), (512, 512), 341)
    assert [(columns.start, columns.stop) for _, columns in slices] == [(0, 512), (188, 700)]
    assert window_slices((300, 512), (512, 512), 341) == [(slice(0, 300), slice(0, 512))]
    starts = [rows.start for rows, _ in window_slices((1365, 512), (512, 512), 341)]
    assert starts == [0, 341, 682, 853]
    assert [rows.start for rows, _ in window_slices((853, 512), (512, 512), 341)] == [0, 341]


@torch.inference_mode()
def plain_slide(model, pixel_values, window, stride):
    """One window after the other, padded back to the whole image, summed and divided by how often each was seen."""
    height, width = pixel_values.shape[-2:]
    total, count = torch.zeros(1, 3, height, width), torch.zeros(1, 1, height, width)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            logits = model(pixel_values[..., top:bottom, left:right]).logits
            logits = F.interpolate(logits, size=(bottom - top, right - left), mode="bilinear")
            total += F.pad(logits, (left, width - right, top, height - bottom))
            count[..., top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("by", ["inference", "processor"])
@torch.inference_mode()
def test_sliding_windows_are_summed_and_divided_by_how_often_a_position_was_seen(tiny_model, by):
    settings = {"crop_size": {"height": 48, "width": 48}, "split_stride": 32}
    processor = TwinsImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}, **settings)
    sliding = TwinsImageProcessor(**{**processor.to_dict(), "do_split_image": True})
    images = [*photos(), PIL.Image.new("RGB", (400, 50), "teal")]  # the last is fitted to 256x32: lower than a window
    if by == "inference":
        found = segment(tiny_model, processor, images, mode="slide")
    else:
        found = []
        for image in images:
            outputs = tiny_model(**sliding(image, return_tensors="pt"))
            found += sliding.post_process_semantic_segmentation(outputs, [image.size[::-1]])
    for image, label_map in zip(images, found, strict=True):
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        expected = plain_slide(tiny_model, pixel_values, 48, 32)
        expected = F.interpolate(expected, size=image.size[::-1], mode="bilinear")[0].argmax(0)
        assert (label_map == expected).float().mean() > 0.999


def test_the_pipeline_slides_by_a_setting_of_the_processor(tiny_model, tmp_path):
    tiny_model.config.id2label = {0: "red", 1: "green", 2: "blue"}
    tiny_model.save_pretrained(tmp_path)
    settings = {"crop_size": {"height": 48, "width": 48}, "split_stride": 32, "do_split_image": True}
    processor = TwinsImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}, **settings)
    processor.save_pretrained(tmp_path)
    image = photos()[0]
    (expected,) = segment(tiny_model, processor, [image], mode="slide")
    (whole,) = segment(tiny_model, processor, [image])
    assert not torch.equal(expected, whole)
    for entry in pipeline("image-segmentation", str(tmp_path))(image):
        class_id = ["red", "green", "blue"].index(entry["label"])
        assert ((np.asarray(entry["mask"]) > 0) == (expected.numpy() == class_id)).mean() > 0.999


@pytest.mark.parametrize("mode", ["whole", "slide"])
@torch.inference_mode()
def test_scales_and_mirrors_are_averaged_as_probabilities(tiny_model, processor, mode, monkeypatch):
    monkeypatch.setattr("twins_hf.inference.STRIP_ELEMENTS", 3 * 80 * 7)  # strips of seven rows
    (image,) = photos()[:1]
    ((label_map, scores),) = segment(
        tiny_model, processor, [image], mode, scales=(0.75, 1.5), flip=True, return_scores=True
    )
    total = 0
    for size in ({"shortest_edge": 48, "longest_edge": 192}, {"shortest_edge": 96, "longest_edge": 384}):
        pixel_values = processor(image, size=size, return_tensors="pt")["pixel_values"]
        for mirrored in (False, True):
            inputs = pixel_values.flip(-1) if mirrored else pixel_values
            if mode == "slide":
                logits = plain_slide(tiny_model, inputs, 512, 341)
            else:
                logits = F.interpolate(tiny_model(inputs).logits, size=inputs.shape[-2:], mode="bilinear")
            logits = F.interpolate(logits, size=(50, 80), mode="bilinear")
            total = total + (logits.flip(-1) if mirrored else logits).softmax(1)
    torch.testing.assert_close(scores, total[0] / 4, rtol=1e-4, atol=1e-6)
    assert torch.equal(label_map, scores.argmax(0))
    assert torch.equal(label_map, segment(tiny_model, processor, [image], mode, (0.75, 1.5), True)[0])


def test_post_processing_in_parts_equals_the_plain_formula(monkeypatch):
    logits = torch.randn(20, 16, 22, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    plain = F.interpolate(logits[None], size=(64, 86), mode="bilinear")
    plain = F.interpolate(plain, size=(150, 201), mode="bilinear")[0].argmax(0)
    for elements in (1, 150 * 201 * 7, 2**22):
        monkeypatch.setattr("twins_hf.image_processing_pil_twins.CHUNK_ELEMENTS", elements)
        assert torch.equal(largest_class(logits, (150, 201), (64, 86), (64, 86)), plain)


def test_an_unknown_mode_is_refused(tiny_model, processor):
    with pytest.raises(ValueError, match="mode='tiles' must be 'whole' or 'slide'"):
        segment(tiny_model, processor, photos()[:1], mode="tiles")


def test_files_arrays_and_tensors_give_what_the_image_gives(tiny_model, processor, tmp_path):
    image = photos()[0]
    image.save(tmp_path / "photo.png")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected, *others = segment(tiny_model, processor, [image, str(tmp_path / "photo.png"), np.array(image), tensor])
    assert len(others) == 3 and all(torch.equal(other, expected) for other in others)


def test_the_pipeline_gives_the_same_label_map_from_a_saved_folder(tiny_model, processor, tmp_path, capfd):
    tiny_model.config.id2label = {0: "red", 1: "green", 2: "blue"}
    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = photos()[0]
    (expected,) = segment(tiny_model, processor, [image])
    found = pipeline("image-segmentation", str(tmp_path))(image)
    assert "not supported" not in capfd.readouterr().err
    assert {entry["label"] for entry in found} == {["red", "green", "blue"][i] for i in expected.unique()}
    for entry in found:
        class_id = ["red", "green", "blue"].index(entry["label"])
        np.testing.assert_array_equal(np.asarray(entry["mask"]) > 0, expected.numpy() == class_id)
