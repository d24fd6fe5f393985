"""What users of transformers expect of a model and its processor beyond a forward pass."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import peft
import PIL.Image
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import FAMILIES, TINY, randomize
from hub_server import HubServer
from safetensors import safe_open

from twins_hf import (
    TwinsBackbone,
    TwinsConfig,
    TwinsForImageClassification,
    TwinsForSemanticSegmentation,
    TwinsImageProcessor,
    TwinsModel,
)

CLASSES = [TwinsModel, TwinsBackbone, TwinsForImageClassification, TwinsForSemanticSegmentation]


def images(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_model_loads_and_runs_in_half_precision(tiny_model, folder, dtype):
    model = TwinsForSemanticSegmentation.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    pixel_values = images(1, 3, 70, 90)
    outputs, expected = model(pixel_values.to(dtype)), tiny_model(pixel_values).logits
    assert outputs.logits.dtype == dtype
    assert (outputs.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    model.save_pretrained(folder)
    assert TwinsForSemanticSegmentation.from_pretrained(folder, dtype="auto").dtype == dtype


@torch.inference_mode()
def test_a_model_is_spread_over_devices(tiny_model, folder, tmp_path):
    """The disk is the one other device that every machine has."""
    device_map = {"twins.embeddings": "cpu", "twins.stages": "disk", "decode_head": "cpu", "auxiliary_head": "disk"}
    model = TwinsForSemanticSegmentation.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert model.hf_device_map == device_map
    assert model.twins.stages[0].layers[0].mlp.fc1.weight.device.type == "meta"
    pixel_values = images(1, 3, 70, 90)
    torch.testing.assert_close(model(pixel_values).logits, tiny_model(pixel_values).logits)
    automatic = TwinsForSemanticSegmentation.from_pretrained(folder, device_map="auto")
    torch.testing.assert_close(
        automatic(pixel_values.to(automatic.device)).logits.cpu(), tiny_model(pixel_values).logits
    )


@torch.inference_mode()
def test_the_attention_implementation_is_chosen_on_loading(folder):
    pixel_values, logits = images(1, 3, 70, 90), {}
    for implementation in ("eager", "sdpa"):
        model = TwinsForSemanticSegmentation.from_pretrained(folder, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        logits[implementation] = model(pixel_values).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"])
    with pytest.raises(ValueError, match="does_not_exist"):
        TwinsForSemanticSegmentation.from_pretrained(folder, attn_implementation="does_not_exist")


def test_classifiers_of_another_number_of_classes_are_new_when_that_is_allowed(tiny_model, folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        TwinsForSemanticSegmentation.from_pretrained(folder, num_labels=5)
    model, report = TwinsForSemanticSegmentation.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    assert mismatched == {
        f"{head}.classifier.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")
    }
    assert model.decode_head.classifier.weight.detach().std() == pytest.approx(16**-0.5, rel=0.3)  # as a new head's
    for name, tensor in tiny_model.state_dict().items():
        assert name in mismatched or torch.equal(tensor, model.state_dict()[name])


def test_a_model_is_saved_in_shards(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for shard in shards:
        with safe_open(tmp_path / shard, "pt") as file:
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}
    loaded = TwinsForSemanticSegmentation.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tiny_model.state_dict().items())


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("by", ["argument", "config"])
@torch.inference_mode()
def test_hidden_states_and_attentions_come_when_asked_for(model_class, by):
    config = TwinsConfig(**TINY, **FAMILIES["svt"], num_labels=3)
    arguments = {"output_hidden_states": True, "output_attentions": True}
    model = randomize(model_class(config))
    model.set_attn_implementation("eager")
    assert not {"hidden_states", "attentions"} & set(model(images(1, 3, 64, 64)))
    if by == "config":
        for name in arguments:
            setattr(model.config, name, True)
        arguments = {}
    outputs = model(images(2, 3, 64, 64), **arguments)
    assert [state.shape[1] for state in outputs.hidden_states] == [8, 8, 16, 24, 32]
    # Stage 1 has a map of 16x16: nine windows of 49, and one map of 256 queries on 2x2 keys.
    assert [tuple(attention.shape) for attention in outputs.attentions[:2]] == [(18, 1, 49, 49), (2, 1, 256, 4)]
    assert len(outputs.attentions) == 8
    as_tuple = model(images(2, 3, 64, 64), return_dict=False, **arguments)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs.to_tuple())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_the_attention_projections_and_merges(family, tmp_path):
    torch.manual_seed(0)
    model = TwinsForSemanticSegmentation(TwinsConfig(**TINY, **FAMILIES[family], num_labels=3))
    targets = ["q_proj", "kv_proj", "o_proj"] + (["qkv_proj"] if family == "svt" else [])
    settings = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["decode_head"], lora_alpha=8)
    tuned = peft.get_peft_model(model, settings)
    pixel_values, labels = images(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = tuned(pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(targets) <= trained
    tuned.eval().save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = tuned(pixel_values=pixel_values).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)


# A process of its own, since registration marks the class for the rest of a process.
REGISTER = """
import sys
from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor
source, target = sys.argv[1:]
TwinsConfig.register_for_auto_class()
TwinsForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
TwinsImageProcessor.register_for_auto_class()
TwinsForSemanticSegmentation.from_pretrained(source).save_pretrained(target)
TwinsImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(target)
"""
SEGMENT = """
import sys
if sys.argv[3] == "alone":
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "twins_hf":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Refuse())
else:
    import twins_hf
import numpy as np, PIL.Image, torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
source, photo = sys.argv[1:3]
trust = {"trust_remote_code": True} if sys.argv[3] == "alone" else {}
model = AutoModelForSemanticSegmentation.from_pretrained(source, **trust).eval()
processor = AutoImageProcessor.from_pretrained(source, **trust)
image = PIL.Image.open(photo)
with torch.inference_mode():
    outputs = model(**processor(image, return_tensors="pt"))
(label_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
np.save(photo + ".npy", label_map.numpy())
"""


def python(code, *arguments, **environment):
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.inference_mode()
def assert_segmented_as_by(model, photo):
    processor = TwinsImageProcessor(size={"shortest_edge": 48, "longest_edge": 192})
    inputs = processor(PIL.Image.open(photo), return_tensors="pt")
    (expected,) = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(60, 80)])
    assert (torch.from_numpy(np.load(f"{photo}.npy")) == expected).float().mean() > 0.999


def test_registered_classes_are_saved_with_their_code(tiny_model, folder, photo, tmp_path):
    python(REGISTER, folder, tmp_path / "with_code")
    assert (tmp_path / "with_code" / "modeling_twins.py").is_file()
    python(SEGMENT, tmp_path / "with_code", photo, "alone", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert_segmented_as_by(tiny_model, photo)


PUSH = """
import sys
from twins_hf import TwinsForSemanticSegmentation, TwinsImageProcessor
TwinsForSemanticSegmentation.from_pretrained(sys.argv[1]).push_to_hub("tester/pushed")
TwinsImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).push_to_hub("tester/pushed")
"""


def test_model_and_processor_are_pushed_to_the_hub_and_read_back(tiny_model, folder, photo, tmp_path):
    with HubServer() as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        python(PUSH, folder, HF_HOME=str(tmp_path / "pushing"), **network)
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(
            hub.repositories["tester/pushed"]
        )
        python(SEGMENT, "tester/pushed", photo, "installed", HF_HOME=str(tmp_path / "reading"), **network)
    assert_segmented_as_by(tiny_model, photo)


@pytest.fixture
def lone_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_sharded_by_accelerates_fsdp2_has_the_gradients_of_a_whole_one(family, lone_process_group):
    """accelerate itself wants a GPU before it comes to this function."""
    config = TwinsConfig(**TINY, **FAMILIES[family], num_labels=3, classifier_dropout_prob=0.0)
    whole = TwinsForSemanticSegmentation(config).train()
    sharded = copy.deepcopy(whole)
    torch.distributed.init_device_mesh("cpu", (1,))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["TwinsLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=None,
        parallelism_config=None,
    )
    sharded = fsdp2_prepare_model(accelerator, sharded)
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    for model in (sharded, whole):
        model(pixel_values=images(2, 3, 64, 64), labels=labels).loss.backward()
    for (name, ours), (_, theirs) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        assert type(ours).__name__ == "DTensor", name
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
