"""Gemma 3, text alone: windowed layers, norms before and after each module, scaled embeddings.

It differs from Llama in these, and in gains that are stored less 1, a gate with GELU, rotary bases
by kind of layer, and a scale of attention that the config names. Attention reads no soft cap of its
scores, whatever a config says: transformers' code for it has none, so such configs are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from vesicle.errors import ModelError
from vesicle.families.base import (
    Affine,
    DecoderConfig,
    Family,
    LayerModules,
    LayerTensors,
    Lookup,
    ModelTensors,
    Presence,
    affine,
    check_activation,
    need,
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
from vesicle.families.rotary import rotary
from vesicle.families.windows import windows_of
from vesicle.shapes import ModelShape


class Gemma3Family(Family):
    """Separate projections, GeGLU, four norms a layer, sliding and full attention by turns."""

    name = "gemma3"
    model_types = ("gemma3_text",)
    prefix = "model."
    heads = ("lm_head.weight",)

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
        """Parameters under `model.layers.N`."""
        p = f"model.layers.{layer}"
        return LayerTensors(
            attention_norm=_gain(lookup, f"{p}.input_layernorm"),
            query=affine(lookup, f"{p}.self_attn.q_proj"),
            key=affine(lookup, f"{p}.self_attn.k_proj"),
            value=affine(lookup, f"{p}.self_attn.v_proj"),
            out=affine(lookup, f"{p}.self_attn.o_proj"),
            query_norm=_gain(lookup, f"{p}.self_attn.q_norm"),
            key_norm=_gain(lookup, f"{p}.self_attn.k_norm"),
            attention_post_norm=_gain(lookup, f"{p}.post_attention_layernorm"),
            ffn_norm=_gain(lookup, f"{p}.pre_feedforward_layernorm"),
            gate=affine(lookup, f"{p}.mlp.gate_proj"),
            up=affine(lookup, f"{p}.mlp.up_proj"),
            down=affine(lookup, f"{p}.mlp.down_proj"),
            ffn_post_norm=_gain(lookup, f"{p}.post_feedforward_layernorm"),
        )

    def model_tensors(self, lookup: Lookup) -> ModelTensors:
        """Embedding, final norm and head."""
        name = "model.embed_tokens.weight"
        embedding = need(lookup, name)
        head = lookup(self.heads[0])
        return ModelTensors(
            embedding=embedding,
            final_norm=_gain(lookup, "model.norm"),
            head=embedding if head is None else head,
            head_bias=None,
            head_name=name if head is None else self.heads[0],
        )

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The L decoder layers, in order: the children of `model.model.layers`."""
        return list(model.get_submodule("model.layers").children())

    def modules(self, layer: nn.Module) -> LayerModules:
        """By attribute names of `Gemma3DecoderLayer`."""

        def linear(name: str) -> nn.Linear:
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            return module

        return LayerModules(
            attention=layer.get_submodule("self_attn"),
            query_key_value=tuple(linear(f"self_attn.{n}_proj") for n in "qkv"),
            out=linear("self_attn.o_proj"),
            attention_end=layer.get_submodule("post_attention_layernorm"),
            ffn_norm=layer.get_submodule("pre_feedforward_layernorm"),
            ffn=layer.get_submodule("mlp"),
            ffn_in=(linear("mlp.gate_proj"), linear("mlp.up_proj")),
            ffn_out=linear("mlp.down_proj"),
            ffn_end=layer.get_submodule("post_feedforward_layernorm"),
        )


def _gain(lookup: Lookup, prefix: str) -> Affine:
    """A norm's gain, which is stored less 1; in fp32, as transformers adds it."""
    return Affine(weight=1.0 + need(lookup, f"{prefix}.weight").float())
