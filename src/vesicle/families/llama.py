"""Llama, Mistral, Qwen2, Qwen3 and SmolLM3: RMSNorm, rotary grouped-query attention, gated FFN.

They differ in biases (Qwen2), norms on queries and keys (Qwen3), layers without rotary phases
(SmolLM3) and sliding windows (Mistral in every layer, Qwen and SmolLM3 in some). SmolLM2 is a Llama
by its config.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vesicle.errors import ModelError
from vesicle.families.base import (
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
    optional_affine,
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
    whole,
)
from vesicle.families.rotary import rotary
from vesicle.families.windows import SLIDING, windows_of
from vesicle.shapes import ModelShape


class LlamaFamily(Family):
    """Separate projections, gated FFN, sequential residual."""

    name = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    prefix = "model."
    heads = ("lm_head.weight",)

    def decoder_config(self, config: Any) -> DecoderConfig:
        """Read a Llama-like config."""
        n_layers = whole(config, "num_hidden_layers", MOST_LAYERS)
        width = whole(config, "hidden_size", MOST_WIDTH)
        n_heads = whole(config, "num_attention_heads", MOST_HEADS)
        n_kv_heads = n_heads
        if config.num_key_value_heads is not None:
            n_kv_heads = whole(config, "num_key_value_heads", n_heads)
            check_divides(n_kv_heads, "num_key_value_heads", n_heads, "num_attention_heads")
        if getattr(config, "head_dim", None) is None:
            check_divides(n_heads, "num_attention_heads", width, "hidden_size")
            head_size = width // n_heads
        else:
            head_size = whole(config, "head_dim", MOST_HEAD_SIZE)
        context = positions(config)
        rotates: Sequence[Any] = [1] * n_layers
        if config.model_type == "smollm3":
            rotates = _rotating_layers(config, n_layers)
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
                windows=_windows(config, n_layers, context),
            ),
            rms_norm=True,
            norm_eps=epsilon(config, "rms_norm_eps"),
            activation=check_activation(config.hidden_act),
            rotaries=(rotary(config, head_size),),
            rotary_layers=tuple(0 if r else None for r in rotates),
            parallel_residual=False,
            context_window=context,
            attention_scale=head_size**-0.5,
        )

    def presence(self, config: Any) -> Presence:
        """Qwen2 always has biases on queries, keys and values, Qwen3 norms; others may ask."""
        # Mistral's and Qwen2's own code reads neither setting; Qwen3's does not read the second.
        asks = config.model_type in ("llama", "qwen3", "smollm3")
        bias = asks and flag(config, "attention_bias")
        ffn_bias = asks and config.model_type != "qwen3"
        return Presence(
            qkv_bias=bias or config.model_type == "qwen2",
            out_bias=bias,
            ffn_bias=ffn_bias and flag(config, "mlp_bias"),
            query_norm=config.model_type == "qwen3",
        )

    def layer_tensors(self, config: DecoderConfig, layer: int, lookup: Lookup) -> LayerTensors:
        """Parameters under `model.layers.N`."""
        p = f"model.layers.{layer}"
        return LayerTensors(
            attention_norm=affine(lookup, f"{p}.input_layernorm"),
            query=affine(lookup, f"{p}.self_attn.q_proj"),
            key=affine(lookup, f"{p}.self_attn.k_proj"),
            value=affine(lookup, f"{p}.self_attn.v_proj"),
            out=affine(lookup, f"{p}.self_attn.o_proj"),
            query_norm=optional_affine(lookup, f"{p}.self_attn.q_norm"),
            key_norm=optional_affine(lookup, f"{p}.self_attn.k_norm"),
            ffn_norm=affine(lookup, f"{p}.post_attention_layernorm"),
            gate=affine(lookup, f"{p}.mlp.gate_proj"),
            up=affine(lookup, f"{p}.mlp.up_proj"),
            down=affine(lookup, f"{p}.mlp.down_proj"),
        )

    def model_tensors(self, lookup: Lookup) -> ModelTensors:
        """Embedding, final norm and head."""
        name = "model.embed_tokens.weight"
        embedding = need(lookup, name)
        head = lookup(self.heads[0])
        return ModelTensors(
            embedding=embedding,
            final_norm=affine(lookup, "model.norm"),
            head=embedding if head is None else head,
            head_bias=None,
            head_name=name if head is None else self.heads[0],
        )

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The L decoder layers, in order: the children of `model.model.layers`."""
        return list(model.get_submodule("model.layers").children())

    def modules(self, layer: nn.Module) -> LayerModules:
        """By attribute names of `LlamaDecoderLayer`."""

        def linear(name: str) -> nn.Linear:
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            return module

        return LayerModules(
            attention=layer.get_submodule("self_attn"),
            query_key_value=tuple(linear(f"self_attn.{n}_proj") for n in "qkv"),
            out=linear("self_attn.o_proj"),
            attention_end=layer.get_submodule("self_attn"),
            ffn_norm=layer.get_submodule("post_attention_layernorm"),
            ffn=layer.get_submodule("mlp"),
            ffn_in=(linear("mlp.gate_proj"), linear("mlp.up_proj")),
            ffn_out=linear("mlp.down_proj"),
            ffn_end=layer.get_submodule("mlp"),
        )


def _rotating_layers(config: Any, n_layers: int) -> Sequence[Any]:
    """SmolLM3's `no_rope_layers`: 1 where a layer rotates; of a longer list, the first count.

    Raises:
        ModelError: If there are too few.
    """
    each = config.no_rope_layers
    if not isinstance(each, list | tuple) or len(each) < n_layers:
        raise ModelError(
            f"the model's config has no_rope_layers {reprlib.repr(each)}; allowed: a list with one "
            f"number for each of its {n_layers} layers"
        )
    return each[:n_layers]


def _windows(config: Any, n_layers: int, context: int) -> tuple[int, ...]:
    """As `ModelShape.windows` has it.

    Raises:
        ModelError: As `windows_of`; of Llama itself, whose own code slides nowhere, for a window
            that its config asks for.
    """
    window = getattr(config, "sliding_window", None)
    kinds = check_layer_types(getattr(config, "layer_types", None), n_layers)
    if config.model_type == "mistral":  # in every layer: its own code reads no layer_types
        kinds = None if window is None else [SLIDING] * n_layers
    elif config.model_type == "llama":
        on = getattr(config, "use_sliding_window", None) is not False
        if window is not None and kinds is None and on:
            kinds = [SLIDING] * n_layers
    found = windows_of(config, kinds or [], context)
    if found and config.model_type == "llama":
        raise ModelError(
            f"this model's config has a sliding window of {window} of its {context} positions, "
            "which transformers' code for model type 'llama' does not read; it may be meant for "
            "'mistral'"
        )
    return found
