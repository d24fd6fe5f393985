#!/usr/bin/env python
"""Time the stages of an evaluation and the training transform, ours and theirs in turn: images per second and ratios.

python scripts/benchmark_stages.py --variant pcpvt-s
python scripts/benchmark_stages.py --variant pcpvt-s --mmseg-python mmseg/bin/python --image photo.jpg

timm's encoder is timed where timm is installed; MMSegmentation's stages with the interpreter of an environment that
has it (scripts/mmseg_reference.py says how to make one), on the same weights; the metric beside the Hub's algorithm.
The training transform goes from the files of an image and its mask to a normalised crop of 512x512, on one thread;
MMSegmentation normalises crops on the training device, so its pipeline is timed with that step and without.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
import torch
from transformers.utils import is_timm_available

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor
from twins_hf.configuration_twins import VARIANTS
from twins_hf.conversion import load_model
from twins_hf.data import SegmentationTrainTransform
from twins_hf.data.loading import read_training_example
from twins_hf.evaluation import MEAN_IOU
from twins_hf.image_processing_pil_twins import largest_class, open_image

STAGES = ("preprocessing", "forward", "post-processing", "metric")
TRAINING_STAGES = ("training transform", "training transform, without normalisation")  # ours always normalises
CROPS = 32  # that a round of the training transform cuts: each draws another scale
TIMM_NAMES = {"s": "small", "b": "base", "l": "large"}
HEADS = {"upernet": "uperhead", "fpn": "fpn"}


def seconds(function: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def hub_counts(prediction: np.ndarray, labels: np.ndarray, num_labels: int) -> list[np.ndarray]:
    """What the Hub's mean_iou counts of an image: histograms over the classes of hits, predictions and labels."""
    counted = labels != 255
    prediction, labels = prediction[counted], labels[counted]
    maps = (prediction[prediction == labels], prediction, labels)
    return [np.histogram(values, bins=num_labels, range=(0, num_labels - 1))[0] for values in maps]


class MMSegmentation:
    """MMSegmentation's stages in an interpreter of its own, which waits while ours run."""

    def __init__(self, python: str, config: str, checkpoint: Path, image: str, mask: str):
        script = str(Path(__file__).with_name("mmseg_reference.py"))
        command = [python, script, config, str(checkpoint), "--serve", image, mask]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for line in self.process.stdout:  # what mmengine prints, then the line that says it waits
            if line == "ready\n":
                return
        sys.exit(f"error: {' '.join(command)} ended with {self.process.wait()}")

    def seconds(self, stage: str, repeats: int) -> float:
        print(repeats, stage, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def segments(size: tuple[int, int], num_labels: int) -> np.ndarray:
    """A label map (height, width) of patches, with boundaries on two of a hundred pixels, as ADE20K's masks have."""
    patches = np.random.default_rng(0).integers(0, num_labels, [side // 96 + 1 for side in size], dtype=np.int32)
    return np.ascontiguousarray(patches.repeat(96, axis=0).repeat(96, axis=1)[: size[0], : size[1]])


def our_stages(model: TwinsForSemanticSegmentation, image: str, mask: str) -> dict[str, Callable[[], object]]:
    image_processor, metric, transform = TwinsImageProcessor(), evaluate.load(MEAN_IOU), SegmentationTrainTransform()
    row = {"image": {"path": image, "bytes": None}, "label": {"path": mask, "bytes": None}}

    def preprocess():
        return image_processor(open_image(image), return_tensors="pt")["pixel_values"]

    def forward():
        return model(pixel_values).logits[0]

    def postprocess():
        return largest_class(logits, original_size, input_size, input_size)

    def score():
        metric.add(prediction=label_map, reference=labels)

    def cut_crop():
        example = read_training_example(row, 0, do_reduce_labels=True)
        return transform(example.pixels, example.labels)

    pixel_values, original_size = preprocess(), open_image(image).size[::-1]
    logits, input_size = forward(), tuple(pixel_values.shape[-2:])
    labels = segments(original_size, model.config.num_labels)
    label_map = np.roll(labels, 5, axis=1)
    return {
        "preprocessing": preprocess,
        "forward": forward,
        "post-processing": postprocess,
        "metric": score,
        "training transform": on_one_thread(cut_crop),
        "metric, as the Hub counts": lambda: hub_counts(label_map, labels, model.config.num_labels),
        "encoder": lambda: model.twins(pixel_values),
        **timm_encoder(model, pixel_values),
    }


def on_one_thread(function: Callable[[], object]) -> Callable[[], None]:
    def repeat():
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(CROPS):
            function()
        torch.set_num_threads(num_threads)

    return repeat


def timm_encoder(model: TwinsForSemanticSegmentation, pixel_values: torch.Tensor) -> dict[str, Callable[[], object]]:
    if not is_timm_available():
        return {}
    import timm

    widths = (list(model.config.hidden_sizes), list(model.config.depths))
    variant = next(v for v, f in VARIANTS.items() if (list(f["hidden_sizes"]), list(f["depths"])) == widths)
    family, size = variant.split("-")
    encoder = timm.create_model(f"twins_{family}_{TIMM_NAMES[size]}", num_classes=0).eval()
    return {"encoder, timm": lambda: encoder.forward_features(pixel_values)}


@torch.inference_mode()
def measure(
    model: TwinsForSemanticSegmentation, image: str, mask: str, theirs: MMSegmentation | None, rounds: int
) -> dict:
    """Seconds of each stage in each round; ours and theirs take turns within a round."""
    ours = our_stages(model, image, mask)
    times = {(stage, "ours"): [] for stage in ours}
    if theirs is not None:
        times |= {(stage, "MMSegmentation"): [] for stage in (*STAGES, *TRAINING_STAGES)}
    for _ in range(rounds):
        for stage, function in ours.items():
            if stage == "training transform":
                times[stage, "ours"].append(seconds(function, 1) / CROPS)
                for their_stage in TRAINING_STAGES if theirs is not None else ():
                    times[their_stage, "MMSegmentation"].append(theirs.seconds(their_stage, CROPS))
                continue
            repeats = 20 if "metric" in stage else 5 if stage == "preprocessing" else 1  # what is brief, more often
            times[stage, "ours"].append(seconds(function, repeats))
            if theirs is not None and stage in STAGES:
                times[stage, "MMSegmentation"].append(theirs.seconds(stage, repeats))
    return times


def report(times: dict) -> str:
    def rate(name: str, whose: str = "ours") -> str:
        return f"{1 / np.median(times[name, whose]):.3g}"

    def ratio(slow: tuple[str, str], fast: tuple[str, str]) -> str:
        if slow not in times or fast not in times:
            return "-"
        ratios = np.array(times[slow]) / np.array(times[fast])
        return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"

    lines = ["| stage | ours, images/s | MMSegmentation, images/s | ratio (spread) |", "| --- | ---: | ---: | ---: |"]
    for stage in (*STAGES, *TRAINING_STAGES):
        our_stage = stage.split(",")[0]
        theirs = rate(stage, "MMSegmentation") if (stage, "MMSegmentation") in times else "-"
        both = ratio((stage, "MMSegmentation"), (our_stage, "ours"))
        if stage == our_stage or theirs != "-":
            lines.append(f"| {stage} | {rate(our_stage)} | {theirs} | {both} |")
    lines += ["", "| ours | images/s | theirs | images/s | ratio (spread) |", "| --- | ---: | --- | ---: | ---: |"]
    for stage, other in (("metric", "metric, as the Hub counts"), ("encoder", "encoder, timm")):
        if (other, "ours") in times:
            compared = ratio((other, "ours"), (stage, "ours"))
            lines.append(f"| {stage} | {rate(stage)} | {other} | {rate(other)} | {compared} |")
    evaluated = "In evaluation, all but the forward pass takes"
    rest = sum(np.array(times[stage, "ours"]) for stage in STAGES if stage != "forward")
    share = rest / np.array(times["forward", "ours"])
    lines += [
        "",
        f"{evaluated} {100 * np.median(share):.1f} % of it (to {100 * share.max():.1f} %).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="pcpvt-s")
    parser.add_argument("--decoder-type", choices=list(HEADS), default="upernet")
    parser.add_argument("--image", help="photograph; one of 683x512 is made where none is given")
    parser.add_argument("--mask", help="the photograph's mask, 0 unlabelled and classes from 1; made where not given")
    parser.add_argument("--rounds", type=int, default=7, help="how often each stage is timed, defaults to %(default)s")
    parser.add_argument("--mmseg-python", help="interpreter of an environment with MMSegmentation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image, mask, checkpoint, theirs = args.image, args.mask, Path(folder) / "mmseg.pth", None
        if image is None:
            image = str(Path(folder) / "photo.jpg")
            pixels = np.random.default_rng(0).integers(0, 256, (512, 683, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(image)
        size = PIL.Image.open(image).size
        if mask is None:
            mask = str(Path(folder) / "mask.png")
            PIL.Image.fromarray((segments(size[::-1], 150) + 1).astype(np.uint8)).save(mask)
        if args.mmseg_python is not None:
            config = f"twins_{args.variant}_{HEADS[args.decoder_type]}"
            theirs = MMSegmentation(args.mmseg_python, config, checkpoint, image, mask)
            model, _ = load_model(checkpoint)
        else:
            config = TwinsConfig.from_variant(args.variant, decoder_type=args.decoder_type, num_labels=150)
            model = TwinsForSemanticSegmentation(config).eval()
        print(
            f"{args.variant}, {args.decoder_type}, {size[0]}x{size[1]}, {torch.get_num_threads()} threads, float32\n"
        )
        print(report(measure(model, image, mask, theirs, args.rounds)))


if __name__ == "__main__":
    main()
