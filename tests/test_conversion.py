import argparse
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TINY, randomize
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from twins_hf import TwinsConfig, TwinsForImageClassification, TwinsForSemanticSegmentation, TwinsModel
from twins_hf.configuration_twins import VARIANTS
from twins_hf.conversion import (
    convert_checkpoint,
    export_state_dict,
    import_state_dict,
    load_model,
    model_for,
    read_checkpoint,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
TIMM_SIZES = {"s": "small", "b": "base", "l": "large"}
KINDS = {
    "encoder": (TwinsModel, {"norm_after_stage": False}),
    "classifier": (TwinsForImageClassification, {"norm_after_stage": False}),
    "upernet": (TwinsForSemanticSegmentation, {}),
    "fpn": (TwinsForSemanticSegmentation, {"decoder_type": "fpn"}),
}


def tiny(family, kind):
    model_class, settings = KINDS[kind]
    return randomize(model_class(TwinsConfig(**{**TINY, **FAMILIES[family], **settings}, num_labels=3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["official", "mmseg"])
def test_there_and_back_gives_the_same_tensors(source, family, kind):
    if (source, kind) == ("mmseg", "classifier"):
        kind = "encoder"  # MMSegmentation's backbones have no classifier
    model = tiny(family, kind)
    exported = export_state_dict(model, source)
    other = type(model)(model.config)
    assert import_state_dict(other, exported, source) == []
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    again = export_state_dict(other, source)
    assert exported.keys() == again.keys() and all(torch.equal(exported[name], again[name]) for name in again)


@pytest.mark.parametrize(
    ("source", "family", "kind", "names"),
    [
        ("official", "pcpvt", "classifier", "patch_embeds.0.proj.weight blocks.1.0.attn.kv.bias "
         "blocks.2.1.attn.sr.weight "
         "blocks.0.0.attn.norm.bias blocks.3.1.mlp.fc2.bias pos_block.3.proj.0.weight norm.weight head.bias"),
        ("official", "svt", "upernet", "backbone.blocks.0.0.attn.qkv.weight backbone.norm_list.3.bias "
         "decode_head.psp_modules.3.1.bn.running_var decode_head.conv_seg.weight auxiliary_head.convs.0.conv.weight"),
        ("mmseg", "pcpvt", "encoder", "patch_embeds.1.projection.bias layers.0.1.attn.attn.in_proj_weight norm.bias "
         "layers.3.0.attn.attn.out_proj.bias layers.1.1.ffn.layers.0.0.weight layers.1.1.ffn.layers.1.bias "
         "position_encodings.2.proj.weight"),
        ("mmseg", "svt", "fpn", "backbone.layers.0.0.attn.qkv.bias backbone.layers.0.0.attn.proj.weight "
         "backbone.layers.0.1.attn.attn.in_proj_bias neck.lateral_convs.3.conv.bias neck.fpn_convs.0.conv.weight "
         "decode_head.scale_heads.0.0.conv.weight decode_head.scale_heads.3.4.bn.num_batches_tracked"),
    ],
)  # fmt: skip
def test_names_are_those_that_people_hold(source, family, kind, names):
    assert set(names.split()) <= export_state_dict(tiny(family, kind), source).keys()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", ["official", "mmseg"])
def test_source_variant_and_head_are_told_from_names_and_shapes(source, variant):
    expected_padding = {"official": "unmasked", "mmseg": "mmseg"}[source]
    for kind, (model_class, settings) in KINDS.items():
        with torch.device("meta"):
            settings = {"norm_after_stage": VARIANTS[variant].get("norm_after_stage", False), **settings}
            model = model_class(TwinsConfig.from_variant(variant, num_labels=150, **settings))
            found, found_source = model_for(export_state_dict(model, source))
        is_segmenter = model_class is TwinsForSemanticSegmentation
        if (source, kind) == ("mmseg", "classifier"):
            model_class = TwinsModel
        assert (type(found), found_source) == (model_class, source)
        assert found.config.window_padding == ("mmseg" if is_segmenter else expected_padding)
        assert found.config.layer_norm_eps == (1e-5 if source == "mmseg" else 1e-6)
        assert found.config.patch_padding == (source == "mmseg")
        for field in (
            "depths",
            "hidden_sizes",
            "window_sizes",
            "norm_after_stage",
            "decoder_type",
            "use_auxiliary_head",
        ):
            if is_segmenter or "decoder" not in field and "auxiliary" not in field:
                assert getattr(found.config, field) == getattr(model.config, field), field
        if model_class is not TwinsModel:
            assert found.config.id2label[1] == "building, edifice"


@pytest.mark.parametrize("size", [(224, 224), (256, 320), (250, 331)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_a_converted_classifier_computes_what_timm_computes(variant, size):
    timm = pytest.importorskip("timm", reason="timm is an extra, and what this test compares with")
    torch.manual_seed(0)
    family, size_letter = variant.split("-")
    theirs = timm.create_model(f"twins_{family}_{TIMM_SIZES[size_letter]}").eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "patch_embeds" in parameter_name or ".attn.sr." in parameter_name:
            parameter.mul_(0.01)  # small activations, so that every epsilon shows
        elif parameter_name.endswith("bias"):
            parameter.normal_(0, 0.1)
    theirs.head.weight.normal_(0, 0.1)
    ours, source = model_for(theirs.state_dict())
    assert source == "official"
    import_state_dict(ours.eval(), theirs.state_dict(), source)
    assert ours.config.hidden_sizes == VARIANTS[variant]["hidden_sizes"]
    pixel_values = torch.randn(1, 3, *size)
    outputs = ours(pixel_values, output_hidden_states=True)
    logits, maps = theirs(pixel_values), theirs.forward_intermediates(pixel_values, intermediates_only=True)
    for found, expected in [(outputs.logits, logits), *zip(outputs.hidden_states[1:], maps, strict=True)]:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    """The authors' ImageNet checkpoint of PCPVT-S, as a training script saves it, with random weights."""
    torch.manual_seed(0)
    model = TwinsForImageClassification(TwinsConfig.from_variant("pcpvt-s", num_labels=1000))
    path = tmp_path_factory.mktemp("authors") / "pcpvt_small.pth"
    torch.save({"model": export_state_dict(model, "official"), "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    return path


def test_a_folder_converted_from_imagenet_weights_starts_a_segmentation_model(classifier_file, tmp_path):
    sentence = convert_checkpoint(classifier_file, tmp_path / "imagenet")
    assert "TwinsForImageClassification" in sentence
    model = TwinsForImageClassification.from_pretrained(tmp_path / "imagenet")
    assert model.config.id2label[1] == "goldfish"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "imagenet")
    assert processor.do_center_crop and processor.crop_size.height == 224 and processor.size.shortest_edge == 256
    assert "pcpvt_small.pth" in (tmp_path / "imagenet" / "README.md").read_text()
    segmenter, report = TwinsForSemanticSegmentation.from_pretrained(tmp_path / "imagenet", output_loading_info=True)
    assert not [name for name in report["missing_keys"] if name.startswith("twins.")]
    name = "twins.stages.2.layers.0.attention.kv_proj.weight"
    assert torch.equal(segmenter.state_dict()[name], model.state_dict()[name])


def test_imagenet_weights_become_mmsegmentations_in_one_command(classifier_file, tmp_path):
    target = tmp_path / "mmseg.pth"
    command = [sys.executable, str(SCRIPT), str(classifier_file), str(target), "--to", "mmseg"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    theirs = torch.load(target, weights_only=True)["state_dict"]
    official = read_checkpoint(classifier_file)
    packed = torch.cat([official["blocks.0.0.attn.q.weight"], official["blocks.0.0.attn.kv.weight"]])
    assert torch.equal(theirs["layers.0.0.attn.attn.in_proj_weight"], packed)
    assert not any(name.startswith("head.") for name in theirs)


def test_a_folder_of_timm_is_read_as_it_is(classifier_file, tmp_path):
    save_file(read_checkpoint(classifier_file), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "twins_pcpvt_small"}')
    model, unused = load_model(tmp_path)
    assert type(model) is TwinsForImageClassification and unused == []
    convert_checkpoint(tmp_path, tmp_path / "back.safetensors", to="timm")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(tensor, back[name]) for name, tensor in read_checkpoint(classifier_file).items())


def test_a_model_of_timm_is_read_from_the_hub(classifier_file, tmp_path):
    save_file(read_checkpoint(classifier_file), tmp_path / "model.safetensors")
    with HubServer() as hub:
        hub.repositories["timm/twins_pcpvt_small.in1k"] = {
            "config.json": b'{"architecture": "twins_pcpvt_small", "pretrained_cfg": {"num_classes": 1000}}',
            "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
        }
        network = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        command = [sys.executable, str(SCRIPT), "timm/twins_pcpvt_small.in1k", str(tmp_path / "converted")]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **network})
        command[2:] = ["timm/no_such_model", str(tmp_path / "nothing")]
        refused = subprocess.run(command, env={**os.environ, **network}, capture_output=True, text=True)
    model = TwinsForImageClassification.from_pretrained(tmp_path / "converted")
    official = read_checkpoint(classifier_file)
    assert all(torch.equal(tensor, official[name]) for name, tensor in export_state_dict(model, "timm").items())
    assert "timm/twins_pcpvt_small.in1k" in (tmp_path / "converted" / "README.md").read_text()
    assert refused.returncode == 1 and re.search("error: .*timm/no_such_model", refused.stderr)
    assert "Traceback" not in refused.stderr and not (tmp_path / "nothing").exists()


def test_a_training_checkpoint_of_mmengine_is_read_without_its_log(monkeypatch, tmp_path):
    """It is pickled with its log buffers, which refer to their methods by `getattr`."""
    name = "mmengine.logging.history_buffer"

    class HistoryBuffer:
        def mean(self):
            return self.log.mean()

        def __getstate__(self):
            return {"log": np.array([0.5, 0.25]), "methods": {"mean": HistoryBuffer.mean}, "last": np.float64(0.25)}

    for thing, qualified_name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        thing.__module__, thing.__qualname__ = name, qualified_name
    for depth in (1, 2, 3):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:depth]), types.ModuleType("stand-in"))
    sys.modules[name].HistoryBuffer = HistoryBuffer
    tensors = export_state_dict(tiny("svt", "fpn"), "mmseg")
    log = {"log_scalars": {"train/loss": HistoryBuffer()}}
    torch.save({"meta": {"iter": 3}, "state_dict": tensors, "message_hub": log}, tmp_path / "iter_3.pth")
    read = read_checkpoint(tmp_path / "iter_3.pth")
    assert all(torch.equal(tensor, read[name]) for name, tensor in tensors.items())


def test_what_the_authors_segmentation_checkpoints_carry_unused_is_left_out_and_named():
    model = tiny("svt", "upernet")
    tensors = export_state_dict(model, "official")
    extra = {"backbone.norm.weight": torch.ones(32), "backbone.head.bias": torch.ones(1000)}
    assert import_state_dict(model, tensors | extra, "official") == list(extra)


def test_tensors_that_do_not_fit_are_listed_and_change_nothing():
    model = tiny("pcpvt", "upernet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in export_state_dict(model, "mmseg").items()}
    del tensors["decode_head.conv_seg.bias"]
    tensors["backbone.extra.weight"] = torch.ones(2)
    tensors["backbone.layers.0.0.norm1.bias"] = torch.ones(9)
    tensors["backbone.layers.0.1.attn.attn.in_proj_bias"] = torch.ones(25)
    with pytest.raises(ValueError) as caught:
        import_state_dict(model, tensors, "mmseg")
    for text in (
        "1 missing: decode_head.conv_seg.bias",
        "1 unknown: backbone.extra.weight",
        "backbone.layers.0.0.norm1.bias (9,), not (8,)",
        "backbone.layers.0.1.attn.attn.in_proj_bias (25,)",
    ):
        assert text in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Intruder:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


def refused(source, tmp_path, **options):
    """The error of a conversion, which leaves no destination behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(source, tmp_path / "converted", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path):
    intruder = Intruder()
    intruder.path = str(tmp_path / "broken_in")
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"state_dict": intruder}, file)
    torch.save({"state_dict": {}, "extra": intruder}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        assert f"{name}: refused" in refused(tmp_path / name, tmp_path)
    assert not (tmp_path / "broken_in").exists()


def test_files_that_are_no_checkpoint_are_named(classifier_file, tmp_path):
    (tmp_path / "cut.pth").write_bytes(classifier_file.read_bytes()[:100_000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" + bytes(30))
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("cut.pth", "cut.safetensors", "text.pth", "list.pth", "missing.pth"):
        assert f"{name}: " in refused(tmp_path / name, tmp_path)


def test_other_architectures_are_told_so(classifier_file, tmp_path):
    tensors = read_checkpoint(classifier_file)
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pth")
    assert "layer.weight are of no known source" in refused(tmp_path / "other.pth", tmp_path)
    torch.save({name: tensor for name, tensor in tensors.items() if "blocks.2.5." not in name}, tmp_path / "short.pth")
    assert "no published variant has widths (64, 128, 320, 512) and depths (3, 4, 5, 3)" in refused(
        tmp_path / "short.pth", tmp_path
    )


def test_an_existing_destination_is_kept(classifier_file, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken: exists already"):
        convert_checkpoint(classifier_file, tmp_path / "taken")


def test_timm_has_no_segmentation_models():
    with pytest.raises(ValueError, match="no segmentation models"):
        export_state_dict(tiny("svt", "upernet"), "timm")
