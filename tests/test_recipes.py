"""The settings in examples/, against the published protocol."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation
from twins_hf.data.loading import SegmentationData
from twins_hf.training import parse_arguments
from twins_hf.training.optimization import split_batch
from twins_hf.training.preparation import build_image_processor, build_model

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = EXAMPLES / "recipes"

# Of each variant: the weights to start from; with UPerNet the batch size, the number of parameters, and mean IoU (the
# authors' and MMSegmentation's, single-scale / multi-scale + flip); with Semantic FPN the last two (MMSegmentation's).
PUBLISHED = {
    "pcpvt-s": ("twins_pcpvt_small", 32, 54_080_044, "46.2 / 47.5", "46.04 / 46.92", 27_858_838, "43.26 / 44.11"),
    "pcpvt-b": ("twins_pcpvt_base", 16, 73_802_284, "47.1 / 48.4", "47.91 / 48.64", 47_581_078, "45.66 / 46.48"),
    "pcpvt-l": ("twins_pcpvt_large", 16, 90_963_500, "48.6 / 49.8", "49.35 / 50.08", 64_742_294, "45.94 / 46.70"),
    "svt-s": ("twins_svt_small", 16, 53_856_300, "46.2 / 47.1", "46.08 / 46.96", 27_798_934, "44.47 / 45.42"),
    "svt-b": ("twins_svt_base", 16, 87_724_460, "47.4 / 48.9", "48.04 / 48.87", 59_676_438, "46.77 / 47.47"),
    "svt-l": ("twins_svt_large", 16, 132_782_892, "48.8 / 50.2", "49.65 / 50.63", 102_744_214, "46.55 / 47.74"),
}
UPERNET = {f"{variant}_upernet_160k": variant for variant in PUBLISHED}
FPN = {f"{variant}_fpn_80k": variant for variant in PUBLISHED}
ADE20K = SegmentationData("ade20k", {}, {class_id: f"class {class_id}" for class_id in range(150)}, True)


def parse(path):
    return parse_arguments([str(path)])


def iterations(args):
    """What an iteration does, in the order of the protocol."""
    return {
        name: getattr(args, name)
        for name in (
            "max_steps",
            "total_train_batch_size",
            "learning_rate",
            "adam_beta1",
            "adam_beta2",
            "weight_decay",
            "decay_norms",
            "layer_decay",
            "max_grad_norm",
            "lr_scheduler_type",
            "warmup_steps",
            "lr_power",
            "lr_end",
            "ema_decay",
            "mixed_precision",
        )
    }


def test_there_is_one_recipe_for_each_published_setting_and_one_for_masks_of_ones_own():
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert names == {*UPERNET, *FPN, "finetune_custom"}


@pytest.mark.parametrize("recipe", UPERNET)
def test_an_upernet_recipe_trains_as_published(recipe):
    _, _, args = parse(RECIPES / f"{recipe}.yaml")
    assert iterations(args) == {
        "max_steps": 160_000,
        "total_train_batch_size": PUBLISHED[UPERNET[recipe]][1],
        "learning_rate": 6e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.01,
        "decay_norms": False,
        "layer_decay": 1.0,
        "max_grad_norm": None,
        "lr_scheduler_type": "published",
        "warmup_steps": 1500,
        "lr_power": 1.0,
        "lr_end": 0.0,
        "ema_decay": None,
        "mixed_precision": "no",
    }
    assert args.eval_steps == 16_000


@pytest.mark.parametrize("recipe", FPN)
def test_an_fpn_recipe_trains_as_published(recipe):
    _, _, args = parse(RECIPES / f"{recipe}.yaml")
    assert iterations(args) == {
        "max_steps": 80_000,
        "total_train_batch_size": 32,
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 1e-4,
        "decay_norms": True,
        "layer_decay": 1.0,
        "max_grad_norm": None,
        "lr_scheduler_type": "published",
        "warmup_steps": 0,
        "lr_power": 1.0,
        "lr_end": 1e-4,
        "ema_decay": None,
        "mixed_precision": "no",
    }
    assert args.eval_steps == 8_000


@pytest.mark.parametrize("recipe", [*UPERNET, *FPN])
def test_a_recipe_starts_from_imagenet_and_crops_and_distorts_ade20k_as_published(recipe):
    variant = {**UPERNET, **FPN}[recipe]
    model_args, data_args, args = parse(RECIPES / f"{recipe}.yaml")
    assert model_args.model_name_or_path == f"timm/{PUBLISHED[variant][0]}.in1k"
    assert not model_args.freeze_encoder and model_args.lora_rank is None
    assert data_args.dataset_name == "ade20k"
    assert data_args.max_train_samples is None and data_args.max_eval_samples is None
    image_processor = build_image_processor(None, data_args, ADE20K)
    assert dict(image_processor.size) == {"shortest_edge": 512, "longest_edge": 2048}
    assert dict(image_processor.crop_size) == {"height": 512, "width": 512}
    assert image_processor.do_reduce_labels
    assert (data_args.ratio_range, data_args.cat_max_ratio) == ([0.5, 2.0], 0.75)
    assert data_args.photometric_distortion
    assert args.output_dir == f"outputs/{recipe}"
    assert args.save_steps == 2000 and 0 < args.save_total_limit < 10
    assert (args.inference_mode, args.scales, args.flip) == ("whole", [1.0], False)


def timm_folder(variant, folder):
    """The configuration that a classifier of timm's converts to."""
    config = TwinsConfig.from_variant(
        variant,
        window_padding="unmasked",
        patch_padding=False,
        norm_after_stage=False,
        num_labels=1000,
        architectures=["TwinsForImageClassification"],
    )
    config.save_pretrained(folder)
    return {"pretrained_model_name_or_path": str(folder)}


@pytest.fixture
def no_weights(monkeypatch):
    """Models are built without weights."""

    def from_pretrained(*args, config, **settings):
        with torch.device("meta"):
            return TwinsForSemanticSegmentation(config)

    monkeypatch.setattr(TwinsForSemanticSegmentation, "from_pretrained", from_pretrained)


@pytest.mark.parametrize("recipe", [*UPERNET, *FPN])
def test_a_recipe_makes_the_published_model_of_an_imagenet_classifier(recipe, tmp_path, no_weights):
    variant = {**UPERNET, **FPN}[recipe]
    model_args, _, _ = parse(RECIPES / f"{recipe}.yaml")
    model = build_model(model_args, timm_folder(variant, tmp_path), ADE20K, eval_only=False)
    config = model.config
    assert model.num_parameters() == PUBLISHED[variant][2 if recipe in UPERNET else 5]
    assert config.num_labels == 150
    assert (config.semantic_loss_reduction, config.semantic_loss_ignore_index) == ("all", 255)
    assert (config.window_padding, config.patch_padding, config.layer_norm_eps) == ("mmseg", False, 1e-6)
    assert config.norm_after_stage == variant.startswith("svt")
    assert model.twins.stages[0].layers[0].layernorm_before.eps == 1e-6
    assert model.twins.stages[3].layers[-1].drop_path.drop_prob == pytest.approx(0.3 if variant == "svt-l" else 0.2)
    assert model.twins.stages[0].layers[0].drop_path.drop_prob == 0.0
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)
    assert config.classifier_dropout_prob == 0.1
    if recipe in UPERNET:
        assert (config.decoder_type, config.decoder_hidden_size, config.pool_scales) == ("upernet", 512, [1, 2, 3, 6])
        assert model.auxiliary_head is not None
        assert (config.auxiliary_loss_weight, config.auxiliary_channels) == (0.4, 256)
    else:
        assert (config.decoder_type, config.decoder_hidden_size) == ("fpn", 256)
        assert model.auxiliary_head is None


@pytest.mark.parametrize("recipe", [*UPERNET, *FPN])
def test_a_recipe_says_what_it_reproduces_and_how_it_is_launched(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    head = text[: text.index("model_name_or_path")]
    variant = {**UPERNET, **FPN}[recipe]
    _, _, _, authors, mmseg, _, fpn = PUBLISHED[variant]
    for number in (authors, mmseg) if recipe in UPERNET else (fpn,):
        assert number in head
    assert f"examples/recipes/{recipe}.yaml" in head
    assert variant.upper() in head.upper()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_needs_no_other_file(path):
    options = yaml.safe_load(path.read_text())
    words = [str(value) for value in (*options.values(), *options["config_overrides"].values())]
    assert not [word for word in words if ".yaml" in word or ".yml" in word or ".json" in word]


@pytest.mark.parametrize("path", [*EXAMPLES.glob("*.yaml"), *RECIPES.glob("*.yaml")], ids=lambda path: path.stem)
def test_what_an_example_changes_of_the_configuration_are_its_fields(path):
    overrides = yaml.safe_load(path.read_text())["config_overrides"]
    assert overrides.keys() <= {field.name for field in dataclasses.fields(TwinsConfig)}


def test_the_table_of_recipes_has_the_published_numbers():
    rows = [row for row in (RECIPES / "README.md").read_text().splitlines() if row.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert cells == [[name, authors, mmseg, fpn] for name, (_, _, _, authors, mmseg, _, fpn) in PUBLISHED.items()]


@pytest.mark.parametrize("recipe", [*UPERNET, *FPN, "finetune_custom"])
def test_the_batch_of_a_recipe_splits_over_any_usual_number_of_processes(recipe):
    _, _, args = parse(RECIPES / f"{recipe}.yaml")
    total, per_device = args.total_train_batch_size, args.per_device_train_batch_size
    for num_processes in (1, 2, 4, 8, 16):
        batch_size, accumulation = split_batch(total, per_device, 1, num_processes)
        assert batch_size * accumulation * num_processes == total
        assert batch_size == min(per_device, total // num_processes)
    for num_processes in (3, 5):
        message = f"--total_train_batch_size {total} cannot be split evenly over {num_processes} processes"
        with pytest.raises(ValueError, match=message):
            split_batch(total, per_device, 1, num_processes)


@pytest.mark.parametrize("recipe", [*UPERNET, *FPN])
def test_eight_processes_make_an_iteration_of_a_recipe_in_one_forward_pass_as_the_published_runs_did(recipe):
    _, _, args = parse(RECIPES / f"{recipe}.yaml")
    batch_size, accumulation = split_batch(args.total_train_batch_size, args.per_device_train_batch_size, 1, 8)
    assert (batch_size, accumulation) == (args.total_train_batch_size // 8, 1)


def test_the_recipe_for_masks_of_ones_own_saves_memory_and_keeps_the_best_model(tmp_path, no_weights):
    model_args, data_args, args = parse(RECIPES / "finetune_custom.yaml")
    assert args.mixed_precision == "fp16" and args.gradient_checkpointing and args.auto_find_batch_size
    assert args.eval_steps <= args.max_steps // 10 and args.save_steps > 0
    model = build_model(model_args, timm_folder("svt-s", tmp_path), ADE20K, eval_only=False)
    assert model.num_parameters() == PUBLISHED["svt-s"][2]
    assert (model.config.window_padding, model.config.semantic_loss_reduction) == ("masked", "valid")


@pytest.mark.parametrize("name", ["quickstart", "finetune_cpu"])
def test_the_examples_for_a_cpu_parse_into_a_small_model(name):
    model_args, _, args = parse(EXAMPLES / f"{name}.yaml")
    assert args.use_cpu and args.max_steps <= 1000
    overrides = json.loads(model_args.config_overrides)
    with torch.device("meta"):
        model = TwinsForSemanticSegmentation(TwinsConfig.from_variant(model_args.variant, num_labels=9, **overrides))
    assert model.num_parameters() < 5_000_000
