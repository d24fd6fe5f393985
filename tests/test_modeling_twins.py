import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FAMILIES, TINY, randomize
from torch import nn
from transformers import AutoBackbone, AutoModel, AutoModelForSemanticSegmentation

from twins_hf import (
    TwinsBackbone,
    TwinsConfig,
    TwinsForImageClassification,
    TwinsForSemanticSegmentation,
    TwinsModel,
)
from twins_hf.configuration_twins import VARIANTS
from twins_hf.modeling_twins import TwinsConvModule, TwinsMLP

SIZES = [(32, 32), (64, 96), (61, 130), (224, 224)]


class PlainTwins:
    """
    The paper's equations, one at a time and slowly, on the weights of a model: loops over windows and heads, attention
    by its definition, and the window cut to the positions that may be attended to in place of any mask.
    """

    def __init__(self, model: TwinsForSemanticSegmentation):
        self.config = model.config
        self.weights = model.state_dict()

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def conv(self, name, x, **kwargs):
        """On a map (H, W, C)."""
        y = F.conv2d(
            x.permute(2, 0, 1)[None], self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"), **kwargs
        )
        return y[0].permute(1, 2, 0)

    @staticmethod
    def attention(queries, keys, values, num_heads):
        """(N, C), (M, C), (M, C) -> (N, C)."""
        heads = []
        for q, k, v in zip(*(x.chunk(num_heads, dim=-1) for x in (queries, keys, values)), strict=True):
            heads.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
        return torch.cat(heads, dim=-1)

    def gsa(self, name, x, stage):
        ratio, num_heads = self.config.sr_ratios[stage], self.config.num_attention_heads[stage]
        reduced = x
        if ratio > 1:
            reduced = self.norm(f"{name}.layernorm", self.conv(f"{name}.sequence_reduction", x, stride=ratio), 1e-5)
        keys, values = self.linear(f"{name}.kv_proj", reduced.flatten(0, 1)).chunk(2, dim=-1)
        context = self.attention(self.linear(f"{name}.q_proj", x.flatten(0, 1)), keys, values, num_heads)
        return self.linear(f"{name}.o_proj", context).view(x.shape)

    def lsa(self, name, x, stage):
        side, num_heads = self.config.window_sizes[stage], self.config.num_attention_heads[stage]
        (height, width), out = x.shape[:2], torch.empty_like(x)
        bottom, right = -height % side, -width % side
        # Padded tokens are zeros, and so carry the qkv bias, where they are attended to at all.
        if self.config.window_padding == "unmasked" or (
            self.config.window_padding == "mmseg" and not (bottom and right)
        ):
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        for top in range(0, height, side):
            for left in range(0, width, side):
                window = x[top : top + side, left : left + side]
                q, k, v = self.linear(f"{name}.qkv_proj", window.flatten(0, 1)).chunk(3, dim=-1)
                context = self.linear(f"{name}.o_proj", self.attention(q, k, v, num_heads)).view(window.shape)
                real = out[top : top + side, left : left + side]
                real.copy_(context[: real.shape[0], : real.shape[1]])
        return out

    def patches(self, name, x, size):
        if self.config.patch_padding:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % size, 0, -x.shape[0] % size))
        else:
            x = x[: x.shape[0] // size * size, : x.shape[1] // size * size]
        return self.norm(f"{name}.layernorm", self.conv(f"{name}.projection", x, stride=size), 1e-5)

    def encoder(self, image):
        """(3, H, W) -> the four stages' maps (H, W, C)."""
        eps, x, maps = self.config.layer_norm_eps, image.permute(1, 2, 0), []
        for stage, depth in enumerate(self.config.depths):
            name = f"twins.stages.{stage}"
            embeddings = "twins.embeddings" if stage == 0 else f"{name}.patch_embeddings"
            x = self.patches(embeddings, x, self.config.patch_sizes[stage])
            for layer in range(depth):
                block = f"{name}.layers.{layer}"
                attend = self.lsa if self.config.window_sizes and layer % 2 == 0 else self.gsa
                x = x + attend(f"{block}.attention", self.norm(f"{block}.layernorm_before", x, eps), stage)
                y = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.layernorm_after", x, eps))
                x = x + self.linear(f"{block}.mlp.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
                if layer == 0:
                    x = x + self.conv(f"{name}.position_encoding.projection", x, padding=1, groups=x.shape[-1])
            if self.config.norm_after_stage:
                x = self.norm(f"{name}.layernorm", x, eps)
            maps.append(x)
        return maps

    def conv_bn_relu(self, name, x):
        y = F.conv2d(
            x, self.weights[f"{name}.conv.weight"], padding=self.weights[f"{name}.conv.weight"].shape[-1] // 2
        )
        mean, var, scale, shift = (
            self.weights[f"{name}.batch_norm.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu((y - mean) / torch.sqrt(var + 1e-5) * scale + shift)

    def classify(self, name, x):
        return F.conv2d(x, self.weights[f"{name}.classifier.weight"], self.weights[f"{name}.classifier.bias"])

    def upernet(self, maps):
        def resize(x, like):
            return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

        c1, c2, c3, c4 = (x.permute(2, 0, 1)[None] for x in maps)
        pyramid = [c4]
        for index, bins in enumerate(self.config.pool_scales):
            pooled = self.conv_bn_relu(f"decode_head.pyramid_pooling.pools.{index}.1", F.adaptive_avg_pool2d(c4, bins))
            pyramid.append(resize(pooled, c4))
        p4 = self.conv_bn_relu("decode_head.pyramid_pooling.bottleneck", torch.cat(pyramid, 1))
        l1, l2, l3 = (self.conv_bn_relu(f"decode_head.lateral_convs.{i}", c) for i, c in enumerate((c1, c2, c3)))
        l3 = l3 + resize(p4, l3)
        l2 = l2 + resize(l3, l2)
        l1 = l1 + resize(l2, l1)
        levels = [self.conv_bn_relu(f"decode_head.fpn_convs.{i}", level) for i, level in enumerate((l1, l2, l3))]
        fused = torch.cat([resize(level, c1) for level in (*levels, p4)], 1)
        return self.classify("decode_head", self.conv_bn_relu("decode_head.fpn_bottleneck", fused))

    def semantic_fpn(self, maps):
        def conv(name, x):
            weight = self.weights[f"decode_head.{name}.weight"]
            return F.conv2d(x, weight, self.weights[f"decode_head.{name}.bias"], padding=weight.shape[-1] // 2)

        def resize(x, size, **kwargs):
            return F.interpolate(x, size=size, **kwargs)

        levels = [conv(f"lateral_convs.{i}", x.permute(2, 0, 1)[None]) for i, x in enumerate(maps)]
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[-2:], mode="nearest")
        total = 0
        for i, level in enumerate(levels):
            x = conv(f"fpn_convs.{i}", level)
            for step in range(max(1, i)):
                x = self.conv_bn_relu(f"decode_head.scale_heads.{i}.{step}", x)
                if i:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + resize(x, levels[0].shape[-2:], mode="bilinear", align_corners=False)
        return self.classify("decode_head", total)

    def auxiliary(self, maps):
        return self.classify(
            "auxiliary_head", self.conv_bn_relu("auxiliary_head.conv", maps[2].permute(2, 0, 1)[None])
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_the_model_equals_the_papers_equations(tiny_model, size, attention):
    tiny_model.set_attn_implementation(attention)
    pixel_values = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    outputs = tiny_model(pixel_values, output_hidden_states=True)
    plain = PlainTwins(tiny_model)
    maps = plain.encoder(pixel_values[0])
    for ours, theirs in zip(outputs.hidden_states[1:], maps, strict=True):
        torch.testing.assert_close(ours[0].permute(1, 2, 0), theirs, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs.logits, plain.upernet(maps), rtol=1e-4, atol=2e-5)
    auxiliary = tiny_model.auxiliary_head(outputs.hidden_states[1:])
    torch.testing.assert_close(auxiliary, plain.auxiliary(maps), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_the_semantic_fpn_equals_its_equations(tiny_config, size):
    config = TwinsConfig(**{**tiny_config.to_diff_dict(), "decoder_type": "fpn", "use_auxiliary_head": False})
    model = randomize(TwinsForSemanticSegmentation(config))
    pixel_values = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    plain = PlainTwins(model)
    expected = plain.semantic_fpn(plain.encoder(pixel_values[0]))
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("patch_padding", [True, False])
@pytest.mark.parametrize("window_padding", ["masked", "mmseg", "unmasked"])
@torch.inference_mode()
def test_each_references_padding_is_told_apart_from_the_others(window_padding, patch_padding):
    """Stage 1 is padded on one side only by the first size, on both by the second."""
    settings = {"window_padding": window_padding, "patch_padding": patch_padding}
    config = TwinsConfig(**TINY, **FAMILIES["svt"], **settings, num_labels=3)
    model = randomize(TwinsForSemanticSegmentation(config))
    for size in ((56, 66), (66, 73)):
        pixel_values = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        stages = model(pixel_values, output_hidden_states=True).hidden_states[1:]
        for ours, theirs in zip(stages, PlainTwins(model).encoder(pixel_values[0]), strict=True):
            torch.testing.assert_close(ours[0].permute(1, 2, 0), theirs, rtol=1e-4, atol=2e-5)
        if window_padding != "masked" and (window_padding == "unmasked" or size == (56, 66)):
            model.config.window_padding = "masked"
            other = PlainTwins(model).encoder(pixel_values[0])[0]
            model.config.window_padding = window_padding
            assert (stages[0][0].permute(1, 2, 0) - other).abs().max() > 1e-3


@torch.inference_mode()
def test_every_layer_norm_has_its_own_epsilon(tiny_config):
    tiny_config.layer_norm_eps = 1e-3  # far from the 1e-5 of patch embeddings and reduced keys
    model = randomize(TwinsForSemanticSegmentation(tiny_config))
    for name, parameter in model.named_parameters():
        if "projection" in name or "sequence_reduction" in name:
            parameter.mul_(0.01)
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = PlainTwins(model).encoder(pixel_values[0])
    stages = model(pixel_values, output_hidden_states=True).hidden_states[1:]
    for ours, theirs in zip(stages, expected, strict=True):
        torch.testing.assert_close(ours[0].permute(1, 2, 0), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [(7, 14), (8, 8), (7, 10), (10, 7), (13, 15), (1, 1), (3, 20)])
@torch.inference_mode()
def test_real_positions_attend_to_no_padding_whichever_side_has_it(size):
    model = randomize(TwinsForSemanticSegmentation(TwinsConfig(**TINY, **FAMILIES["svt"], num_labels=3)))
    hidden_states = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    attention = model.twins.stages[0].layers[0].attention
    attended, _ = attention(hidden_states, attention.padding_mask(hidden_states))
    for ours, image in zip(attended, hidden_states, strict=True):
        plain = PlainTwins(model).lsa("twins.stages.0.layers.0.attention", image, stage=0)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "classifier", "upernet", "auxiliary", "fpn"),
    [
        ("pcpvt-s", 24_106_216, 54_080_044, 776_342, 27_858_838),
        ("pcpvt-b", 43_828_456, 73_802_284, 776_342, 47_581_078),
        ("pcpvt-l", 60_989_672, 90_963_500, 776_342, 64_742_294),
        ("svt-s", 24_060_776, 53_856_300, 628_886, 27_798_934),
        ("svt-b", 56_070_952, 87_724_460, 923_798, 59_676_438),
        ("svt-l", 99_271_400, 132_782_892, 1_218_710, 102_744_214),
    ],
)
def test_parameters_are_as_many_as_in_the_published_models(variant, classifier, upernet, auxiliary, fpn):
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        segmenter = TwinsForSemanticSegmentation(TwinsConfig.from_variant(variant, num_labels=150))
        assert (count(segmenter), count(segmenter.auxiliary_head)) == (upernet, auxiliary)
        config = TwinsConfig.from_variant(variant, num_labels=150, decoder_type="fpn")
        assert count(TwinsForSemanticSegmentation(config)) == fpn
        config = TwinsConfig.from_variant(variant, num_labels=1000, norm_after_stage=False)
        assert count(TwinsForImageClassification(config)) == classifier


@torch.inference_mode()
def test_hidden_states_are_the_stem_and_the_four_stages(tiny_config):
    model = TwinsModel(tiny_config).eval()
    outputs = model(torch.randn(2, 3, 64, 96), output_hidden_states=True, output_attentions=True)
    shapes = [tuple(state.shape) for state in outputs.hidden_states]
    assert shapes == [(2, 8, 16, 24), (2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
    assert outputs.last_hidden_state.shape == (2, 32, 2, 3)
    assert not torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])  # only the former is normed
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean((-2, -1)))
    assert "hidden_states" not in model(torch.randn(1, 3, 64, 64))


@torch.inference_mode()
def test_every_block_records_its_attention(tiny_model):
    tiny_model.set_attn_implementation("eager")
    attentions = tiny_model(torch.randn(1, 3, 64, 64), output_attentions=True).attentions
    assert len(attentions) == 8
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_a_classifier_reads_the_mean_of_the_normed_last_map(tiny_config):
    model = randomize(TwinsForImageClassification(tiny_config))
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    outputs = model(pixel_values, labels=labels, output_hidden_states=True)
    last = outputs.hidden_states[-1].permute(0, 2, 3, 1)
    norm = model.twins.layernorm
    pooled = F.layer_norm(last, last.shape[-1:], norm.weight, norm.bias, 1e-6).mean((1, 2))
    expected = F.linear(pooled, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(expected, labels))


@torch.inference_mode()
def test_a_backbone_gives_the_raw_maps_of_the_stages_asked_for(tiny_config):
    tiny_config.out_features = ["stem", "stage2", "stage4"]
    backbone = randomize(AutoBackbone.from_config(tiny_config))
    assert type(backbone) is TwinsBackbone and backbone.channels == [8, 16, 32]
    outputs = backbone(torch.randn(1, 3, 64, 64), output_hidden_states=True)
    for feature_map, stage in zip(outputs.feature_maps, (0, 2, 4), strict=True):
        assert torch.equal(feature_map, outputs.hidden_states[stage])


@pytest.mark.parametrize("size", [(28, 64), (64, 16)])
def test_a_too_small_image_is_refused_in_one_sentence(tiny_model, size):
    with pytest.raises(ValueError, match="pixel_values are too small.*at least 32 pixels a side"):
        tiny_model(torch.randn(1, 3, *size))


def test_another_number_of_channels_is_refused_by_name(tiny_model):
    with pytest.raises(ValueError, match="pixel_values have 4 channels.*num_channels is 3"):
        tiny_model(torch.randn(1, 4, 64, 64))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="num_labels=1 must be at least 2"):
        TwinsForSemanticSegmentation(TwinsConfig(**TINY, num_labels=1))


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_the_loss_is_cross_entropy_at_label_size_with_the_auxiliary_part(tiny_model, reduction):
    tiny_model.config.semantic_loss_reduction = reduction
    pixel_values = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 3, (2, 64, 64))
    labels[:, :20] = 255
    outputs = tiny_model(pixel_values, labels=labels, output_hidden_states=True)

    def cross_entropy(logits):
        logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        log_probabilities = logits.log_softmax(dim=1)
        picked = log_probabilities.gather(1, labels.clamp(max=2)[:, None])[:, 0][labels != 255]
        return -picked.sum() / (labels.numel() if reduction == "all" else (labels != 255).sum())

    auxiliary = tiny_model.auxiliary_head(outputs.hidden_states[1:])
    torch.testing.assert_close(outputs.auxiliary_loss, cross_entropy(auxiliary))
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits) + 0.4 * cross_entropy(auxiliary))


def test_a_batch_without_labels_costs_nothing(tiny_model):
    labels = torch.full((1, 64, 64), 255)
    assert tiny_model(torch.randn(1, 3, 64, 64), labels=labels).loss.item() == 0.0


@pytest.mark.parametrize("decoder_type", ["upernet", "fpn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_lowers_the_loss(variant, decoder_type):
    torch.manual_seed(0)
    config = TwinsConfig.from_variant(
        variant, decoder_type=decoder_type, num_labels=5, drop_path_rate=0.0, classifier_dropout_prob=0.0
    )
    model = TwinsForSemanticSegmentation(config).train()
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    before = model(pixel_values, labels=labels).loss
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    with torch.no_grad():
        assert model(pixel_values, labels=labels).loss < before - 1e-3


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_model.activation_checkpointing_enable()
        tiny_model.train()
        tiny_model.zero_grad()
        torch.manual_seed(0)
        tiny_model(pixel_values, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in tiny_model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_rises_linearly_and_drops_whole_samples():
    model = TwinsForSemanticSegmentation(TwinsConfig(**{**TINY, "drop_path_rate": 0.7}, num_labels=3))
    rates = [layer.drop_path.drop_prob for stage in model.twins.stages for layer in stage.layers]
    assert rates == pytest.approx([0.1 * block for block in range(8)])
    drop_path = model.twins.stages[3].layers[1].drop_path.train()
    torch.manual_seed(0)
    kept = drop_path(torch.ones(4000, 2, 2, 1))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(kept.amax((1, 2, 3)), kept.amin((1, 2, 3)))


@pytest.mark.parametrize("dropout_prob", [0.0, 0.5])
def test_the_mlp_keeps_one_widened_map_and_has_its_gradients(dropout_prob):
    mlp = TwinsMLP(TwinsConfig(**TINY, hidden_dropout_prob=dropout_prob), stage_idx=0).double().train()
    hidden_states = torch.randn(2, 5, 3, mlp.fc1.in_features, dtype=torch.float64, requires_grad=True)
    widened, kept = (2, 5, 3, mlp.fc1.out_features), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    inputs = (hidden_states, *mlp.parameters())
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = mlp(hidden_states)
    assert kept.count(math.prod(widened)) == 1

    torch.manual_seed(0)
    plain = F.dropout(F.gelu(F.linear(hidden_states, mlp.fc1.weight, mlp.fc1.bias)), dropout_prob)
    plain = F.dropout(F.linear(plain, mlp.fc2.weight, mlp.fc2.bias), dropout_prob)
    torch.testing.assert_close(output, plain)
    given = torch.randn_like(output)
    torch.testing.assert_close(torch.autograd.grad(output, inputs, given), torch.autograd.grad(plain, inputs, given))


@pytest.mark.parametrize("norm", ["of the batch", "running"])
def test_dropout_of_channels_is_that_after_relu_with_its_gradients(norm):
    module = TwinsConvModule(8, 6, kernel_size=3, dropout_prob=0.5).double()
    randomize(module)
    module.train().batch_norm.train(norm == "of the batch")
    feature_map = torch.randn(5, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    dropped = module(feature_map)
    kept = dropped.ne(0).any(dim=(2, 3))
    assert 5 < kept.sum() < 25

    plain = module.batch_norm(F.conv2d(feature_map, module.conv.weight, padding=1)).relu() * 2 * kept[..., None, None]
    torch.testing.assert_close(dropped, plain)
    inputs = (feature_map, module.conv.weight, module.batch_norm.weight)
    given = torch.randn_like(dropped)
    torch.testing.assert_close(torch.autograd.grad(dropped, inputs, given), torch.autograd.grad(plain, inputs, given))


def test_a_saved_model_loads_as_safetensors_through_the_auto_classes(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is TwinsForSemanticSegmentation
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixel_values).logits, tiny_model(pixel_values).logits)
    assert all(torch.equal(tensor, tiny_model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is TwinsModel
    assert torch.equal(encoder.stages[0].layers[0].mlp.fc1.weight, tiny_model.twins.stages[0].layers[0].mlp.fc1.weight)


def test_an_encoder_initialises_a_segmentation_model(tiny_config, tmp_path):
    encoder = randomize(TwinsModel(tiny_config))
    encoder.save_pretrained(tmp_path)
    model, report = TwinsForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"decode_head", "auxiliary_head"}
    assert model.decode_head.classifier.weight.detach().std() == pytest.approx(16**-0.5, rel=0.3)
    for name, parameter in model.twins.named_parameters():
        assert torch.equal(parameter, encoder.state_dict()[name])


def test_the_label_map_is_the_same_in_a_new_process(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 70, 90)
    torch.save(pixel_values, tmp_path / "input.pt")
    code = (
        "import sys, torch, twins_hf\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        "folder = sys.argv[1]\n"
        "with torch.inference_mode():\n"
        "    logits = Auto.from_pretrained(folder)(torch.load(folder + '/input.pt')).logits\n"
        "torch.save(logits.argmax(1), folder + '/output.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with torch.inference_mode():
        expected = tiny_model(pixel_values).logits.argmax(1)
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family):
    model = randomize(TwinsForSemanticSegmentation(TwinsConfig(**TINY, **FAMILIES[family], num_labels=3)))
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = model(pixel_values).logits
        rounded = model.to(torch.bfloat16)(pixel_values.to(torch.bfloat16)).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("framework", ["upernet", "maskformer", "mask2former", "detr"])
@torch.inference_mode()
def test_transformers_frameworks_take_the_backbone(framework):
    stages = ["stage4"] if framework == "detr" else ["stage1", "stage2", "stage3", "stage4"]
    backbone_config = TwinsConfig(**TINY, **FAMILIES["svt"], out_features=stages)
    detr = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    detr |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4}
    pixel_values = torch.randn(1, 3, 96, 128)
    if framework == "upernet":
        config = transformers.UperNetConfig(
            backbone_config=backbone_config,
            hidden_size=16,
            auxiliary_in_channels=24,
            auxiliary_channels=8,
            num_labels=5,
        )
        outputs = transformers.UperNetForSemanticSegmentation(config).eval()(pixel_values)
        assert outputs.logits.shape == (1, 5, 96, 128)
    elif framework == "maskformer":
        config = transformers.MaskFormerConfig(
            backbone_config=backbone_config,
            fpn_feature_size=32,
            mask_feature_size=32,
            decoder_config=transformers.DetrConfig(**detr),
        )
        outputs = transformers.MaskFormerForInstanceSegmentation(config).eval()(pixel_values)
        assert outputs.masks_queries_logits.shape == (1, 4, 24, 32)
    elif framework == "mask2former":
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone_config,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            num_queries=4,
        )
        outputs = transformers.Mask2FormerForUniversalSegmentation(config).eval()(pixel_values)
        assert outputs.masks_queries_logits.shape == (1, 4, 24, 32)
    else:
        config = transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone_config, **detr
        )
        outputs = transformers.DetrForObjectDetection(config).eval()(pixel_values)
        assert outputs.pred_boxes.shape == (1, 4, 4)


class Adapter(nn.Module):
    """A layer around a layer, whose weights it shows as its own, as adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias, self.out_features = layer, layer.weight, layer.bias, len(layer.weight)

    def forward(self, inputs):
        return 2 * self.layer(inputs)


@pytest.mark.parametrize("wrap", [lambda layer: layer, Adapter])
@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
@torch.inference_mode()
def test_a_compiled_layer_does_what_it_does_uncompiled_also_with_adapters(wrap, size):
    torch.compiler.reset()
    layer = randomize(TwinsForSemanticSegmentation(TwinsConfig(**TINY))).twins.stages[3]
    layer.position_encoding.projection = wrap(layer.position_encoding.projection)
    layer.layers[0].mlp.fc1 = wrap(layer.layers[0].mlp.fc1)
    layer.layers[1].attention.o_proj = wrap(layer.layers[1].attention.o_proj)
    feature_map = torch.randn(2, TINY["hidden_sizes"][2], 2 * size[0], 2 * size[1])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(feature_map), layer(feature_map))
