import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import TINY, randomize

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor
from twins_hf.configuration_twins import VARIANTS
from twins_hf.data.ade20k import ADE20K_CLASSES
from twins_hf.results import find_variant, published

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_checkpoints.py"


def test_a_variant_is_told_from_its_configuration():
    for variant in VARIANTS:
        config = TwinsConfig.from_variant(variant, num_labels=7, norm_after_stage=False)
        assert find_variant(TwinsConfig.from_dict(json.loads(config.to_json_string()))) == variant
    assert find_variant(TwinsConfig(**TINY)) is None


def test_published_numbers_stand_beside_their_variant():
    assert published("authors", "upernet", "svt-b") == ("47.4", "48.9")
    assert published("mmseg", "fpn", "pcpvt-s") == ("43.26", "44.11")
    assert published("authors", "fpn", "svt-s") == published("mmseg", "upernet", None) == ("-", "-")


@pytest.fixture
def ade20k_folder(tmp_path):
    """Two images in ADEChallengeData2016's layout."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind, shape, top in (("images", (40, 60, 3), 256), ("annotations", (40, 60), 151)):
            (folder / kind / split).mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, top, shape, dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / kind / split / f"ADE_{index}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i + 1}\t0\t0\t0\t{name}" for i, name in enumerate(ADE20K_CLASSES))]
    (folder / "objectInfo150.txt").write_text("\n".join(lines))
    return folder


def test_checkpoints_are_set_beside_the_published_table_by_one_command(ade20k_folder, tmp_path):
    model = randomize(TwinsForSemanticSegmentation(TwinsConfig(**TINY, id2label=dict(enumerate(ADE20K_CLASSES)))))
    model.save_pretrained(tmp_path / "tiny")
    TwinsImageProcessor(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(tmp_path / "tiny")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "tiny"), "--dataset_name", str(ade20k_folder), "--use_cpu"]
    command += ["--out", str(tmp_path / "results.md")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    header, _, row = (tmp_path / "results.md").read_text().splitlines()[2:5]
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["Method"] == "UPerNet" and cells["Backbone"] == "OTHER (tiny)" and cells["Crop Size"] == "512x512"
    assert all(0 <= float(cells[name]) < 100 for name in ("mIoU", "mIoU(ms+flip)", "of 144", "of 144 (ms+flip)"))
    assert cells["mIoU"] != cells["mIoU(ms+flip)"] and cells["authors' mIoU"] == "-"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    command[2] = str(tmp_path / "missing.pth")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1 and "missing.pth: cannot be read" in finished.stderr
    assert "Traceback" not in finished.stderr
