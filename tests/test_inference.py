import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import pipeline

from twins_hf import TwinsImageProcessor
from twins_hf.inference import predict_label_maps, segment


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


def test_equal_images_share_a_forward_pass(tiny_model, processor):
    batches = []
    tiny_model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pixel_values = [processor(image, return_tensors="pt")["pixel_values"][0] for image in photos()]
    predict_label_maps(tiny_model, processor, pixel_values, [(10, 10)] * 4)
    assert batches == [2, 1, 1]


def test_files_and_arrays_give_what_the_image_gives(tiny_model, processor, tmp_path):
    image = photos()[0]
    image.save(tmp_path / "photo.png")
    expected, *others = segment(tiny_model, processor, [image, str(tmp_path / "photo.png"), np.asarray(image)])
    assert all((other == expected).float().mean() > 0.999 for other in others)


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
