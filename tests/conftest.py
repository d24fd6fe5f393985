"""Settings and material that all tests share."""

import os
import tempfile

# Before transformers and datasets are imported: no test may reach the Hub, nor leave files in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="twins_hf_tests_")

import json  # noqa: E402

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation  # noqa: E402

TINY = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [2, 2, 2, 2],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
    "auxiliary_channels": 8,
    "drop_path_rate": 0.0,
}
FAMILIES = {"pcpvt": {}, "svt": {"window_sizes": [7, 7, 7, 7], "norm_after_stage": True}}


@pytest.fixture(params=FAMILIES)
def tiny_config(request) -> TwinsConfig:
    """Both families in small widths, three classes."""
    return TwinsConfig(**TINY, **FAMILIES[request.param], num_labels=3)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight, bias and batch-norm statistic random, so that each of them shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype == torch.float32:
                noise = torch.randn(tensor.shape, generator=generator)
                is_scale = "norm" in name and name.endswith("weight")
                if "running_var" in name:
                    tensor.copy_(0.5 + noise.abs())
                elif is_scale:
                    tensor.copy_(1 + 0.2 * noise)
                elif tensor.ndim > 1:
                    tensor.copy_(noise / tensor[0].numel() ** 0.5)
                else:
                    tensor.copy_(0.2 * noise)
    return model.eval()


@pytest.fixture
def tiny_model(tiny_config) -> TwinsForSemanticSegmentation:
    return randomize(TwinsForSemanticSegmentation(tiny_config))


@pytest.fixture
def image_folder(tmp_path):
    """Six images of unequal sizes with masks of three classes and 255, four to train on and two to validate on."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            height, width = 40 + 8 * index, 70 - 9 * index
            mask = np.repeat(np.repeat(rng.integers(0, 3, (5, 5), dtype=np.uint8), 15, 0), 15, 1)[
                :height, :width
            ].copy()
            mask[:3] = 255
            colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], dtype=np.uint8)
            image = colors[np.where(mask == 255, 0, mask)] + rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(folder / "images" / split / f"photo_{index}.png")
            PIL.Image.fromarray(mask).save(folder / "annotations" / split / f"photo_{index}.png")
    (folder / "id2label.json").write_text(json.dumps({"0": "red", "1": "green", "2": "blue"}))
    return folder
