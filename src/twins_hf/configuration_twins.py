# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""Configuration of the Twins models, and the six published variants as data."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

# Tables 1 and 2 of the paper (arXiv 2104.13840); drop path rates as in the authors' code.
_PCPVT = {"hidden_sizes": (64, 128, 320, 512), "num_attention_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
_SVT = {"mlp_ratios": (4, 4, 4, 4), "window_sizes": (7, 7, 7, 7), "norm_after_stage": True}

VARIANTS = {
    "pcpvt-s": {**_PCPVT, "depths": (3, 4, 6, 3)},
    "pcpvt-b": {**_PCPVT, "depths": (3, 4, 18, 3)},
    "pcpvt-l": {**_PCPVT, "depths": (3, 8, 27, 3)},
    "svt-s": {
        **_SVT,
        "hidden_sizes": (64, 128, 256, 512),
        "num_attention_heads": (2, 4, 8, 16),
        "depths": (2, 2, 10, 4),
    },
    "svt-b": {
        **_SVT,
        "hidden_sizes": (96, 192, 384, 768),
        "num_attention_heads": (3, 6, 12, 24),
        "depths": (2, 2, 18, 2),
    },
    "svt-l": {
        **_SVT,
        "hidden_sizes": (128, 256, 512, 1024),
        "num_attention_heads": (4, 8, 16, 32),
        "depths": (2, 2, 18, 2),
        "drop_path_rate": 0.3,
    },
}
_STAGE_FIELDS = ("patch_sizes", "hidden_sizes", "depths", "num_attention_heads", "mlp_ratios", "sr_ratios")


@strict
class TwinsConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a Twins model ("Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
    arXiv 2104.13840). The defaults are Twins-PCPVT-S; [`TwinsConfig.from_variant`] gives the six published ones.

    Args:
        num_channels (`int`, defaults to 3): Channels of `pixel_values`.
        patch_sizes (`list[int]`, defaults to `[4, 2, 2, 2]`): Side, and stride, of each stage's patch embedding.
        patch_padding (`bool`, defaults to `True`): What happens to a map that a patch does not divide: padded with
            zeros at the right and bottom (`True`, as MMSegmentation) or cut off (`False`, as the authors and timm).
        hidden_sizes (`list[int]`): Channels of each stage.
        depths (`list[int]`): Blocks of each stage.
        num_attention_heads (`list[int]`): Heads of each stage; they divide `hidden_sizes`.
        mlp_ratios (`list[int]`): Width of each stage's MLP over its `hidden_sizes`.
        sr_ratios (`list[int]`, defaults to `[8, 4, 2, 1]`): By how much globally sub-sampled attention (GSA) reduces
            each side of the map that keys and values are taken from.
        window_sizes (`list[int]`, *optional*): `None` is PCPVT, every block GSA. Four window sizes make SVT, whose
            even blocks attend within windows of that side (locally-grouped attention, LSA).
        window_padding (`"masked"`, `"mmseg"`, `"unmasked"`, defaults to `"masked"`): How LSA treats the padding of a
            map that is no multiple of the window. `"masked"` never attends to it; `"mmseg"` attends to it unless both
            sides are padded (as MMSegmentation, and the authors to segment); `"unmasked"` always does (as timm).
        norm_after_stage (`bool`, defaults to `False`): LayerNorm on every stage's output (SVT's segmentors).
        qkv_bias (`bool`, defaults to `True`): Bias of the query, key and value projections.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, default to 0.0): Dropout in [0, 1) of hidden states
            and of attention probabilities.
        drop_path_rate (`float`, defaults to 0.2): Stochastic depth in [0, 1) of the last block; it rises linearly.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the linear layers' first weights.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the blocks', stages' and the final LayerNorm; the norms
            of patch embeddings and of reduced keys always have 1e-5.
        decoder_type (`"upernet"` or `"fpn"`, defaults to `"upernet"`): Decode head of
            [`TwinsForSemanticSegmentation`]: UPerNet or Semantic FPN.
        decoder_hidden_size (`int`, *optional*): Width of the decode head; 512 for UPerNet and 256 for Semantic FPN
            (whose layers after the feature pyramid have half of it) if unset.
        pool_scales (`list[int]`, defaults to `[1, 2, 3, 6]`): Bins a side of UPerNet's pyramid pooling.
        use_auxiliary_head (`bool`, *optional*): Train with an FCN head on stage 3; for UPerNet only if unset.
        auxiliary_loss_weight (`float`, defaults to 0.4): Weight of that head's loss.
        auxiliary_channels (`int`, defaults to 256): Its width.
        classifier_dropout_prob (`float`, defaults to 0.1): Dropout of whole channels before the classifier convs.
        semantic_loss_ignore_index (`int`, defaults to 255): Label value that is not trained on.
        semantic_loss_reduction (`"valid"` or `"all"`, defaults to `"valid"`): Whether the loss is averaged over the
            labelled pixels, or over all, ignored ones included (as in the published runs).
        out_features, out_indices: Stages among `stem, stage1, ..., stage4` that the backbone returns.

    Raises:
        `StrictDataclassError`: naming the field and value that do not fit.

    Example:

    ```python
    >>> from twins_hf import TwinsConfig, TwinsForSemanticSegmentation

    >>> config = TwinsConfig.from_variant("svt-s", num_labels=150)
    >>> model = TwinsForSemanticSegmentation(config)
    ```
    """

    model_type = "twins"

    num_channels: int = 3
    patch_sizes: list[int] | tuple[int, ...] = (4, 2, 2, 2)
    patch_padding: bool = True
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 320, 512)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    num_attention_heads: list[int] | tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: list[int] | tuple[int, ...] = (8, 8, 4, 4)
    sr_ratios: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    window_sizes: list[int] | tuple[int, ...] | None = None
    window_padding: Literal["masked", "mmseg", "unmasked"] = "masked"
    norm_after_stage: bool = False
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    decoder_type: Literal["upernet", "fpn"] = "upernet"
    decoder_hidden_size: int | None = None
    pool_scales: list[int] | tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool | None = None
    auxiliary_loss_weight: float | int = 0.4
    auxiliary_channels: int = 256
    classifier_dropout_prob: float | int = 0.1
    semantic_loss_ignore_index: int = 255
    semantic_loss_reduction: Literal["valid", "all"] = "valid"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = 512 if self.decoder_type == "upernet" else 256
        if self.use_auxiliary_head is None:
            self.use_auxiliary_head = self.decoder_type == "upernet"
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, len(self.hidden_sizes) + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_variant(cls, variant: str, **overrides) -> "TwinsConfig":
        """
        Configuration of a published variant.

        Args:
            variant (`str`): One of `pcpvt-s`, `pcpvt-b`, `pcpvt-l`, `svt-s`, `svt-b`, `svt-l`.
            overrides: Any field of [`TwinsConfig`] or [`PreTrainedConfig`] that shall differ.

        Raises:
            `ValueError`: if there is no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown: choose one of {', '.join(VARIANTS)}.")
        return cls(**{**VARIANTS[variant], **overrides})

    def validate_architecture(self):
        """Checks what the types cannot say; called by `@strict` after `__init__`."""
        stage_fields = _STAGE_FIELDS if self.window_sizes is None else (*_STAGE_FIELDS, "window_sizes")
        for name in stage_fields:
            values = getattr(self, name)
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{name}={list(values)} must be four positive integers, one a stage.")
        for hidden_size, num_heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_sizes={list(self.hidden_sizes)} must be multiples of "
                    f"num_attention_heads={list(self.num_attention_heads)}: {num_heads} does not divide {hidden_size}."
                )
        if not self.pool_scales or min(self.pool_scales) < 1:
            raise ValueError(f"pool_scales={list(self.pool_scales)} must be positive integers.")
        for name in ("num_channels", "decoder_hidden_size", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "drop_path_rate",
            "classifier_dropout_prob",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1).")


__all__ = ["TwinsConfig"]
