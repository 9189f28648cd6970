"""Llama, Mistral, Qwen2, Qwen3 and SmolLM3: RMSNorm, rotary grouped-query attention, gated FFN.

They differ in biases (Qwen2), norms on queries and keys (Qwen3), layers without rotary phases
(SmolLM3) and sliding windows (refused unless the window spans the whole context). SmolLM2 is a
Llama by its config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    refuse_sliding_window,
    rotary,
)
from vesicle.families.checks import (
    MOST_FFN_WIDTH,
    MOST_HEAD_SIZE,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_VOCABULARY,
    MOST_WIDTH,
    check_divides,
    epsilon,
    flag,
    whole,
)
from vesicle.shapes import ModelShape


class LlamaFamily(Family):
    """Separate projections, gated FFN, sequential residual."""

    name = "llama"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

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
        window = getattr(config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        layer_types = getattr(config, "layer_types", None) or [default] * n_layers
        refuse_sliding_window(config, window, layer_types)
        rotates = getattr(config, "no_rope_layers", None) or [1] * n_layers
        for name, each in (("layer_types", layer_types), ("no_rope_layers", rotates)):
            if len(each) != n_layers:
                raise ModelError(
                    f"the model's config has {len(each)} {name}; allowed: one for each of its "
                    f"{n_layers} layers"
                )
        frequencies, scale = rotary(config, head_size)
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
            ),
            rms_norm=True,
            norm_eps=epsilon(config, "rms_norm_eps"),
            activation=check_activation(config.hidden_act),
            rotary_frequencies=frequencies,
            rotary_scale=scale,
            rotary_layers=tuple(bool(r) for r in rotates),
            parallel_residual=False,
            context_window=whole(config, "max_position_embeddings", MOST_POSITIONS),
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
        embedding = need(lookup, "model.embed_tokens.weight")
        head = lookup("lm_head.weight")
        return ModelTensors(
            embedding=embedding,
            final_norm=affine(lookup, "model.norm"),
            head=embedding if head is None else head,
            head_bias=None,
        )

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """`model.model.layers`."""
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
            ffn_norm=layer.get_submodule("post_attention_layernorm"),
            ffn=layer.get_submodule("mlp"),
            ffn_in=(linear("mlp.gate_proj"), linear("mlp.up_proj")),
            ffn_out=linear("mlp.down_proj"),
        )
