"""Gemma 3, text alone: windowed layers, norms before and after each module, scaled embeddings.

Its modules have Llama's names. It differs in these points, and in gains that are stored less 1, a
gate with GELU, rotary bases by kind of layer, and a scale of attention that the config names.
Attention reads no soft cap of its scores, whatever a config says: transformers' code for it has
none, so such configs are refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from vesicle.errors import ModelError
from vesicle.families.base import (
    Affine,
    DecoderConfig,
    LayerModules,
    LayerTensors,
    Lookup,
    ModelTensors,
    Presence,
    affine,
    check_activation,
)
from vesicle.families.checks import (
    MOST_FFN_WIDTH,
    MOST_HEAD_SIZE,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_VOCABULARY,
    MOST_WIDTH,
    check_divides,
    check_layer_types,
    epsilon,
    flag,
    positions,
    positive,
    whole,
)
from vesicle.families.llama import LlamaFamily
from vesicle.families.rotary import rotary
from vesicle.families.windows import windows_of
from vesicle.shapes import ModelShape


class Gemma3Family(LlamaFamily):
    """Separate projections, GeGLU, four norms a layer, sliding and full attention by turns."""

    name = "gemma3"
    model_types = ("gemma3_text",)

    def decoder_config(self, config: Any) -> DecoderConfig:
        """Read a `Gemma3TextConfig`."""
        n_layers = whole(config, "num_hidden_layers", MOST_LAYERS)
        width = whole(config, "hidden_size", MOST_WIDTH)
        n_heads = whole(config, "num_attention_heads", MOST_HEADS)
        n_kv_heads = whole(config, "num_key_value_heads", n_heads)
        check_divides(n_kv_heads, "num_key_value_heads", n_heads, "num_attention_heads")
        check_divides(n_heads, "num_attention_heads", width, "hidden_size")
        head_size = whole(config, "head_dim", MOST_HEAD_SIZE)
        context = positions(config)
        kinds = check_layer_types(config.layer_types, n_layers)
        if kinds is None:
            raise ModelError(
                "the model's config has no layer_types; allowed: one for each of its "
                f"{n_layers} layers"
            )
        names = tuple(dict.fromkeys(kinds))
        cap = config.final_logit_softcapping
        return DecoderConfig(
            shape=ModelShape(
                n_layers=n_layers,
                width=width,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_size=head_size,
                ffn_width=whole(config, "intermediate_size", MOST_FFN_WIDTH),
                gated=True,
                vocabulary=whole(config, "vocab_size", MOST_VOCABULARY),
                windows=windows_of(config, kinds, context),
            ),
            rms_norm=True,
            norm_eps=epsilon(config, "rms_norm_eps"),
            activation=check_activation(config.hidden_activation),
            rotaries=tuple(rotary(config, head_size, kind=name) for name in names),
            rotary_layers=tuple(names.index(kind) for kind in kinds),
            parallel_residual=False,
            context_window=context,
            attention_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
            embedding_scale=math.sqrt(width),
            logit_cap=None if cap is None else positive(config, "final_logit_softcapping"),
        )

    def presence(self, config: Any) -> Presence:
        """Always norms of queries and keys, and after modules; biases if asked for."""
        bias = flag(config, "attention_bias")
        return Presence(qkv_bias=bias, out_bias=bias, query_norm=True, post_norm=True)

    def layer_tensors(self, config: DecoderConfig, layer: int, lookup: Lookup) -> LayerTensors:
        """As Llama's, whose norm before the FFN has the name of the one after attention here."""
        found, p = super().layer_tensors(config, layer, lookup), f"model.layers.{layer}"
        return replace(
            found,
            attention_norm=_gain(found.attention_norm),
            query_norm=None if found.query_norm is None else _gain(found.query_norm),
            key_norm=None if found.key_norm is None else _gain(found.key_norm),
            attention_post_norm=_gain(found.ffn_norm),
            ffn_norm=_gain(affine(lookup, f"{p}.pre_feedforward_layernorm")),
            ffn_post_norm=_gain(affine(lookup, f"{p}.post_feedforward_layernorm")),
        )

    def model_tensors(self, lookup: Lookup) -> ModelTensors:
        """As Llama's, with the final norm's gain."""
        found = super().model_tensors(lookup)
        return replace(found, final_norm=_gain(found.final_norm))

    def modules(self, layer: nn.Module) -> LayerModules:
        """By attribute names of `Gemma3DecoderLayer`."""
        return replace(
            super().modules(layer),
            attention_end=layer.get_submodule("post_attention_layernorm"),
            ffn_norm=layer.get_submodule("pre_feedforward_layernorm"),
            ffn_end=layer.get_submodule("post_feedforward_layernorm"),
        )


def _gain(norm: Affine) -> Affine:
    """A norm whose gain is stored less 1; in fp32, as transformers adds it."""
    return replace(norm, weight=1.0 + norm.weight.float())
