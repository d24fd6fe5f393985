#!/usr/bin/env python
"""Writes an int8 model for ONNX Runtime and compares it, and bfloat16, with float32 on held-out generated scenes.

python examples/quantize_int8.py outputs/quickstart

The encoder's linear layers become int8 with a scale found at run time (dynamic), the decode head's convolutions int8
with scales found on a few training scenes (static). Needs onnxruntime and onnxscript.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import twins_hf  # noqa: F401  registers the Twins classes
from twins_hf.data import load_scenes
from twins_hf.modeling_twins import TwinsConvModule


class Calibration(CalibrationDataReader):
    def __init__(self, batches: list[np.ndarray]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


def export(model: nn.Module, example: np.ndarray, path: Path) -> None:
    """ONNX whose head has convolutions: float32 does better without, int8 has fast kernels for them alone."""
    for module in model.decode_head.modules():
        if isinstance(module, TwinsConvModule):
            module.conv = nn.Sequential(module.conv)  # which the module then calls as it is
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": torch.from_numpy(example)})
    torch.onnx.export(program, (), path, output_names=["logits"], verbose=False)


def quantize(source: Path, target: Path, batches: list[np.ndarray]) -> None:
    prepared, static = target.with_suffix(".prepared.onnx"), target.with_suffix(".static.onnx")
    quant_pre_process(source, prepared)  # shapes, batch norm folded
    nodes = onnx.load(prepared).graph.node
    depthwise = [
        node.name
        for node in nodes
        if node.op_type == "Conv"
        and any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    ]
    quantize_static(
        *(prepared, static, Calibration(batches)),
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=depthwise,
        per_channel=True,
        reduce_range=True,  # 7 bits: without VNNI a processor's 16-bit sums of 8-bit products overflow
    )
    quantize_dynamic(
        static,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
    static.unlink()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart")
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    scenes = load_scenes()
    crops = {"do_center_crop": True, "return_tensors": "np"}  # one size for all
    calibration = [processor(image, **crops)["pixel_values"] for image in scenes["train"][:32]["image"]]
    batches = [processor(image, **crops)["pixel_values"] for image in scenes["validation"]["image"]]

    @torch.inference_mode()
    def in_torch(batch: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(batch)).logits.float().numpy()

    def in_bfloat16(batch: np.ndarray) -> np.ndarray:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return in_torch(batch)

    results = {}

    def measure(name: str, run) -> None:
        run(batches[0])
        started = time.perf_counter()
        results[name] = np.concatenate([run(batch) for batch in batches]), time.perf_counter() - started

    measure("float32", in_torch)
    measure("bfloat16 autocast", in_bfloat16)
    export(model, batches[0], folder / "direct.onnx")
    quantize(folder / "direct.onnx", folder / "int8.onnx", calibration)
    session = onnxruntime.InferenceSession(folder / "int8.onnx")
    measure("int8", lambda batch: session.run(["logits"], {"pixel_values": batch})[0])

    reference, _ = results["float32"]
    for name, (logits, spent) in results.items():
        agreement = 100 * (logits.argmax(1) == reference.argmax(1)).mean()
        error = abs(logits - reference).max() / abs(reference).max()
        milliseconds = 1e3 * spent / len(batches)
        print(
            f"{name:<18} {agreement:6.2f} % of labels as in float32, logits off by {error:.1e} at most, "
            f"{milliseconds:.1f} ms an image"
        )
    print(f"The int8 model is in {folder / 'int8.onnx'}")


if __name__ == "__main__":
    main()
