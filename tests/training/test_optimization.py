import pytest
import torch

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation
from twins_hf.configuration_twins import VARIANTS
from twins_hf.training import decay_factor, parameter_groups


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_encoders_layer_norms_and_position_encodings_are_not_decayed(variant):
    with torch.device("meta"):
        model = TwinsForSemanticSegmentation(TwinsConfig.from_variant(variant, num_labels=150))
    decayed, exempt = parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    exempt_names = {names[parameter] for parameter in exempt["params"]}
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    for name in names.values():
        is_norm = name.startswith("twins.") and "layernorm" in name
        assert (name in exempt_names) == (is_norm or "position_encoding" in name), name


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (1, (1 - 1 / 160_000) * (1 - (1 - 1 / 1500) * (1 - 1e-6))),
        (750, (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6))),
        (1499, (1 - 1499 / 160_000) * (1 - (1 / 1500) * (1 - 1e-6))),
        (1500, 1 - 1500 / 160_000),
        (1501, 1 - 1501 / 160_000),
        (80_000, 0.5),
        (159_999, 1 / 160_000),
        (160_000, 0.0),
    ],
)
def test_the_learning_rate_is_that_of_the_published_runs(step, expected):
    assert decay_factor(step, 160_000, 1500) == pytest.approx(expected, rel=1e-12)


def test_the_decay_may_have_another_power_and_no_warm_up():
    assert decay_factor(25, 100, 0, power=0.9) == pytest.approx(0.75**0.9)
