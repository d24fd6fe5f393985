"""One traced program serves every size: torch.compile, torch.export and ONNX give what the model gives."""

import runpy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import FAMILIES, TINY, randomize
from torch.export import Dim

from twins_hf import TwinsConfig, TwinsForImageClassification, TwinsForSemanticSegmentation

MODELS = {
    "pcpvt-upernet": (TwinsForSemanticSegmentation, FAMILIES["pcpvt"]),
    "svt-upernet": (TwinsForSemanticSegmentation, FAMILIES["svt"]),
    "svt-fpn-mmseg": (
        TwinsForSemanticSegmentation,
        {**FAMILIES["svt"], "decoder_type": "fpn", "window_padding": "mmseg"},
    ),
    "svt-classifier-timm": (
        TwinsForImageClassification,
        {"window_sizes": [7, 7, 7, 7], "window_padding": "unmasked", "patch_padding": False},
    ),
}
# Stage 1's windows are padded on no side, at the bottom only, on both.
SIZES = [(1, 448, 448), (2, 300, 448), (1, 257, 333)]


def build(name):
    model_class, settings = MODELS[name]
    return randomize(model_class(TwinsConfig(**TINY, **settings, num_labels=3)))


def images(batch_size, height, width):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_model_compiles_without_graph_breaks_before_its_first_run(name):
    torch.compiler.reset()
    model, pixel_values = build(name).double(), images(1, 65, 97).double()  # a processor's rounding is not at issue
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("name", ["pcpvt-upernet", "svt-upernet"])
@torch.inference_mode()
def test_a_model_compiled_for_any_size_is_not_compiled_again_for_another(name):
    torch.compiler.reset()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    compiled(images(1, 512, 683))  # maps of 20,480 elements and more: torch has another convolution for smaller ones
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in ((1, 512, 700), (1, 700, 512), (1, 640, 516)):
            assert_close(compiled(images(*size)).logits, model(images(*size)).logits)


@pytest.fixture(scope="module", params=MODELS)
def exported(request):
    model = build(request.param)
    sizes = {"pixel_values": {0: Dim("batch", min=1, max=64), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    with torch.no_grad():
        return model, torch.export.export(model, (), {"pixel_values": images(2, 256, 320)}, dynamic_shapes=sizes)


@torch.inference_mode()
def test_an_exported_program_takes_any_size(exported):
    model, program = exported
    for size in SIZES:
        assert_close(program.module()(pixel_values=images(*size))["logits"], model(images(*size)).logits)


@torch.inference_mode()
def test_onnxruntime_takes_any_size(exported, tmp_path):
    model, program = exported
    torch.onnx.export(program, (), tmp_path / "model.onnx", output_names=["logits"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (*SIZES, (1, 56, 66), (3, 32, 32)):
        found = session.run(["logits"], {"pixel_values": images(*size).numpy()})[0]
        assert_close(torch.from_numpy(found), model(images(*size)).logits)


@torch.inference_mode()
def test_the_int8_example_stays_near_float32_with_its_convolutions_and_linear_layers_in_int8(tmp_path):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "quantize_int8.py"))
    model, pixel_values = build("svt-upernet"), images(1, 64, 64)
    expected = model(pixel_values).logits
    example["export"](model, pixel_values.numpy(), tmp_path / "direct.onnx")
    example["quantize"](tmp_path / "direct.onnx", tmp_path / "int8.onnx", [pixel_values.numpy()])
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    found = torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])
    assert 1e-4 < ((found - expected).abs().max() / expected.abs().max()).item() < 0.2
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert kinds.count("MatMulInteger") > 30 and kinds.count("QuantizeLinear") > 10
