import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from twins_hf import TwinsImageProcessor
from twins_hf.inference import segment
from twins_hf.publishing import add_model_code

# A process that cannot import twins_hf: the finder stands before all others.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "twins_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
if sys.argv[3] == "without torchvision":
    sys.modules["torchvision"] = None
import numpy as np
import PIL.Image
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, pipeline
folder = sys.argv[1]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "twins"
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "TwinsModel"
run = pipeline("image-segmentation", folder, trust_remote_code=True)
print(type(run.image_processor).__name__)
label_map = np.zeros((60, 80), np.uint8)
for found in run(folder + "/photo.png"):
    label_map[np.asarray(found["mask"]) > 0] = int(found["label"][-1])
np.save(sys.argv[2], label_map)
"""


@pytest.mark.parametrize("torchvision", ["with torchvision", "without torchvision"])
def test_a_published_folder_loads_where_twins_hf_is_not_installed(tiny_model, tmp_path, torchvision):
    processor = TwinsImageProcessor(size={"shortest_edge": 48, "longest_edge": 192})
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    folder = tmp_path / "published"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image.save(folder / "photo.png")
    add_model_code(folder)
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "found.npy"), torchvision]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert finished.returncode == 0, finished.stderr[-3000:]
    suffix = "Pil" if torchvision == "without torchvision" else ""
    assert finished.stdout.split()[-1] == f"TwinsImageProcessor{suffix}"
    (expected,) = segment(tiny_model, processor, [image])
    assert (torch.from_numpy(np.load(tmp_path / "found.npy")) == expected).float().mean() > 0.999


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no config.json"):
        add_model_code(tmp_path)
