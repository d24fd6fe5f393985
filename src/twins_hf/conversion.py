"""
Checkpoints that people hold, to this library's and back.

A source names its tensors differently but holds the same ones; only MMSegmentation packs the query and the key-value
projection of GSA into one. So each source is one function from our names to theirs, and the other direction is that
function's inverse. `SOURCES` lists them:

- `"official"`: the authors' ImageNet and segmentation checkpoints, and `"timm"`, whose keys are the ImageNet ones;
- `"mmseg"`: MMSegmentation's backbones and segmentors.
"""

import argparse
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from .configuration_twins import VARIANTS, TwinsConfig
from .data.ade20k import ADE20K_CLASSES
from .image_processing_twins import TwinsImageProcessor
from .modeling_twins import (
    TwinsForImageClassification,
    TwinsForSemanticSegmentation,
    TwinsModel,
    TwinsPreTrainedModel,
)

SOURCES = ("official", "timm", "mmseg")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

STAGE, LAYER = r"stages\.(\d)\.", r"stages\.(\d)\.layers\.(\d+)\."
# Encoder names, tried in order: ours, the authors' and timm's, MMSegmentation's.
ENCODER_NAMES = [
    (r"embeddings\.projection", r"patch_embeds.0.proj", r"patch_embeds.0.projection"),
    (r"embeddings\.layernorm", r"patch_embeds.0.norm", r"patch_embeds.0.norm"),
    (STAGE + r"patch_embeddings\.projection", r"patch_embeds.\1.proj", r"patch_embeds.\1.projection"),
    (STAGE + r"patch_embeddings\.layernorm", r"patch_embeds.\1.norm", r"patch_embeds.\1.norm"),
    (LAYER + r"layernorm_before", r"blocks.\1.\2.norm1", r"layers.\1.\2.norm1"),
    (LAYER + r"layernorm_after", r"blocks.\1.\2.norm2", r"layers.\1.\2.norm2"),
    (LAYER + r"attention\.sequence_reduction", r"blocks.\1.\2.attn.sr", r"layers.\1.\2.attn.sr"),
    (LAYER + r"attention\.layernorm", r"blocks.\1.\2.attn.norm", r"layers.\1.\2.attn.norm"),
    (LAYER + r"attention\.(q|kv)_proj\.", r"blocks.\1.\2.attn.\3.", r"layers.\1.\2.attn.attn.in_proj_"),
    (LAYER + r"attention\.qkv_proj", r"blocks.\1.\2.attn.qkv", r"layers.\1.\2.attn.qkv"),
    (LAYER + r"attention\.o_proj", r"blocks.\1.\2.attn.proj", r"layers.\1.\2.attn.proj"),
    (LAYER + r"mlp\.fc1", r"blocks.\1.\2.mlp.fc1", r"layers.\1.\2.ffn.layers.0.0"),
    (LAYER + r"mlp\.fc2", r"blocks.\1.\2.mlp.fc2", r"layers.\1.\2.ffn.layers.1"),
    (STAGE + r"position_encoding\.projection", r"pos_block.\1.proj.0", r"position_encodings.\1.proj"),
    (STAGE + r"layernorm", r"norm_list.\1", r"norm_list.\1"),
    (r"layernorm", r"norm", r"norm"),
]
# The decode heads were MMSegmentation's in every source.
HEAD_NAMES = [
    (r"decode_head\.pyramid_pooling\.pools\.(\d)\.1\.", r"decode_head.psp_modules.\1.1."),
    (r"decode_head\.pyramid_pooling\.bottleneck", r"decode_head.bottleneck"),
    (r"auxiliary_head\.conv\.", r"auxiliary_head.convs.0."),
    (r"(decode|auxiliary)_head\.classifier", r"\1_head.conv_seg"),
]


def their_name(name: str, source: str, config: TwinsConfig) -> str:
    """
    What `source` calls our tensor `name`. In `"mmseg"`, `q_proj` and `kv_proj` share a name: theirs is both, in this
    order, along the first dimension.
    """
    if name.startswith("twins."):
        name = name.removeprefix("twins.")
        theirs = next(
            re.sub(f"^{ours}", mmseg if source == "mmseg" else official, name)
            for ours, official, mmseg in ENCODER_NAMES
            if re.match(ours, name)
        )
        layer = re.match(r"layers\.\d\.(\d+)\.attn\.proj", theirs)
        if layer and (config.window_sizes is None or int(layer[1]) % 2):  # GSA is torch's own attention there
            theirs = theirs.replace(".attn.proj.", ".attn.attn.out_proj.")
        return theirs
    if name.startswith("classifier."):
        return name.replace("classifier.", "head.")
    for ours, theirs in HEAD_NAMES:
        name = re.sub(rf"^{ours}", theirs, name)
    name = name.replace(".batch_norm.", ".bn.")
    if config.decoder_type == "fpn":
        name = re.sub(r"decode_head\.(lateral_convs|fpn_convs)\.(\d)\.", r"neck.\1.\2.conv.", name)
        # An upsampling follows each convolution of the coarser levels and counts as a module.
        name = re.sub(
            r"decode_head\.scale_heads\.(\d)\.(\d)\.",
            lambda found: f"decode_head.scale_heads.{found[1]}.{int(found[2]) * (2 if found[1] != '0' else 1)}.",
            name,
        )
    return name


def names_of(model: TwinsPreTrainedModel, source: str) -> dict[str, list[str]]:
    """Every tensor name of `source` for `model`, with the names of ours that it holds, in order."""
    is_segmenter = isinstance(model, TwinsForSemanticSegmentation)
    names: dict[str, list[str]] = {}
    for ours in model.state_dict():
        name = ours if not isinstance(model, TwinsModel) else f"twins.{ours}"
        theirs = their_name(name, source, model.config)
        if is_segmenter and name.startswith("twins."):
            theirs = f"backbone.{theirs}"
        names.setdefault(theirs, []).append(ours)
    return names


def export_state_dict(model: TwinsPreTrainedModel, target: str) -> dict[str, torch.Tensor]:
    """
    The model's tensors under the names of `target`.

    Raises:
        `ValueError`: if `target` is none of `SOURCES` or has no such models (timm: encoders and classifiers only).
    """
    if target not in SOURCES:
        raise ValueError(f"target={target!r} is unknown: choose one of {', '.join(SOURCES)}.")
    if target == "timm" and isinstance(model, TwinsForSemanticSegmentation):
        raise ValueError("timm has encoders and classifiers, but no segmentation models.")
    tensors = model.state_dict()
    exported = {
        theirs: torch.cat([tensors[name] for name in ours]) if len(ours) > 1 else tensors[ours[0]]
        for theirs, ours in names_of(model, target).items()
    }
    if target == "mmseg":  # its backbones have no classifier
        exported = {name: tensor for name, tensor in exported.items() if not name.startswith("head.")}
    return exported


def import_state_dict(model: TwinsPreTrainedModel, tensors: Mapping[str, torch.Tensor], source: str) -> list[str]:
    """
    Fills `model` with tensors under the names of `source`.

    Returns:
        The names that the source is known to carry unused (a segmentation model's final norm and classifier).

    Raises:
        `ValueError`: listing the names that are missing, unknown or of another shape; the model is then as it was.
    """
    names, own = names_of(model, source), model.state_dict()
    unused = []
    if isinstance(model, TwinsForSemanticSegmentation):
        unused = [name for name in tensors if re.fullmatch(r"backbone\.(norm|head)\.(weight|bias)", name)]
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and name not in unused]
    converted, misshaped = {}, []
    for theirs, ours in names.items():
        if theirs in tensors:
            sizes = [len(own[name]) if own[name].ndim else 1 for name in ours]
            parts = [tensors[theirs]]
            if len(ours) > 1 and len(tensors[theirs]) == sum(sizes):
                parts = tensors[theirs].split(sizes)
            for name, part in zip(ours, parts, strict=False):
                converted[name] = part
                if part.shape != own[name].shape:
                    misshaped.append(f"{theirs} {tuple(part.shape)}, not {tuple(own[name].shape)}")
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for kind, found in (("missing", missing), ("unknown", unknown), ("of another shape", misshaped))
        if found
    ]
    if problems:
        raise ValueError(f"tensors do not fit a {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(converted)
    return unused


def model_for(tensors: Mapping[str, torch.Tensor]) -> tuple[TwinsPreTrainedModel, str]:
    """
    An empty model for another source's tensors, and that source, told from names and shapes alone.

    Raises:
        `ValueError`: if the names are of no source, or the widths and depths of no published variant.
    """
    is_segmenter = any(name.startswith("backbone.") for name in tensors)
    encoder = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    if "patch_embeds.0.projection.weight" in encoder:
        source, embedding, blocks = "mmseg", "projection", "layers"
        settings = {"layer_norm_eps": 1e-5, "window_padding": "mmseg", "patch_padding": True}
    elif "patch_embeds.0.proj.weight" in encoder:
        source, embedding, blocks = "official", "proj", "blocks"
        window_padding = "mmseg" if is_segmenter else "unmasked"
        settings = {"layer_norm_eps": 1e-6, "window_padding": window_padding, "patch_padding": False}
    else:
        raise ValueError(f"names such as {', '.join(list(tensors)[:3])} are of no known source of Twins checkpoints.")

    weights = [encoder.get(f"patch_embeds.{stage}.{embedding}.weight") for stage in range(4)]
    widths = tuple(len(weight) for weight in weights if weight is not None)
    found = [re.match(rf"{blocks}\.(\d)\.(\d+)\.", name) for name in encoder]
    depths = tuple(len({match[2] for match in found if match and match[1] == str(stage)}) for stage in range(4))
    is_svt = any(f"{blocks}.0.0.attn.qkv.weight" == name for name in encoder)
    shapes = {
        (fields["hidden_sizes"], fields["depths"], "window_sizes" in fields): variant
        for variant, fields in VARIANTS.items()
    }
    variant = shapes.get((widths, depths, is_svt))
    if variant is None:
        raise ValueError(f"no published variant has widths {widths} and depths {depths}.")

    settings["norm_after_stage"] = any(name.startswith("norm_list.") for name in encoder)
    if is_segmenter:
        settings["decoder_type"] = "fpn" if any(name.startswith("neck.") for name in tensors) else "upernet"
        settings["use_auxiliary_head"] = any(name.startswith("auxiliary_head.") for name in tensors)
        classifier = tensors.get("decode_head.conv_seg.weight")
        if classifier is None:
            raise ValueError("a segmentation model's decode_head.conv_seg.weight is missing.")
        settings["id2label"] = class_names(len(classifier))
        return TwinsForSemanticSegmentation(TwinsConfig.from_variant(variant, **settings)), source
    if "head.weight" in tensors:
        settings["id2label"] = class_names(len(tensors["head.weight"]))
        return TwinsForImageClassification(TwinsConfig.from_variant(variant, **settings)), source
    return TwinsModel(TwinsConfig.from_variant(variant, **settings)), source


def class_names(num_labels: int) -> dict[int, str]:
    """ADE20K's names for 150 classes, ImageNet's for 1,000, numbers for any other."""
    if num_labels == len(ADE20K_CLASSES):
        return dict(enumerate(ADE20K_CLASSES))
    if num_labels == 1000:
        from torchvision.models import ResNet50_Weights

        return dict(enumerate(ResNet50_Weights.DEFAULT.meta["categories"]))
    return {class_id: f"LABEL_{class_id}" for class_id in range(num_labels)}


def load_model(source: str | Path, revision: str | None = None) -> tuple[TwinsPreTrainedModel, list[str]]:
    """
    The model of a checkpoint of any source.

    Args:
        source: A file; or a folder or Hub model id of this library (`save_pretrained`) or of timm.
        revision: Branch, tag or commit of a Hub model.

    Returns:
        The model, and the names of tensors that were left out because the source carries them unused.

    Raises:
        `ValueError`: naming the source, if it cannot be read or its tensors fit no published model.
        `OSError`: if a folder has no `config.json` and no Hub model has that id.
    """
    source = str(source)
    if Path(source).suffix in SUFFIXES:
        path = source
    elif is_twins(source, revision):
        architecture = (TwinsConfig.from_pretrained(source, revision=revision).architectures or ["TwinsModel"])[0]
        classes = {c.__name__: c for c in (TwinsModel, TwinsForImageClassification, TwinsForSemanticSegmentation)}
        if architecture not in classes:
            raise ValueError(f"{source}: architecture {architecture} is none of {', '.join(classes)}.")
        return classes[architecture].from_pretrained(source, revision=revision), []
    else:
        path = cached_file(source, "model.safetensors", revision=revision)
    tensors = read_checkpoint(path)
    try:
        model, origin = model_for(tensors)
        return model.eval(), import_state_dict(model, tensors, origin)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def is_twins(source: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub model id is this library's, and so to be read by `from_pretrained`."""
    if Path(source).suffix in SUFFIXES:
        return False
    settings, _ = TwinsConfig.get_config_dict(source, revision=revision)
    return settings.get("model_type") == TwinsConfig.model_type


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Tensors of a `.safetensors` file or of a pickle (`.pth`, `.pt`, `.bin`) that holds them directly or under
    `state_dict` or `model`. No code in a pickle is run.

    Raises:
        `ValueError`: naming the file, if it cannot be read, is refused, or holds no tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_inert_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, since it holds more than tensors and plain settings, or is cut short ({error}). If you "
            "trust it, load it where it was made and save its `state_dict` alone."
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error}).") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: it holds no state dict.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    image_size: int = 224,
    revision: str | None = None,
) -> str:
    """
    Converts a checkpoint of any source, this library's included, to `to`.

    Args:
        source: What [`load_model`] takes.
        destination: A new folder for `"hf"` (model, processor, model card); a `.safetensors` or `.pth` file otherwise.
        to: `"hf"` or one of `SOURCES`.
        image_size: Side in pixels that a classifier was trained with; nothing else tells.
        revision: Branch, tag or commit of a Hub model.

    Returns:
        What was converted, in a sentence.

    Raises:
        `ValueError`: naming the file, if it cannot be converted or the destination exists. Nothing is left behind.
    """
    destination = Path(destination)
    if destination.exists():
        raise ValueError(f"{destination}: exists already.")
    model, unused = load_model(source, revision)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        partial = Path(folder) / destination.name
        if to == "hf":
            origin = Path(source).name if Path(source).exists() else str(source)
            write_folder(model, partial, image_size, origin)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in export_state_dict(model, to).items()}
            if partial.suffix == ".safetensors":
                save_file(tensors, partial)
            else:
                torch.save({"state_dict": tensors}, partial)
        os.replace(partial, destination)
    sentence = f"{source} ({type(model).__name__}, {model.num_parameters():,} parameters) -> {destination}"
    return sentence + (f"; left out, as the source does not use them: {', '.join(unused)}" if unused else "")


def write_folder(model: TwinsPreTrainedModel, folder: Path, image_size: int, origin: str) -> None:
    """Model, processor and model card, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    if isinstance(model, TwinsForSemanticSegmentation):
        processor = TwinsImageProcessor(do_reduce_labels=model.config.num_labels == len(ADE20K_CLASSES))
    else:  # the authors' and timm's evaluation: the middle seven eighths
        size = {"shortest_edge": round(image_size / 0.875)}
        processor = TwinsImageProcessor(size=size, crop_size=image_size, do_center_crop=True)
    processor.save_pretrained(folder)
    card = ModelCardData(library_name="transformers", tags=["twins", "vision"], license="apache-2.0")
    text = (
        f"---\n{card.to_yaml()}\n---\n\n# {folder.name}\n\n"
        f"Twins (arXiv [2104.13840](https://arxiv.org/abs/2104.13840)), `{type(model).__name__}`, "
        f"converted from `{origin}` with `twins_hf`.\n"
    )
    ModelCard(text).save(folder / "README.md")


class HistoryBuffer:
    """Stands in for mmengine's log buffer in a training checkpoint; what it holds is dropped."""

    def __setstate__(self, state):
        pass


def no_attribute(owner, name: str) -> None:
    """Stands in for the `getattr` that such a buffer's methods are stored with."""


def _inert_classes() -> list:
    """What training checkpoints hold beside tensors and does nothing when it is loaded."""
    reconstruct, scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        (HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
        (no_attribute, "builtins.getattr"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")},
    ]
