"""
MMSegmentation's Twins with seeded random weights, what they compute, and how long it takes: for `fidelity.py` and the
benchmarks to hold ours against. It runs in an environment of its own, since MMSegmentation needs older packages:

    python -m venv mmseg
    mmseg/bin/pip install torch mmcv-lite==2.1.0 mmengine==0.10.7 mmsegmentation==1.2.2 "numpy<2.3" "setuptools<81" \
        ftfy regex
    mmseg/bin/python scripts/mmseg_reference.py twins_svt-s_uperhead svt-s.pth --sizes 512x512 448x700

With `--serve IMAGE MASK` it reads lines such as `5 forward` from its standard input and answers each with the seconds
that one of its stages took.
"""

import argparse
import functools
import json
import sys
import time
import types
from pathlib import Path

import torch
from torch import nn


def import_mmseg():
    """mmseg, with stand-ins for mmcv's compiled operators where mmcv-lite lacks them; no Twins model uses one."""
    try:
        import mmcv.ops  # noqa: F401
    except ModuleNotFoundError:

        class Operators(types.ModuleType):
            __path__ = []

            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (nn.Module,), {})

        for name in ("mmcv.ops", "mmcv.ops.point_sample"):
            sys.modules[name] = Operators(name)
    import mmseg

    return mmseg


def find_config(name: str) -> Path:
    """The one config whose file name starts with `name`."""
    folder = Path(import_mmseg().__file__).parent / ".mim" / "configs" / "twins"
    paths = [path for path in folder.glob("*.py") if path.stem.startswith(name)]
    if len(paths) != 1:
        known = ", ".join(sorted(path.stem for path in folder.glob("twins*.py")))
        raise SystemExit(f"error: {name} names {len(paths)} configs of {known}")
    return paths[0]


def build(name: str, seed: int = 0, small_activations: bool = False) -> nn.Module:
    """
    The model of the one MMSegmentation config whose file name starts with `name`, in evaluation mode.

    All biases, norms and batch-norm statistics are random too. With `small_activations`, patch embeddings and
    reduction convs are scaled by 0.01, so that every LayerNorm's epsilon shows in the output.
    """
    import_mmseg()
    from mmengine import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    settings = Config.fromfile(find_config(name)).model
    settings.backbone.init_cfg = None
    for part in settings.values():
        if isinstance(part, dict) and "norm_cfg" in part and part["norm_cfg"]["type"] == "SyncBN":
            part["norm_cfg"]["type"] = "BN"
    if settings.get("norm_cfg"):
        settings.norm_cfg.type = "BN"
    settings.data_preprocessor = None

    torch.manual_seed(seed)
    model = MODELS.build(settings)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
            if module_name.endswith("conv_seg"):
                module.weight.normal_(std=0.2)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
        if small_activations:
            for name, parameter in model.backbone.named_parameters():
                if name.startswith("patch_embeds") or ".attn.sr." in name:
                    parameter.mul_(0.01)
    return model.eval()


class Segmenter(nn.Module):
    """From pixel values to logits, without data preprocessing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.backbone(pixel_values)
        return self.model.decode_head(self.model.neck(features) if self.model.with_neck else features)


@torch.inference_mode()
def outputs_of(model: nn.Module, pixel_values: torch.Tensor) -> dict:
    """The four feature maps of the encoder, and the logits of the decode head and of the auxiliary head if any."""
    features = model.backbone(pixel_values)
    levels = model.neck(features) if model.with_neck else features
    outputs = {"pixel_values": pixel_values, "features": list(features), "logits": model.decode_head(levels)}
    if model.with_auxiliary_head:
        outputs["auxiliary_logits"] = model.auxiliary_head(levels)
    return outputs


@torch.inference_mode()
def serve(model: nn.Module, config: str, image: str, mask: str) -> None:
    """Times stages of an evaluation of `image` and of training on it, one a line of standard input, until it ends."""
    import_mmseg()
    import cv2
    from mmcv.transforms import Compose
    from mmengine import Config
    from mmseg.evaluation.metrics import IoUMetric
    from mmseg.models import SegDataPreProcessor

    settings = Config.fromfile(find_config(config))
    pipeline = Compose([step for step in settings.test_pipeline if step["type"] != "LoadAnnotations"])
    training_pipeline = Compose(settings.train_pipeline)
    preprocessor = SegDataPreProcessor(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    )
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])

    def preprocess():
        packed = pipeline({"img_path": image, "img_id": 0})
        pixels = packed["inputs"].flip(0).float()
        return ((pixels - mean[:, None, None]) / std[:, None, None])[None], packed["data_samples"].ori_shape[:2]

    def forward():
        return network(pixel_values)

    @functools.cache
    def compiled():
        import openvino

        program = openvino.convert_model(network, example_input=pixel_values, input=list(pixel_values.shape))
        return openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def postprocess():
        scores = logits
        for size in (pixel_values.shape[-2:], original_size):
            scores = nn.functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores[0].argmax(0)

    def metric():
        return IoUMetric.intersect_and_union(label_map, labels, logits.shape[1], 255)

    def cut_crop():
        files = {"img_path": image, "seg_map_path": mask, "reduce_zero_label": True, "seg_fields": []}
        return training_pipeline(files)

    def cut_normalised_crop():
        crop = cut_crop()
        return preprocessor({"inputs": [crop["inputs"]], "data_samples": [crop["data_samples"]]}, training=True)

    network = Segmenter(model).eval()
    pixel_values, original_size = preprocess()
    logits = forward()
    height, width = original_size
    labels = torch.randint(0, logits.shape[1], (height // 96 + 1, width // 96 + 1), dtype=torch.int32)
    labels = labels.repeat_interleave(96, 0).repeat_interleave(96, 1)[:height, :width]
    label_map = labels.roll(5, 1)
    stages = {
        "preprocessing": preprocess,
        "forward": forward,
        "forward in OpenVINO": lambda: compiled()(pixel_values.numpy()),
        "post-processing": postprocess,
        "metric": metric,
        "training transform": cut_normalised_crop,
        "training transform, without normalisation": cut_crop,
    }
    num_threads = torch.get_num_threads(), cv2.getNumThreads()
    print("ready", flush=True)
    for line in sys.stdin:
        repeats, stage = line.split(maxsplit=1)
        is_training = stage.startswith("training")  # a worker of a loader has one thread
        torch.set_num_threads(1 if is_training else num_threads[0])
        cv2.setNumThreads(1 if is_training else num_threads[1])
        started = time.perf_counter()
        for _ in range(int(repeats)):
            stages[stage.strip()]()
        print((time.perf_counter() - started) / int(repeats), flush=True)


def run_once(network: nn.Module, forward, loss, task: str, size: int, batch_size: int) -> dict:
    """
    Seconds of the second of two runs of a `task`, and the bytes that this process has held at most.

    Args:
        network: Whose parameters are trained.
        forward: From pixel values to an output, for the task "inference".
        loss: From pixel values and labels to a loss, for the task "training": a step with AdamW.
    """
    torch.manual_seed(0)
    pixel_values = torch.randn(batch_size, 3, size, size)
    if task == "training":
        labels = torch.randint(0, 150, (batch_size, size, size))
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-6)

        def run():
            optimizer.zero_grad()
            loss(pixel_values, labels).backward()
            optimizer.step()
    else:

        @torch.inference_mode()
        def run():
            forward(pixel_values)

    run()
    started = time.perf_counter()
    run()
    spent = time.perf_counter() - started
    return {"seconds": spent, "bytes": peak_memory()}


def peak_memory() -> int:
    """The most that this program took, in bytes. (What `resource` tells begins with what its parent took.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(model: nn.Module, task: str, size: int, batch_size: int) -> dict:
    """`run_once` of MMSegmentation's model."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    def loss(pixel_values, labels):
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label_map[None])) for label_map in labels]
        return sum(value for name, value in model.loss(pixel_values, samples).items() if "loss" in name)

    return run_once(model, Segmenter(model), loss, task, size, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the beginning of a config's name, as twins_svt-s_uperhead")
    parser.add_argument("out", help="file to write: a checkpoint, with what it computes under `outputs`")
    parser.add_argument("--sizes", nargs="+", default=["512x512"], metavar="HEIGHTxWIDTH")
    parser.add_argument("--serve", nargs=2, metavar=("IMAGE", "MASK"), help="write weights alone, then time stages")
    parser.add_argument(
        "--measure",
        nargs=3,
        metavar=("TASK", "SIZE", "BATCH"),
        help="print seconds and bytes of training or inference",
    )
    parser.add_argument("--small-activations", action="store_true", help="let every LayerNorm's epsilon show")
    args = parser.parse_args()

    model = build(args.config, small_activations=args.small_activations)
    if args.measure is not None:
        task, size, batch_size = args.measure
        print(json.dumps(measure(model, task, int(size), int(batch_size))))
        return
    if args.serve is not None:
        torch.save({"state_dict": model.state_dict()}, args.out)
        serve(model, args.config, *args.serve)
        return
    generator = torch.Generator().manual_seed(1)
    sizes = [tuple(int(side) for side in size.split("x")) for size in args.sizes]
    outputs = [outputs_of(model, torch.randn(1, 3, *size, generator=generator)) for size in sizes]
    version = f"MMSegmentation {import_mmseg().__version__} (torch {torch.__version__})"
    torch.save({"state_dict": model.state_dict(), "outputs": outputs, "version": version}, args.out)


if __name__ == "__main__":
    main()
