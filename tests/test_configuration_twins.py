import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from twins_hf import TwinsConfig
from twins_hf.configuration_twins import VARIANTS


def test_the_defaults_are_pcpvt_small():
    assert TwinsConfig().to_diff_dict() == TwinsConfig.from_variant("pcpvt-s").to_diff_dict()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_survives_saving_and_loading(variant, tmp_path):
    config = TwinsConfig.from_variant(variant, num_labels=7, drop_path_rate=0.25)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.window_sizes is None) == variant.startswith("pcpvt")
    assert loaded.num_labels == 7


def test_an_unknown_variant_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'svt-xl' is unknown: choose one of pcpvt-s"):
        TwinsConfig.from_variant("svt-xl")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depths", [2, 2, 2], r"depths=\[2, 2, 2\] must be four positive integers"),
        ("sr_ratios", [8, 4, 2, 0], "sr_ratios"),
        ("window_sizes", [7, 7, 7], "window_sizes"),
        ("hidden_sizes", [64, 128, 320, 511], "8 does not divide 511"),
        ("hidden_sizes", "wide", "hidden_sizes"),
        ("drop_path_rate", 1.0, r"drop_path_rate=1.0 must lie in \[0, 1\)"),
        ("window_padding", "zeros", "window_padding"),
        ("decoder_type", "deeplab", "decoder_type"),
        ("semantic_loss_reduction", "mean", "semantic_loss_reduction"),
        ("pool_scales", [], "pool_scales"),
        ("decoder_hidden_size", 0, "decoder_hidden_size=0 must be at least 1"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        TwinsConfig(**{field: value})
