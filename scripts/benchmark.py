#!/usr/bin/env python
"""Time and memory of Twins here and elsewhere, as ratios, on random weights: what docs/performance.md holds.

python scripts/benchmark.py --mmseg-python mmseg/bin/python --openvino

Ours and theirs take turns, so that both see the machine in the same state, and of a model's two passes in a turn the
second counts, since models in use run many in a row; a ratio is the median over the rounds, with its spread. What is
measured for its memory runs in a process of its own, whose peak resident set is the answer.
MMSegmentation runs in an environment of its own (scripts/mmseg_reference.py says how to make one).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL.Image
import timm
import torch
import transformers
from benchmark_stages import MMSegmentation, seconds
from mmseg_reference import run_once
from PIL import ImageDraw, ImageFont

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor, TwinsImageProcessorPil

SCRIPTS = Path(__file__).parent
VARIANTS = {"pcpvt-s": "twins_pcpvt_small", "svt-s": "twins_svt_small"}
SIZES = (256, 512, 1024, 2048)
T = TypeVar("T")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def build(name: str) -> torch.nn.Module:
    """A segmentation model of 150 classes, ours or of transformers, with random weights."""
    torch.manual_seed(0)
    if name == "SegFormer":  # B2's sizes, the encoder that is nearest in parameters
        config = transformers.SegformerConfig(
            depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=150
        )
        return transformers.SegformerForSemanticSegmentation(config).eval()
    if name == "transformers' UPerNet":
        backbone = TwinsConfig.from_variant("pcpvt-s", out_features=STAGES)
        config = transformers.UperNetConfig(backbone_config=backbone, num_labels=150, auxiliary_in_channels=320)
        return transformers.UperNetForSemanticSegmentation(config).eval()
    return TwinsForSemanticSegmentation(TwinsConfig.from_variant(name, num_labels=150)).eval()


def measure(model: str, task: str, size: int, batch_size: int) -> dict:
    """Seconds and peak bytes of one `task` of ours, in this process."""
    network = build(model)
    if task == "checkpointed training":
        network.activation_checkpointing_enable()

    def loss(pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return network(pixel_values, labels=labels).loss

    return run_once(network, network, loss, task.split()[-1], size, batch_size)


def in_process(python: str, *arguments: object) -> dict:
    """What the last line says that a script prints."""
    command = [python, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def ours(model: str, task: str, size: int, batch_size: int) -> dict:
    return in_process(sys.executable, __file__, "--measure", model, task, size, batch_size)


def theirs(python: str, task: str, size: int, batch_size: int) -> dict:
    script = SCRIPTS / "mmseg_reference.py"
    return in_process(python, script, "twins_pcpvt-s_uperhead", os.devnull, "--measure", task, size, batch_size)


def ratio(slow: list[float], fast: list[float]) -> str:
    ratios = np.array(slow) / np.array(fast)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def in_turns(functions: dict[str, Callable[[], T]], rounds: int, warm_ups: int = 0) -> dict[str, list[T]]:
    """What each function gives in each round, after `warm_ups` calls that do not count."""
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append([function() for _ in range(warm_ups + 1)][-1])
    return found


def in_openvino(model: torch.nn.Module, pixel_values: torch.Tensor) -> Callable[[np.ndarray], object]:
    import openvino

    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": pixel_values})
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(openvino.convert_model(program), "CPU", settings)


@torch.inference_mode()
def inference_rows(variant: str, python: str | None, with_openvino: bool, rounds: int, folder: Path) -> list[str]:
    """Whole model and encoder at 512x512, eager, compiled and exported."""
    model, timm_encoder = build(variant), timm.create_model(VARIANTS[variant], num_classes=0).eval()
    with_compiled_encoder = build(variant)
    with_compiled_encoder.twins.compile()
    pixel_values = torch.randn(1, 3, 512, 512)
    runs = {
        "whole": model,
        "whole, compiled": torch.compile(model),
        "whole, encoder compiled": with_compiled_encoder,
        "encoder": model.twins,
        "encoder, compiled": torch.compile(model.twins),
        "timm": timm_encoder.forward_features,
        "timm, compiled": torch.compile(timm_encoder.forward_features),
    }
    if variant == "pcpvt-s":
        runs |= {name: build(name) for name in ("transformers' UPerNet", "SegFormer")}
    for run in runs.values():
        run(pixel_values)
    functions = {name: lambda run=run: seconds(lambda: run(pixel_values), 1) for name, run in runs.items()}
    if with_openvino:
        exported = in_openvino(model, pixel_values)
        functions["exported"] = lambda: seconds(lambda: exported(pixel_values.numpy()), 1)
    if python is not None:
        image, mask = folder / "photo.png", folder / "mask.png"
        PIL.Image.new("RGB", (512, 512)).save(image)
        PIL.Image.new("L", (512, 512)).save(mask)
        config, checkpoint = f"twins_{variant}_uperhead", folder / "mmseg.pth"
        reference = MMSegmentation(python, config, checkpoint, str(image), str(mask))
        functions["MMSegmentation"] = lambda: reference.seconds("forward", 1)
        if with_openvino:
            reference.seconds("forward in OpenVINO", 1)  # compiles it
            functions["MMSegmentation in OpenVINO"] = lambda: reference.seconds("forward in OpenVINO", 1)
    times = in_turns(functions, rounds, warm_ups=1)

    def best(name: str) -> list[float]:
        return min((spent for other, spent in times.items() if other.split(",")[0] == name), key=np.median)

    comparisons = [
        ("whole model, eager", "MMSegmentation, eager", "MMSegmentation", times["whole"]),
        ("whole model, better of eager and compiled", "MMSegmentation, eager", "MMSegmentation", best("whole")),
        ("whole model, eager", "MMSegmentation in OpenVINO", "MMSegmentation in OpenVINO", times["whole"]),
        (
            *("whole model, exported to OpenVINO", "MMSegmentation in OpenVINO", "MMSegmentation in OpenVINO"),
            times.get("exported"),
        ),
        ("encoder, eager", "timm, eager", "timm", times["encoder"]),
        ("encoder, better of eager and compiled", "timm, compiled", "timm, compiled", best("encoder")),
        ("whole model, eager", "transformers' UPerNet over our backbone", "transformers' UPerNet", times["whole"]),
        ("whole model, eager", "SegFormer of the same widths and depths", "SegFormer", times["whole"]),
    ]
    return [
        f"| {variant}, {what} | {other} | {np.median(times[name]):.3g} s | {np.median(found):.3g} s "
        f"| {ratio(times[name], found)} |"
        for what, other, name, found in comparisons
        if name in times
    ]


def processor_rows(rounds: int) -> list[str]:
    """One photograph of 1024x768, which SegFormer's processor makes 512x512, and ours 683x512."""
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    photograph, rows, same_size = PIL.Image.fromarray(pixels), [], {"size": {"height": 512, "width": 683}}
    for backend, ours, theirs in (
        ("torchvision", TwinsImageProcessor, transformers.SegformerImageProcessor),
        ("PIL", TwinsImageProcessorPil, transformers.SegformerImageProcessorPil),
    ):
        processors = {"ours": ours(), "to 512x512": theirs(), "to 683x512": theirs(**same_size)}
        functions = {
            name: lambda process=process: seconds(lambda: process(photograph, return_tensors="pt"), 5)
            for name, process in processors.items()
        }
        times = in_turns(functions, 10 * rounds)
        milliseconds = {name: f"{1e3 * np.median(spent):.3g} ms" for name, spent in times.items()}
        rows += [
            f"| image processor, {backend}, 1024x768 to 683x512 | transformers' SegFormer processor, {name} "
            f"| {milliseconds[name]} | {milliseconds['ours']} | {ratio(times[name], times['ours'])} |"
            for name in ("to 512x512", "to 683x512")
        ]
    return rows


def training_rows(python: str, rounds: int) -> list[str]:
    """A training step of PCPVT-S and UPerNet, and what it takes at most of memory."""
    found = {
        "MMSegmentation": lambda: theirs(python, "training", 512, 2),
        "plain": lambda: ours("pcpvt-s", "training", 512, 2),
        "checkpointed": lambda: ours("pcpvt-s", "checkpointed training", 512, 2),
    }
    found = in_turns(found, rounds)

    def column(name: str, key: str) -> list[float]:
        return [each[key] for each in found[name]]

    rows = []
    for name, title in (("plain", "training step"), ("checkpointed", "training step, gradient checkpointing")):
        slow, fast = column("MMSegmentation", "seconds"), column(name, "seconds")
        rows.append(
            f"| pcpvt-s, {title}, batch 2 | MMSegmentation | {np.median(slow):.3g} s | {np.median(fast):.3g} s "
            f"| {ratio(slow, fast)} |"
        )
        rows.append(memory_row(f"{title}, batch 2", column("MMSegmentation", "bytes"), column(name, "bytes")))
    return rows


def memory_row(title: str, reference: list[float], found: list[float]) -> str:
    return (
        f"| pcpvt-s, {title}: peak memory | MMSegmentation | {np.median(reference) / 2**30:.2f} GiB "
        f"| {np.median(found) / 2**30:.2f} GiB | ours / theirs {np.median(found) / np.median(reference):.2f} |"
    )


def inference_memory_row(python: str) -> str:
    found = ours("pcpvt-s", "inference", 2048, 1)["bytes"]
    return memory_row("inference at 2048x2048", [theirs(python, "inference", 2048, 1)["bytes"]], [found])


def growth() -> list[tuple[int, int, float, float]]:
    """(size, batch size, seconds, bytes) of inference with PCPVT-S and UPerNet."""
    pairs = [(size, 1) for size in SIZES] + [(512, 2), (512, 4)]
    found = ((size, batch_size, ours("pcpvt-s", "inference", size, batch_size)) for size, batch_size in pairs)
    return [(size, batch_size, each["seconds"], each["bytes"]) for size, batch_size, each in found]


def plot(points: list[tuple[int, int, float, float]]) -> PIL.Image.Image:
    """Seconds and GiB of one image over megapixels, both axes logarithmic."""
    points = [point for point in points if point[1] == 1]
    picture = PIL.Image.new("RGB", (800, 310), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for left, title, column, scale in ((140, "seconds", 2, 1), (530, "peak memory, GiB", 3, 2**30)):
        area = np.log([size * size for size, *_ in points])
        values = np.array([point[column] for point in points]) / scale
        across = left + 250 * (area - area[0]) / (area[-1] - area[0])
        down = 270 - 200 * np.log(values / values.min()) / np.log(values.max() / values.min())
        draw.text((left, 15), title, fill="black", font=font)
        draw.line([*zip(across, down, strict=True)], fill=(180, 180, 180))
        for (size, *_), x, y, value in zip(points, across, down, values, strict=True):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(70, 110, 180))
            draw.text((x - 6, y - 6), f"{size}x{size}: {value:.3g}", fill="black", font=font, anchor="rb")
    return picture


def product_rate() -> float:
    """Billions of floating-point operations a second of a matrix product: no convolution does better without fewer."""
    matrix = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: matrix @ matrix, 1) for _ in range(10)) / 1e9


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def report(rows: list[str], points: list, rate: float) -> str:
    table = "\n".join(
        f"| {size}x{size} | {batch_size} | {spent:.3g} | {peak / 2**30:.2f} |"
        for size, batch_size, spent, peak in points
    )
    joined = "\n".join(rows)
    return f"""| ours | against | theirs | ours | theirs / ours (spread) |
| --- | --- | ---: | ---: | ---: |
{joined}

{processor()}, {torch.get_num_threads()} threads, {platform.system()}; float32; torch {torch.__version__}, transformers
{transformers.__version__}, timm {timm.__version__}. A product of two 2048x2048 matrices runs at {rate:.0f} GFLOP/s.

How inference with PCPVT-S and UPerNet grows:

| size | batch | seconds | peak memory, GiB |
| --- | ---: | ---: | ---: |
{table}

![seconds and memory over megapixels](performance.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmseg-python", help="interpreter of an environment with MMSegmentation")
    parser.add_argument("--openvino", action="store_true", help="time both there too; each environment needs openvino")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=7, help="of inference, defaults to %(default)s")
    parser.add_argument("--training-rounds", type=int, default=3, help="defaults to %(default)s")
    parser.add_argument("--out", default="docs", help="folder that the plot is written into")
    parser.add_argument("--measure", nargs=4, metavar=("MODEL", "TASK", "SIZE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        model, task, size, batch_size = args.measure
        print(json.dumps(measure(model, task, int(size), int(batch_size))))
        return

    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        for variant in args.variants:
            rows += inference_rows(variant, args.mmseg_python, args.openvino, args.rounds, Path(folder))
            print("\n".join(rows), file=sys.stderr)
    rows += processor_rows(args.rounds)
    if args.mmseg_python is not None:
        rows += [*training_rows(args.mmseg_python, args.training_rounds), inference_memory_row(args.mmseg_python)]
        print("\n".join(rows), file=sys.stderr)
    points = growth()
    plot(points).save(Path(args.out) / "performance.png")
    print(report(rows, points, product_rate()))
    print(f"measured in {time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
