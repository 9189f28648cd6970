"""Llama, Mistral, Qwen2, Qwen3 and SmolLM3: RMSNorm, rotary grouped-query attention, gated FFN.

They differ in biases (Qwen2), norms on queries and keys (Qwen3), layers without rotary phases
(SmolLM3) and sliding windows (refused unless the window spans the whole context). SmolLM2 is a
Llama by its config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vesicle.families.base import (
    DecoderConfig,
    Family,
    LayerModules,
    LayerTensors,
    Lookup,
    ModelTensors,
    affine,
    check_activation,
    need,
    optional_affine,
    refuse_sliding_window,
    rotary,
)
from vesicle.shapes import ModelShape


class LlamaFamily(Family):
    """Separate projections, gated FFN, sequential residual."""

    name = "llama"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

    def decoder_config(self, config: Any) -> DecoderConfig:
        """Read a Llama-like config."""
        n_layers = config.num_hidden_layers
        n_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        window = getattr(config, "sliding_window", None)
        default = "full_attention" if window is None else "sliding_attention"
        layer_types = getattr(config, "layer_types", None) or [default] * n_layers
        refuse_sliding_window(config, window, layer_types)
        rotates = getattr(config, "no_rope_layers", None) or [1] * n_layers
        frequencies, scale = rotary(config, head_size)
        return DecoderConfig(
            shape=ModelShape(
                n_layers=n_layers,
                width=config.hidden_size,
                n_heads=n_heads,
                n_kv_heads=config.num_key_value_heads or n_heads,
                head_size=head_size,
                ffn_width=config.intermediate_size,
                gated=True,
                vocabulary=config.vocab_size,
            ),
            rms_norm=True,
            norm_eps=config.rms_norm_eps,
            activation=check_activation(config.hidden_act),
            rotary_frequencies=frequencies,
            rotary_scale=scale,
            rotary_layers=tuple(bool(r) for r in rotates),
            parallel_residual=False,
            context_window=config.max_position_embeddings,
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
