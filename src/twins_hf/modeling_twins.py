# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""
Twins-PCPVT and Twins-SVT ("Twins: Revisiting the Design of Spatial Attention in Vision Transformers", arXiv
2104.13840), with the UPerNet and Semantic FPN decode heads the paper segments with.

Inside a stage, hidden states are (batch, height, width, channels); between stages, and wherever they leave the model,
(batch, channels, height, width).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_twins import TwinsConfig
from .convolution_twins import add_resized, convolve, convolve_pyramid, crop, resize
from .loss_twins import resized_cross_entropy


def pad_map(hidden_states: torch.Tensor, multiple: int) -> torch.Tensor:
    """(B, H, W, C) with zeros at the bottom and right, up to multiples; as it is where it has them already."""
    pad_bottom, pad_right = (padding(side, multiple) for side in hidden_states.shape[1:3])
    if is_needed(pad_bottom) or is_needed(pad_right):
        hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom))
    return hidden_states


def padding(side: int, multiple: int) -> int:
    """What is missing from `side` to a multiple."""
    return (side + multiple - 1) // multiple * multiple - side


def is_needed(pad: int | torch.SymInt) -> bool:
    """Whether there is padding. A program traced for any size cannot tell, so it always pads, be it by 0."""
    return not statically_known_true(pad == 0)


def is_compiled(layer: nn.Module, kind: type) -> bool:
    """Whether a compiler, not an export, sees a `layer` that is of this very `kind`, and no adapter in its place."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and type(layer) is kind


def linear(layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    `layer(hidden_states)`, (..., C) -> (..., C'). Compiled for a CPU, the bias is apart: the compiler adds it in one
    loop with what comes next, where torch would fill the product's memory with it first.
    """
    is_on_cpu = hidden_states.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if is_on_cpu and is_compiled(layer, nn.Linear):
        return nn.functional.linear(hidden_states, layer.weight) + layer.bias
    return layer(hidden_states)


class TwinsPatchConv(nn.Conv2d):
    """A convolution of non-overlapping patches, whose remainder at the edge is not seen, as a matrix product."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int):
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H//patch, W//patch); in memory the channels are last in both."""
        size = self.stride[0]
        batch_size, channels, height, width = feature_map.shape
        if torch.compiler.is_compiling() and (is_needed(height % size) or is_needed(width % size)):
            # A program for any size must not depend on whether there is a remainder.
            return super().forward(feature_map)
        patches = feature_map.permute(0, 2, 3, 1)[:, : height // size * size, : width // size * size]
        patches = patches.reshape(batch_size, height // size, size, width // size, size * channels)
        patches = patches.transpose(2, 3).flatten(3)  # (B, H//patch, W//patch, patch * patch * C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


class TwinsPatchEmbeddings(nn.Module):
    """Non-overlapping patches, projected and normalised: (B, C, H, W) -> (B, H/patch, W/patch, hidden_size)."""

    def __init__(self, config: TwinsConfig, stage_idx: int):
        super().__init__()
        self.patch_size = config.patch_sizes[stage_idx]
        self.patch_padding = config.patch_padding
        in_channels = config.num_channels if stage_idx == 0 else config.hidden_sizes[stage_idx - 1]
        hidden_size = config.hidden_sizes[stage_idx]
        self.projection = TwinsPatchConv(in_channels, hidden_size, self.patch_size)
        self.layernorm = nn.LayerNorm(hidden_size)  # epsilon 1e-5 whatever layer_norm_eps, as in every reference
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if self.patch_padding:
            feature_map = pad_map(feature_map.permute(0, 2, 3, 1), self.patch_size).permute(0, 3, 1, 2)
        embeddings = self.projection(feature_map).permute(0, 2, 3, 1)
        return self.dropout(self.layernorm(embeddings))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out. Queries (B, heads, N, d), keys and values (B, heads, M, d) -> (B, N, heads, d) and
    probabilities (B, heads, N, M). A boolean mask is true where a key may be attended to."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class TwinsAttention(nn.Module):
    """What GSA and LSA share: multi-head attention by the configured implementation, and the output projection."""

    def __init__(self, config: TwinsConfig, stage_idx: int):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_sizes[stage_idx]
        self.num_attention_heads = config.num_attention_heads[stage_idx]
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def split_heads(self, tokens: torch.Tensor, num_projections: int) -> tuple[torch.Tensor, ...]:
        """(B, N, projections * C) -> one (B, heads, N, d) for each projection."""
        batch_size, length, _ = tokens.shape
        shape = (batch_size, length, num_projections, self.num_attention_heads, self.head_dim)
        return tokens.view(shape).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Heads (B, heads, N, d) -> tokens (B, N, C) and, where the implementation gives them, probabilities."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, probabilities = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return context.reshape(*context.shape[:2], self.hidden_size), probabilities


class TwinsGlobalSubsampledAttention(TwinsAttention):
    """GSA (section 3.2 of the paper): every position attends to a map whose sides are reduced `sr_ratio` times. It has
    no windows to mask."""

    def __init__(self, config: TwinsConfig, stage_idx: int):
        super().__init__(config, stage_idx)
        self.sr_ratio = config.sr_ratios[stage_idx]
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=config.qkv_bias)
        self.kv_proj = nn.Linear(self.hidden_size, 2 * self.hidden_size, bias=config.qkv_bias)
        if self.sr_ratio > 1:
            self.sequence_reduction = TwinsPatchConv(self.hidden_size, self.hidden_size, self.sr_ratio)
            self.layernorm = nn.LayerNorm(self.hidden_size)  # epsilon 1e-5, as in every reference

    def reduce(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H//sr_ratio * W//sr_ratio, C); a remainder at the edge is not seen."""
        if self.sr_ratio == 1:
            return hidden_states.flatten(1, 2)
        height, width = hidden_states.shape[1:3]
        if height < self.sr_ratio or width < self.sr_ratio:
            raise ValueError(
                f"pixel_values are too small: a feature map of {height}x{width} cannot be reduced by "
                f"sr_ratio={self.sr_ratio}; images need at least 32 pixels a side."
            )
        reduced = self.sequence_reduction(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.layernorm(reduced.flatten(1, 2))

    def forward(
        self, hidden_states: torch.Tensor, window_mask: None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (query,) = self.split_heads(self.q_proj(hidden_states.flatten(1, 2)), 1)
        key, value = self.split_heads(self.kv_proj(self.reduce(hidden_states)), 2)
        context, probabilities = self.attend(query, key, value, **kwargs)
        return self.dropout(linear(self.o_proj, context)).view(hidden_states.shape), probabilities


class TwinsLocallyGroupedAttention(TwinsAttention):
    """
    LSA (section 3.2 of the paper): attention within windows. A map that is no multiple of the window is padded at the
    right and bottom; `config.window_padding` says when the padding is masked.
    """

    def __init__(self, config: TwinsConfig, stage_idx: int):
        super().__init__(config, stage_idx)
        self.window_size = config.window_sizes[stage_idx]
        self.window_padding = config.window_padding
        self.qkv_proj = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=config.qkv_bias)

    def partition(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) of whole windows -> (B * windows, window * window, C)."""
        batch_size, height, width, channels = hidden_states.shape
        side = self.window_size
        windows = hidden_states.view(batch_size, height // side, side, width // side, side, channels)
        return windows.transpose(2, 3).reshape(-1, side * side, channels)

    def padding_mask(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        Which keys of each window may be attended to, (B * windows, 1, 1, window * window), for a map (B, H, W, C) that
        has yet to be padded; `None` where all may.
        """
        batch_size, height, width, _ = hidden_states.shape
        pad_bottom, pad_right = padding(height, self.window_size), padding(width, self.window_size)
        are_needed = is_needed(pad_bottom), is_needed(pad_right)
        if self.window_padding == "unmasked" or not any(are_needed):
            return None
        if self.window_padding == "mmseg" and not all(are_needed):
            return None
        rows, columns = height, width
        if self.window_padding == "mmseg":  # the same for sizes that an exported program learns when it runs
            rows, columns = height * torch.sym_min(pad_bottom, 1), width * torch.sym_min(pad_right, 1)
        is_real_row = torch.arange(height + pad_bottom, device=hidden_states.device) < rows
        is_real_column = torch.arange(width + pad_right, device=hidden_states.device) < columns
        is_real = is_real_row[:, None] & is_real_column
        if self.window_padding == "mmseg":
            is_real = is_real | ~is_real.any()
        mask = self.partition(is_real[None, :, :, None])
        return mask.view(-1, 1, 1, self.window_size**2).repeat(batch_size, 1, 1, 1)

    def forward(
        self, hidden_states: torch.Tensor, window_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, height, width, channels = hidden_states.shape
        side = self.window_size
        hidden_states = pad_map(hidden_states, side)
        padded_height, padded_width = hidden_states.shape[1:3]

        qkv = self.qkv_proj(self.partition(hidden_states))
        query, key, value = self.split_heads(qkv, 3)
        context, probabilities = self.attend(query, key, value, window_mask, **kwargs)

        # (B * windows, window * window, C) -> (B, H, W, C); the projection then sees no padding.
        context = context.view(batch_size, padded_height // side, padded_width // side, side, side, channels)
        context = context.transpose(2, 3).reshape(batch_size, padded_height, padded_width, channels)
        context = crop(context, height, width)
        return self.dropout(linear(self.o_proj, context)), probabilities


class TwinsMLP(nn.Module):
    def __init__(self, config: TwinsConfig, stage_idx: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        intermediate_size = hidden_size * config.mlp_ratios[stage_idx]
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def activate_and_narrow(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(linear(self.fc2, self.dropout(self.activation_fn(hidden_states))))

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activate_and_narrow(linear(self.fc1, hidden_states))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The way back computes the activation again, which would be the second of two wide maps that are kept.
            return checkpoint(self.activate_and_narrow, linear(self.fc1, hidden_states), use_reentrant=False)
        if torch.compiler.is_compiling() or hidden_states.device.type != "cpu":
            return self.project(hidden_states)
        # Some positions at a time: what lies between the products stays in cache, and in memory that is had already.
        positions = hidden_states.flatten(0, -2).split(max(1, 2**19 // self.fc1.out_features))
        return torch.cat([self.project(some) for some in positions]).view(hidden_states.shape)


class TwinsDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a whole sample's branch is dropped with `drop_prob`."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class TwinsLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block; hidden states (B, H, W, C) in and out."""

    def __init__(self, config: TwinsConfig, stage_idx: int, layer_idx: int, drop_path: float):
        super().__init__()
        hidden_size, eps = config.hidden_sizes[stage_idx], config.layer_norm_eps
        is_local = config.window_sizes is not None and layer_idx % 2 == 0
        attention_class = TwinsLocallyGroupedAttention if is_local else TwinsGlobalSubsampledAttention
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=eps)
        self.attention = attention_class(config, stage_idx)
        self.drop_path = TwinsDropPath(drop_path)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = TwinsMLP(config, stage_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attention_output)
        mlp_output = self.drop_path(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + mlp_output if torch.is_grad_enabled() else hidden_states.add_(mlp_output)


class TwinsPositionEncoding(nn.Module):
    """Conditional position encoding (arXiv 2102.10882): the map plus a 3x3 depthwise convolution of it."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.projection = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1, groups=hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or not is_compiled(self.projection, nn.Conv2d):
            return hidden_states + self.projection(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Nine taps that the compiler makes one loop of, over maps whose channels stay last.
        height, width = hidden_states.shape[1:3]
        padded = nn.functional.pad(hidden_states, (0, 0, 1, 1, 1, 1))
        output = hidden_states + self.projection.bias
        for row, column in itertools.product(range(3), range(3)):
            weight = self.projection.weight[:, 0, row, column]
            output = output + weight * padded[:, row : row + height, column : column + width]
        return output


class TwinsStage(nn.Module):
    """Patch embedding (but in stage 1, whose patches are the model's stem), blocks, and the position encoding, which
    comes after the first block: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, config: TwinsConfig, stage_idx: int, drop_path_rates: list[float]):
        super().__init__()
        hidden_size = config.hidden_sizes[stage_idx]
        self.patch_embeddings = TwinsPatchEmbeddings(config, stage_idx) if stage_idx > 0 else None
        self.layers = nn.ModuleList(
            TwinsLayer(config, stage_idx, layer_idx, drop_path) for layer_idx, drop_path in enumerate(drop_path_rates)
        )
        self.has_windows = config.window_sizes is not None
        self.position_encoding = TwinsPositionEncoding(hidden_size)
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps) if config.norm_after_stage else None

    def forward(self, feature_map: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        if self.patch_embeddings is not None:
            hidden_states = self.patch_embeddings(feature_map)
        else:
            hidden_states = feature_map.permute(0, 2, 3, 1)
        # One mask for all blocks that have windows; where a stage has any, the first block does.
        window_mask = self.layers[0].attention.padding_mask(hidden_states) if self.has_windows else None
        for layer_idx, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, window_mask=window_mask, **kwargs)
            if layer_idx == 0:
                hidden_states = self.position_encoding(hidden_states)
        if self.layernorm is not None:
            hidden_states = self.layernorm(hidden_states)
        return hidden_states.permute(0, 3, 1, 2)


class TwinsPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what transformers needs to know of every Twins model."""

    config_class = TwinsConfig
    base_model_prefix = "twins"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["TwinsStage"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": OutputRecorder(TwinsStage), "attentions": TwinsAttention}
    # A classifier's final norm; segmentation models have none.
    _keys_to_ignore_on_load_unexpected = [r"^(twins\.)?layernorm\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        Linear layers truncated normal, convolutions normal by their fan-out, norms the identity, as in the references;
        classifiers of pixels normal by their fan-in, since with the references' 0.01 short trainings learn less.
        """
        if isinstance(module, nn.Linear):
            initialization.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            std = math.sqrt(2.0 / fan_out)
            if isinstance(module, TwinsPixelClassifier):
                std = module.in_channels**-0.5
            initialization.normal_(module.weight, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)


@dataclass
class TwinsModelOutput(BaseModelOutputWithPooling):
    """
    What [`TwinsModel`] returns beside the usual.

    Args:
        feature_maps (`tuple[torch.Tensor]`): Maps of the stem and the four stages, each (batch_size, channels,
            height, width), before the final norm.
    """

    feature_maps: tuple[torch.Tensor, ...] | None = None


class TwinsModel(TwinsPreTrainedModel):
    """
    The Twins encoder.

    Args:
        config ([`TwinsConfig`]): The configuration.
        add_final_norm (`bool`, defaults to `True`): Whether the encoder ends in a LayerNorm, as classifiers do and
            segmentation models do not.
    """

    def __init__(self, config: TwinsConfig, add_final_norm: bool = True):
        super().__init__(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        starts = [sum(config.depths[:stage_idx]) for stage_idx in range(4)]
        self.embeddings = TwinsPatchEmbeddings(config, 0)
        self.stages = nn.ModuleList(
            TwinsStage(config, stage_idx, rates[start : start + depth])
            for stage_idx, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps) if add_final_norm else None
        self.post_init()

    def get_input_embeddings(self) -> TwinsPatchEmbeddings:
        return self.embeddings

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TwinsModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised images of at
                least 32 pixels a side.

        Returns:
            [`TwinsModelOutput`]: `last_hidden_state` (batch_size, hidden_sizes[-1], height / 32, width / 32) after the
            final norm, `pooler_output` its spatial mean, `feature_maps` (the stem's and the four stages', before the
            final norm, (batch_size, channels, height, width)), and, where asked for, `hidden_states` (the same maps)
            and `attentions` (one a block).

        Raises:
            `ValueError`: if `pixel_values` have another number of channels or are too small.
        """
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values have {pixel_values.shape[1]} channels (shape {tuple(pixel_values.shape)}), but the "
                f"model's num_channels is {self.config.num_channels}."
            )
        feature_maps = [self.embeddings(pixel_values).permute(0, 3, 1, 2)]
        for stage in self.stages:
            feature_maps.append(stage(feature_maps[-1], **kwargs))
        last = feature_maps[-1]
        if self.layernorm is not None:
            last = self.layernorm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return TwinsModelOutput(
            last_hidden_state=last, pooler_output=last.mean(dim=(-2, -1)), feature_maps=tuple(feature_maps)
        )


class TwinsBackbone(BackboneMixin, TwinsPreTrainedModel):
    """
    The encoder as a backbone: the maps of `config.out_features`, raw as the stages give them (normed where
    `config.norm_after_stage`), for UperNet, MaskFormer, Mask2Former and others of transformers.
    """

    def __init__(self, config: TwinsConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.twins = TwinsModel(config, add_final_norm=False)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised images of at
                least 32 pixels a side.

        Returns:
            [`BackboneOutput`]: `feature_maps`, one (batch_size, channels, height / stride, width / stride) for each of
            `config.out_features`; `hidden_states` and `attentions` where asked for.
        """
        outputs = self.twins(pixel_values, **kwargs)
        named = zip(self.stage_names, outputs.feature_maps, strict=True)
        return BackboneOutput(
            feature_maps=tuple(feature_map for name, feature_map in named if name in self.out_features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TwinsForImageClassification(TwinsPreTrainedModel):
    """Twins with a linear classifier on the mean of the normed last map, as trained on ImageNet."""

    def __init__(self, config: TwinsConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.twins = TwinsModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised images of at
                least 32 pixels a side.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Class ids in
                `[0, config.num_labels - 1]`; values to regress where `config.num_labels` is 1.

        Returns:
            [`ImageClassifierOutput`]: `logits` (batch_size, num_labels), with `labels` the `loss`, and `hidden_states`
            and `attentions` where asked for.
        """
        outputs = self.twins(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TwinsConvModule(nn.Module):
    """
    Convolution without bias that keeps the size, batch norm, ReLU and dropout of whole channels: (B, C, H, W) ->
    (B, C', H, W).

    Several maps are taken as the levels of a pyramid: resized to the first one's size and concatenated. Dropout is as
    well done before ReLU, where it needs no map of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dropout_prob: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout2d(dropout_prob, inplace=True)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, *levels: torch.Tensor) -> torch.Tensor:
        if type(self.conv) is not nn.Conv2d or self.conv.weight.is_meta:
            # An adapter has put its own layer here, or the weights are elsewhere until the layer itself is called.
            size = levels[0].shape[-2:]
            levels = torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1)
            return self.activation(self.dropout(self.batch_norm(self.conv(levels))))
        if self.batch_norm.training or self.batch_norm.running_mean is None:
            return self.activation(self.dropout(self.batch_norm(convolve_pyramid(levels, self.conv.weight))))
        output = self.dropout(convolve_pyramid(levels, self.conv.weight, *self.folded_norm()))
        # An exported program drops one permutation that undoes another, where nothing lies between them.
        return self.activation(output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def folded_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What batch norm multiplies each channel by and then adds to it, by its running statistics."""
        norm, dtype = self.batch_norm, self.conv.weight.dtype
        scale = torch.rsqrt(norm.running_var.to(torch.promote_types(dtype, torch.float32)) + norm.eps)
        shift = -norm.running_mean * scale
        if norm.affine:
            scale, shift = norm.weight * scale, norm.weight * shift + norm.bias
        return scale.to(dtype), shift.to(dtype)


class TwinsPixelClassifier(nn.Conv2d):
    """Logits of each position, by a 1x1 convolution; it starts with logits of order one, whatever `num_labels`."""

    def __init__(self, in_channels: int, num_labels: int):
        super().__init__(in_channels, num_labels, kernel_size=1)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return convolve(feature_map, self.weight, self.bias)


class TwinsAdaptiveAvgPool(nn.Module):
    """Adaptive average pooling to `bins` a side, as products with two small matrices: any size can be exported."""

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def weights(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """(bins, length): a mean over each bin, from floor(i length / bins) to ceil((i + 1) length / bins)."""
        index = torch.arange(self.bins, device=like.device)[:, None]
        start, end = index * length // self.bins, ((index + 1) * length + self.bins - 1) // self.bins
        position = torch.arange(length, device=like.device)
        return ((position >= start) & (position < end)).to(like.dtype) / (end - start)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        height, width = feature_map.shape[-2:]
        rows, columns = self.weights(height, feature_map), self.weights(width, feature_map)
        return rows @ feature_map @ columns.T


class TwinsPyramidPooling(nn.Module):
    """PSPNet's pyramid pooling (arXiv 1612.01105): [map, pool 1, pool 2, ...], fused by a 3x3 convolution."""

    def __init__(self, config: TwinsConfig):
        super().__init__()
        in_channels, width = config.hidden_sizes[-1], config.decoder_hidden_size
        self.pools = nn.ModuleList(
            nn.Sequential(TwinsAdaptiveAvgPool(scale), TwinsConvModule(in_channels, width, kernel_size=1))
            for scale in config.pool_scales
        )
        self.bottleneck = TwinsConvModule(in_channels + len(self.pools) * width, width, kernel_size=3)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(feature_map, *(pool(feature_map) for pool in self.pools))


class TwinsUperNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling on stage 4, a feature pyramid down to stage 1, all levels fused."""

    def __init__(self, config: TwinsConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.pyramid_pooling = TwinsPyramidPooling(config)
        self.lateral_convs = nn.ModuleList(
            TwinsConvModule(channels, width, kernel_size=1) for channels in config.hidden_sizes[:-1]
        )
        self.fpn_convs = nn.ModuleList(TwinsConvModule(width, width, kernel_size=3) for _ in config.hidden_sizes[:-1])
        in_channels, dropout_prob = len(config.hidden_sizes) * width, config.classifier_dropout_prob
        self.fpn_bottleneck = TwinsConvModule(in_channels, width, kernel_size=3, dropout_prob=dropout_prob)
        self.classifier = TwinsPixelClassifier(width, config.num_labels)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Maps of the four stages -> logits (B, num_labels, H/4, W/4)."""
        top = self.pyramid_pooling(feature_maps[-1])
        laterals = [lateral(level) for lateral, level in zip(self.lateral_convs, feature_maps[:-1], strict=True)]

        coarser = top
        for level in reversed(range(len(laterals))):
            coarser = laterals[level] = add_resized(laterals[level], coarser)

        levels = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=True)]
        return self.classifier(self.fpn_bottleneck(*levels, top))


class TwinsSemanticFPNHead(nn.Module):
    """
    Semantic FPN (arXiv 1901.02446): a feature pyramid without norms, each level brought to stage 1's size by
    convolutions and twofold upsampling, and the sum of all.
    """

    def __init__(self, config: TwinsConfig):
        super().__init__()
        pyramid_width, width = config.decoder_hidden_size, config.decoder_hidden_size // 2
        self.lateral_convs = nn.ModuleList(
            nn.Conv2d(channels, pyramid_width, kernel_size=1) for channels in config.hidden_sizes
        )
        self.fpn_convs = nn.ModuleList(
            nn.Conv2d(pyramid_width, pyramid_width, kernel_size=3, padding=1) for _ in config.hidden_sizes
        )
        self.scale_heads = nn.ModuleList(
            nn.ModuleList(
                TwinsConvModule(pyramid_width if index == 0 else width, width, kernel_size=3)
                for index in range(max(1, level))
            )
            for level in range(len(config.hidden_sizes))
        )
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)
        self.classifier = TwinsPixelClassifier(width, config.num_labels)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Maps of the four stages -> logits (B, num_labels, H/4, W/4)."""
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, feature_maps, strict=True)]
        for level in reversed(range(len(laterals) - 1)):
            size = laterals[level].shape[-2:]
            laterals[level] = laterals[level] + nn.functional.interpolate(laterals[level + 1], size=size)  # nearest

        fused = None
        for level, (conv, lateral) in enumerate(zip(self.fpn_convs, laterals, strict=True)):
            scaled = conv(lateral)
            for conv_module in self.scale_heads[level]:
                scaled = conv_module(scaled)
                if level > 0:
                    scaled = resize(scaled, (2 * scaled.shape[-2], 2 * scaled.shape[-1]))
            fused = scaled if fused is None else fused + resize(scaled, fused.shape[-2:])
        return self.classifier(self.dropout(fused))


class TwinsAuxiliaryHead(nn.Module):
    """FCN head on stage 3: one 3x3 convolution and the classifier, trained along, unused at inference."""

    def __init__(self, config: TwinsConfig):
        super().__init__()
        width, dropout_prob = config.auxiliary_channels, config.classifier_dropout_prob
        self.conv = TwinsConvModule(config.hidden_sizes[2], width, kernel_size=3, dropout_prob=dropout_prob)
        self.classifier = TwinsPixelClassifier(width, config.num_labels)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.classifier(self.conv(feature_maps[2]))


@dataclass
class TwinsSegmenterOutput(SemanticSegmenterOutput):
    """
    What [`TwinsForSemanticSegmentation`] returns beside the usual.

    Args:
        auxiliary_loss (`torch.Tensor` of shape `()`): The auxiliary head's part of `loss`, before its weight.
    """

    auxiliary_loss: torch.Tensor | None = None


DECODE_HEADS = {"upernet": TwinsUperNetHead, "fpn": TwinsSemanticFPNHead}


class TwinsForSemanticSegmentation(TwinsPreTrainedModel):
    """
    Twins with a decode head (and, for training, an auxiliary one) for semantic segmentation.

    Raises:
        `ValueError`: if `config.num_labels` is less than 2; a background counts as a class.
    """

    def __init__(self, config: TwinsConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"num_labels={config.num_labels} must be at least 2: a background counts as a class.")
        self.twins = TwinsModel(config, add_final_norm=False)
        self.decode_head = DECODE_HEADS[config.decoder_type](config)
        self.auxiliary_head = TwinsAuxiliaryHead(config) if config.use_auxiliary_head else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TwinsSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised images of at
                least 32 pixels a side.
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*): Class ids in
                `[0, config.num_labels - 1]`, or `config.semantic_loss_ignore_index`.

        Returns:
            [`TwinsSegmenterOutput`]: `logits` (batch_size, num_labels, height / 4, width / 4); with `labels` the
            `loss`, cross-entropy at the labels' size, the auxiliary head's part included, and that part as
            `auxiliary_loss`; `hidden_states` and `attentions` where asked for, as [`TwinsModel`] gives them.

        Raises:
            `ValueError`: if `pixel_values` have another number of channels or are too small.
        """
        outputs = self.twins(pixel_values, **kwargs)
        feature_maps = outputs.feature_maps[1:]
        logits = self.decode_head(feature_maps)

        loss, auxiliary_loss = None, None
        if labels is not None:
            loss = self.segmentation_loss(logits, labels)
            if self.auxiliary_head is not None:
                auxiliary_loss = self.segmentation_loss(self.auxiliary_head(feature_maps), labels)
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss

        return TwinsSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_loss=auxiliary_loss,
        )

    def segmentation_loss(self, logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Cross-entropy of logits (B, num_labels, h, w), resized to the labels (B, H, W), over the labelled pixels or
        over all of them (`config.semantic_loss_reduction`); 0 where nothing is labelled."""
        ignore_index = self.config.semantic_loss_ignore_index
        total = resized_cross_entropy(logits, labels, ignore_index)
        if self.config.semantic_loss_reduction == "all":
            return total / labels.numel()
        return total / (labels != ignore_index).sum().clamp(min=1)


__all__ = [
    "TwinsBackbone",
    "TwinsForImageClassification",
    "TwinsForSemanticSegmentation",
    "TwinsModel",
    "TwinsPreTrainedModel",
]
