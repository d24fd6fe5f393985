#!/usr/bin/env python
"""Hold every variant and head against MMSegmentation and timm, and write the largest errors as a report.

python scripts/fidelity.py --mmseg-python mmseg/bin/python

The interpreter is of an environment that has MMSegmentation; scripts/mmseg_reference.py says how to make one.
timm comes with this package's test extra. All twelve MMSegmentation configs take about 20 minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import transformers
from benchmark_stages import TIMM_NAMES
from tqdm import tqdm

from twins_hf.configuration_twins import VARIANTS
from twins_hf.conversion import import_state_dict, load_model, model_for

REFERENCE = Path(__file__).with_name("mmseg_reference.py")
HEADS = {"uperhead": "UPerNet", "fpn": "Semantic FPN"}
MMSEG_SIZES = [(512, 512), (448, 700), (512, 700), (700, 512), (333, 517)]
TIMM_SIZES = [(224, 224), (256, 320), (250, 331)]
MMSEG_TOLERANCE, TIMM_TOLERANCE = 1e-4, 1e-5
# Settings of a converted checkpoint, and what another reference has there.
OTHER_SETTINGS = {"window_padding": ["masked", "unmasked"], "patch_padding": [False], "layer_norm_eps": [1e-6]}
WEIGHTS = {False: "random", True: "random, small activations"}


@dataclass
class Comparison:
    """One reference with one set of weights; `errors` are the largest of any output, one for each size."""

    name: str
    small_activations: bool
    errors: list[float]
    num_labels_compared: int = 0
    num_labels_differing: int = 0


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, over the largest expected value; NaN for another shape."""
    if found.shape != expected.shape:
        return float("nan")
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def segmenter_outputs(model: torch.nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Logits, feature maps, and the auxiliary head's logits if there is one."""
    outputs = model(pixel_values, output_hidden_states=True)
    features = outputs.hidden_states[1:]
    auxiliary = [model.auxiliary_head(features)] if model.auxiliary_head is not None else []
    return [outputs.logits, *features, *auxiliary]


def make_mmseg_checkpoint(python: str, config: str, small_activations: bool, path: Path) -> dict:
    """The file that mmseg_reference.py writes, loaded."""
    command = [python, str(REFERENCE), config, str(path), "--sizes", *(f"{h}x{w}" for h, w in MMSEG_SIZES)]
    if small_activations:
        command.append("--small-activations")
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{finished.stderr}")
    return torch.load(path, weights_only=True)


def compare_with_mmseg(variant: str, head: str, small_activations: bool, checkpoint: Path, theirs: dict) -> Comparison:
    """The converted checkpoint's features and logits; labels only where MMSegmentation's two largest logits differ by
    more than the tolerance."""
    model, _ = load_model(checkpoint)
    comparison = Comparison(f"{variant} | {HEADS[head]}", small_activations, [])
    for outputs in theirs["outputs"]:
        auxiliary = [outputs["auxiliary_logits"]] if "auxiliary_logits" in outputs else []
        expected = [outputs["logits"], *outputs["features"], *auxiliary]
        found = segmenter_outputs(model, outputs["pixel_values"])
        comparison.errors.append(max(relative_error(a, b) for a, b in zip(found, expected, strict=True)))
        first, second = expected[0].topk(2, dim=1).values.unbind(1)
        is_clear = first - second > MMSEG_TOLERANCE * expected[0].abs().max()
        comparison.num_labels_compared += int(is_clear.sum())
        comparison.num_labels_differing += int((found[0].argmax(1) != expected[0].argmax(1))[is_clear].sum())
    return comparison


@torch.inference_mode()
def compare_with_timm(variant: str, small_activations: bool) -> Comparison:
    """A classifier's logits and feature maps."""
    torch.manual_seed(0)
    family, size = variant.split("-")
    theirs = timm.create_model(f"twins_{family}_{TIMM_NAMES[size]}").eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
        if small_activations and ("patch_embeds" in name or ".attn.sr." in name):
            parameter.mul_(0.01)
    theirs.head.weight.normal_(std=0.1)
    tensors = theirs.state_dict()
    model, source = model_for(tensors)
    import_state_dict(model.eval(), tensors, source)
    comparison = Comparison(variant, small_activations, [])
    for size in TIMM_SIZES:
        pixel_values = torch.randn(1, 3, *size)
        outputs = model(pixel_values, output_hidden_states=True)
        features = theirs.forward_intermediates(pixel_values, intermediates_only=True)
        pairs = [(outputs.logits, theirs(pixel_values)), *zip(outputs.hidden_states[1:], features, strict=True)]
        comparison.errors.append(max(relative_error(a, b) for a, b in pairs))
    return comparison


def errors_of_other_settings(checkpoint: Path, theirs: dict) -> dict[str, list[float]]:
    """What each setting of the converted model is worth: the logits' errors with another value in its place."""
    errors = {}
    for field, values in OTHER_SETTINGS.items():
        for value in values:
            model, _ = load_model(checkpoint)
            setattr(model.config, field, value)
            other = type(model)(model.config).eval()
            other.load_state_dict(model.state_dict())
            errors[f"`{field}={value!r}`"] = [
                relative_error(segmenter_outputs(other, outputs["pixel_values"])[0], outputs["logits"])
                for outputs in theirs["outputs"]
            ]
    return errors


def table(header: str, sizes: list[tuple[int, int]], rows: list[tuple[str, list[float]]]) -> str:
    columns = header.count("|") + 1
    lines = [
        f"| {header} | {' | '.join(f'{height}x{width}' for height, width in sizes)} |",
        "| " + " | ".join(["---"] * columns + ["---:"] * len(sizes)) + " |",
    ]
    cells = (" | ".join("other size" if error != error else f"{error:.1e}" for error in errors) for _, errors in rows)
    return "\n".join([*lines, *(f"| {name} | {cell} |" for (name, _), cell in zip(rows, cells, strict=True))])


def report(mmseg: list[Comparison], from_timm: list[Comparison], others: dict, version: str) -> str:
    def rows(comparisons):
        return [(f"{c.name} | {WEIGHTS[c.small_activations]}", c.errors) for c in comparisons]

    compared, differing = (
        sum(getattr(c, name) for c in mmseg) for name in ("num_labels_compared", "num_labels_differing")
    )
    return f"""# Fidelity

What twins_hf computes with converted checkpoints, against the implementations they come from: the largest difference
of any output over the largest value of that output, in float32 on a CPU. Made by `python scripts/fidelity.py`, which
ends with an error where a figure exceeds its tolerance.

Weights, biases, norms and batch-norm statistics are random and seeded: the computation is held, whatever the weights.
"Small activations" scales patch embeddings and reduction convs by 0.01, which makes a wrong LayerNorm epsilon show.

twins_hf with torch {torch.__version__} and transformers {transformers.__version__}, against {version} and timm
{timm.__version__}.

## MMSegmentation: segmentation models

The encoder's four feature maps, the logits, and the auxiliary head's logits (UPerNet), 150 classes, converted from the
saved `.pth`. Tolerance {MMSEG_TOLERANCE:.0e}. Labels differ on {differing:,} of the {compared:,} pixels where the two
largest logits differ by more than that.

{table("Encoder | Head | Weights", MMSEG_SIZES, rows(mmseg))}

## timm: encoders and classifiers

The classifier's logits and the four feature maps. timm has the keys and the settings of the authors' ImageNet code.
Tolerance {TIMM_TOLERANCE:.0e}.

{table("Encoder | Weights", TIMM_SIZES, rows(from_timm))}

## What the settings are worth

The references differ among themselves; converters set `window_padding`, `patch_padding` and `layer_norm_eps` to what a
checkpoint's source has. The error of the logits against MMSegmentation (`svt-s`, Semantic FPN, small activations) when
one of them is another source's:

{table("Setting in place of MMSegmentation's", MMSEG_SIZES, list(others.items()))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmseg-python", required=True, help="interpreter of an environment with MMSegmentation")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", default="docs/fidelity.md", help="file to write, defaults to %(default)s")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    from_timm = [compare_with_timm(variant, small) for variant in tqdm(args.variants, "timm") for small in WEIGHTS]
    mmseg, others, version = [], {}, ""
    jobs = [(variant, head, small) for variant in args.variants for head in HEADS for small in WEIGHTS]
    for variant, head, small in tqdm(jobs, "MMSegmentation"):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / f"{variant}_{head}.pth"
            theirs = make_mmseg_checkpoint(args.mmseg_python, f"twins_{variant}_{head}", small, checkpoint)
            mmseg.append(compare_with_mmseg(variant, head, small, checkpoint, theirs))
            if (variant, head, small) == ("svt-s", "fpn", True):
                others = errors_of_other_settings(checkpoint, theirs)
            version = theirs["version"]

    Path(args.out).write_text(report(mmseg, from_timm, others, version), encoding="utf-8")
    print(f"wrote {args.out}")
    wrong = [c for c in mmseg if max(c.errors) > MMSEG_TOLERANCE or c.num_labels_differing]
    wrong += [c for c in from_timm if max(c.errors) > TIMM_TOLERANCE]
    if wrong:
        sys.exit("error: beyond the tolerance: " + "; ".join(f"{c.name} {max(c.errors):.1e}" for c in wrong))


if __name__ == "__main__":
    main()
