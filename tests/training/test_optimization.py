import pytest
import torch

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation
from twins_hf.configuration_twins import VARIANTS
from twins_hf.training.optimization import build_scheduler, parameter_groups, split_batch

DEPTHS = {
    "pcpvt-s": (3, 4, 6, 3),
    "pcpvt-b": (3, 4, 18, 3),
    "pcpvt-l": (3, 8, 27, 3),
    "svt-s": (2, 2, 10, 4),
    "svt-b": (2, 2, 18, 2),
    "svt-l": (2, 2, 18, 2),
}


def model_of(variant, decoder_type="upernet"):
    with torch.device("meta"):
        return TwinsForSemanticSegmentation(
            TwinsConfig.from_variant(variant, num_labels=150, decoder_type=decoder_type)
        )


def named_groups(model, **settings):
    """Groups by name, their parameters by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, 0.01, **settings)
    return {
        group["name"]: {**group, "params": [names[parameter] for parameter in group["params"]]} for group in groups
    }


def with_bias(*modules):
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def norms_and_position_encodings(variant):
    """What the published UPerNet runs did not decay, name by name."""
    is_svt = variant.startswith("svt")
    modules = []
    for stage, depth in enumerate(DEPTHS[variant]):
        prefix = f"twins.stages.{stage}"
        modules.append("twins.embeddings.layernorm" if stage == 0 else f"{prefix}.patch_embeddings.layernorm")
        modules.append(f"{prefix}.position_encoding.projection")
        modules += [f"{prefix}.layernorm"] if is_svt else []
        for block in range(depth):
            layer = f"{prefix}.layers.{block}"
            modules += [f"{layer}.layernorm_before", f"{layer}.layernorm_after"]
            reduces = stage < 3 and not (is_svt and block % 2 == 0)  # stage 4 does not; windowed blocks do not
            modules += [f"{layer}.attention.layernorm"] if reduces else []
    return with_bias(*modules)


def other_parameters(variant, decoder_type):
    """All else, name by name."""
    is_svt = variant.startswith("svt")
    modules, unbiased = [], []
    for stage, depth in enumerate(DEPTHS[variant]):
        prefix = f"twins.stages.{stage}"
        modules.append("twins.embeddings.projection" if stage == 0 else f"{prefix}.patch_embeddings.projection")
        for block in range(depth):
            layer = f"{prefix}.layers.{block}"
            is_windowed = is_svt and block % 2 == 0
            projections = ["qkv_proj"] if is_windowed else ["q_proj", "kv_proj"]
            projections += ["sequence_reduction"] if stage < 3 and not is_windowed else []
            modules += [f"{layer}.attention.{name}" for name in (*projections, "o_proj")]
            modules += [f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]
    if decoder_type == "upernet":
        conv_modules = [f"decode_head.pyramid_pooling.pools.{i}.1" for i in range(4)]
        conv_modules += [f"decode_head.{convs}.{i}" for convs in ("lateral_convs", "fpn_convs") for i in range(3)]
        conv_modules += ["decode_head.pyramid_pooling.bottleneck", "decode_head.fpn_bottleneck", "auxiliary_head.conv"]
        modules.append("auxiliary_head.classifier")
    else:
        modules += [f"decode_head.{convs}.{i}" for convs in ("lateral_convs", "fpn_convs") for i in range(4)]
        counts = (1, 1, 2, 3)  # 3x3 convs of each level
        conv_modules = [f"decode_head.scale_heads.{level}.{i}" for level in range(4) for i in range(counts[level])]
    modules += ["decode_head.classifier", *(f"{conv}.batch_norm" for conv in conv_modules)]
    unbiased = {f"{conv}.conv.weight" for conv in conv_modules}
    return with_bias(*modules) | unbiased


@pytest.mark.parametrize("decoder_type", ["upernet", "fpn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_encoders_layer_norms_and_position_encodings_are_not_decayed(variant, decoder_type):
    groups = named_groups(model_of(variant, decoder_type))
    assert groups.keys() == {"decayed", "exempt"}
    assert sorted(groups["exempt"]["params"]) == sorted(norms_and_position_encodings(variant))
    assert sorted(groups["decayed"]["params"]) == sorted(other_parameters(variant, decoder_type))
    assert (groups["decayed"]["weight_decay"], groups["exempt"]["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_decay_norms_everything_is_decayed(variant):
    groups = named_groups(model_of(variant, "fpn"), decay_norms=True)
    assert groups.keys() == {"decayed"}
    everything = norms_and_position_encodings(variant) | other_parameters(variant, "fpn")
    assert sorted(groups["decayed"]["params"]) == sorted(everything)
    assert groups["decayed"]["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("variant", "module", "block"),
    [
        ("svt-s", "twins.embeddings.projection", 0),
        ("svt-s", "twins.embeddings.layernorm", 0),
        ("svt-s", "twins.stages.0.layers.0.attention.qkv_proj", 0),
        ("svt-s", "twins.stages.0.position_encoding.projection", 1),
        ("svt-s", "twins.stages.0.layers.1.attention.sequence_reduction", 1),
        ("svt-s", "twins.stages.0.layernorm", 1),
        ("svt-s", "twins.stages.1.patch_embeddings.projection", 2),
        ("svt-s", "twins.stages.2.patch_embeddings.layernorm", 4),
        ("svt-s", "twins.stages.2.position_encoding.projection", 5),
        ("svt-s", "twins.stages.2.layers.9.mlp.fc2", 13),
        ("svt-s", "twins.stages.2.layernorm", 13),
        ("svt-s", "twins.stages.3.layers.3.layernorm_after", 17),
        ("svt-s", "twins.stages.3.layernorm", 17),
        ("svt-s", "decode_head.classifier", 18),
        ("svt-s", "auxiliary_head.conv.batch_norm", 18),
        ("pcpvt-b", "twins.stages.1.patch_embeddings.projection", 3),
        ("pcpvt-b", "twins.stages.3.layers.2.attention.o_proj", 27),
        ("pcpvt-b", "decode_head.fpn_bottleneck.batch_norm", 28),
    ],
)
def test_layer_decay_lowers_the_rate_once_for_every_block_before_the_heads(variant, module, block):
    groups = named_groups(model_of(variant), layer_decay=0.9)
    num_blocks = sum(DEPTHS[variant])
    for name in with_bias(module):
        (group,) = (group for group in groups.values() if name in group["params"])
        assert group["lr"] == pytest.approx(0.9 ** (num_blocks - block), rel=1e-12)
        assert group["name"].startswith(f"block_{block}_") == (block < num_blocks)
        assert group["weight_decay"] == (0.0 if name in norms_and_position_encodings(variant) else 0.01)


def test_the_position_encoding_of_a_stage_of_one_block_has_that_blocks_rate():
    config = TwinsConfig.from_variant("pcpvt-s", num_labels=3, depths=[1, 1, 1, 1])
    with torch.device("meta"):
        groups = named_groups(TwinsForSemanticSegmentation(config), layer_decay=0.5)
    assert "twins.stages.1.position_encoding.projection.weight" in groups["block_1_exempt"]["params"]
    assert groups["block_1_exempt"]["lr"] == 0.5**3


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_decay_puts_every_parameter_into_one_group_whose_rate_rises_from_the_stem_to_the_heads(variant):
    model = model_of(variant)
    groups = named_groups(model, layer_decay=0.75)
    names = [name for group in groups.values() for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    rates = [
        {group["lr"] for group in groups.values() if any(name.startswith(layer) for name in group["params"])}
        for layer in ("twins.embeddings.", *layers_of(variant), "decode_head.")
    ]
    assert all(len(rate) == 1 for rate in rates)
    stem, *blocks, heads = (rate.pop() for rate in rates)
    assert stem == blocks[0]
    assert blocks == sorted(set(blocks)) and blocks[-1] < heads == 1.0


def layers_of(variant):
    return [f"twins.stages.{stage}.layers.{block}." for stage in range(4) for block in range(DEPTHS[variant][stage])]


@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
def test_frozen_parameters_are_in_no_group(layer_decay):
    model = model_of("svt-s")
    model.twins.requires_grad_(False)
    model.twins.stages[3].layers[3].mlp.requires_grad_(True)
    names = [name for group in named_groups(model, layer_decay=layer_decay).values() for name in group["params"]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(trained)
    assert {name.split(".")[0] for name in names} == {"twins", "decode_head", "auxiliary_head"}


def learning_rates(iterations, learning_rate=6e-5, name="published", max_steps=160_000, warmup_steps=1500, **settings):
    """Rate of the optimizer at each of the iterations, in rising order: the first of them by steps, those after long
    gaps as a resumed run comes to them."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    settings = {"power": 1.0, "end": 0.0, **settings}
    scheduler = build_scheduler(optimizer, learning_rate, name, max_steps, warmup_steps, **settings)
    optimizer.step()
    iteration, rates = 0, []
    for target in iterations:
        if target - iteration > 2000:
            iteration = target - 1
            scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": iteration})
        while iteration < target:
            scheduler.step()
            iteration += 1
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_is_that_of_the_published_upernet_runs():
    """6e-5 (1 - t / 160000), times 1 - (1 - t / 1500)(1 - 1e-6) before iteration 1500; worked out by hand."""
    expected = {
        0: 6e-11,
        1: 6e-5 * (159_999 / 160_000) * (1 - 0.999999 * 1499 / 1500),
        750: 6e-5 * 0.9953125 * 0.5000005,
        1499: 6e-5 * 0.99063125 * (1 - 0.999999 / 1500),
        1500: 5.94375e-5,
        1501: 5.9437125e-5,
        80_000: 3e-5,
        159_999: 3.75e-10,
    }
    assert learning_rates(expected) == pytest.approx(list(expected.values()), rel=1e-9)


def test_an_end_equal_to_the_rate_makes_it_constant_as_in_the_published_fpn_runs():
    rates = learning_rates([0, 1, 40_000, 79_999], 1e-4, max_steps=80_000, warmup_steps=0, end=1e-4)
    assert rates == pytest.approx([1e-4] * 4, rel=1e-12)


def test_the_authors_fpn_configuration_falls_to_1e_6_with_power_nine_tenths():
    iterations = [0, 1, 40_000, 79_999, 80_000]
    rates = learning_rates(iterations, 1e-4, max_steps=80_000, warmup_steps=0, power=0.9, end=1e-6)
    expected = [1e-6 + (1e-4 - 1e-6) * (1 - t / 80_000) ** 0.9 for t in iterations]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert (rates[0], rates[-1]) == pytest.approx((1e-4, 1e-6), rel=1e-9)


def test_polynomial_decays_from_the_end_of_the_warm_up_as_mmsegmentation_1_does():
    iterations = [750, 1499, 1500, 1501, 80_000, 159_999, 160_000]
    rates = learning_rates(iterations, name="polynomial")
    expected = [6e-5 * t / 1500 for t in iterations if t < 1500]
    expected += [6e-5 * (1 - (t - 1500) / (160_000 - 1500)) for t in iterations if t >= 1500]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-18)


def test_polynomial_takes_power_and_end():
    (rate,) = learning_rates([55], 1e-3, name="polynomial", max_steps=100, warmup_steps=10, power=2.0, end=1e-5)
    assert rate == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5**2, rel=1e-9)


@pytest.mark.parametrize("name", ["published", "polynomial", "cosine"])
def test_a_schedule_keeps_the_ratios_of_layer_decay(name):
    groups = parameter_groups(model_of("svt-s"), 1e-3, 0.01, layer_decay=0.9)
    before = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = build_scheduler(optimizer, 1e-3, name, 10, 0, power=1.0, end=0.0)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    after = [group["lr"] for group in optimizer.param_groups]
    factors = [rate / initial for rate, initial in zip(after, before, strict=True)]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-12)
    assert 0 < factors[0] < 1


@pytest.mark.parametrize(
    ("total", "per_device", "num_processes", "expected"),
    [
        (16, 2, 1, (2, 8)),
        (16, 2, 8, (2, 1)),
        (16, 2, 16, (1, 1)),  # at most so many
        (16, 16, 1, (16, 1)),
        (12, 6, 1, (6, 2)),
        (None, 4, 8, (4, 3)),  # without a total: what is given
    ],
)
def test_a_batch_is_split_over_processes_and_forward_passes(total, per_device, num_processes, expected):
    assert split_batch(total, per_device, 3, num_processes) == expected


@pytest.mark.parametrize(
    ("total", "per_device", "num_processes", "message"),
    [
        (16, 2, 3, "--total_train_batch_size 16 cannot be split evenly over 3 processes"),
        (8, 2, 16, "--total_train_batch_size 8 cannot be split evenly over 16 processes"),
        (
            24,
            5,
            2,
            "--total_train_batch_size 24 leaves 12 crops to each of 2 .* 5 does not divide; 4 does",
        ),
    ],
)
def test_a_batch_that_cannot_be_split_evenly_is_refused_with_its_numbers(total, per_device, num_processes, message):
    with pytest.raises(ValueError, match=message):
        split_batch(total, per_device, 1, num_processes)
