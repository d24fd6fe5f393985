"""
Makes a saved folder load where twins_hf is not installed, with `trust_remote_code=True`.

`save_pretrained` leaves this out on purpose: transformers asks before it uses a folder's own code, even where the
classes are registered, and a `pipeline` on one's own folder should not ask.
"""

import json
import shutil
from pathlib import Path

CODE = (
    "configuration_twins",
    "convolution_twins",
    "loss_twins",
    "modeling_twins",
    "image_processing_twins",
    "image_processing_pil_twins",
    "resizing_twins",
)
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_twins.TwinsConfig",
    "AutoModel": "modeling_twins.TwinsModel",
    "AutoBackbone": "modeling_twins.TwinsBackbone",
    "AutoModelForImageClassification": "modeling_twins.TwinsForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_twins.TwinsForSemanticSegmentation",
}
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_twins.TwinsImageProcessor",
        "pil": "image_processing_pil_twins.TwinsImageProcessorPil",
    }
}


def add_model_code(folder: str | Path) -> None:
    """
    Copies the code of model and processors into a folder that `save_pretrained` wrote, and names it in the folder's
    `config.json` and, where there is one, `preprocessor_config.json`.

    Raises:
        `ValueError`: if the folder has no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: there is no config.json; save the model there first.")
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), folder / f"{name}.py")
    for name, auto_map in (("config.json", MODEL_AUTO_MAP), ("preprocessor_config.json", PROCESSOR_AUTO_MAP)):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**settings, "auto_map": auto_map}, indent=2) + "\n", encoding="utf-8")
