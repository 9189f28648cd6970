"""GPT-NeoX (Pythia): LayerNorm, fused QKV, parallel residual, plain FFN, partial rotary.

Here to keep the `Family` interface honest: it differs from Llama in every one of those points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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
    MOST_HEADS,
    MOST_LAYERS,
    MOST_VOCABULARY,
    MOST_WIDTH,
    check_divides,
    epsilon,
    flag,
    positions,
    whole,
)
from vesicle.families.rotary import rotary
from vesicle.shapes import ModelShape


class GptNeoxFamily(Family):
    """Fused QKV, parallel residual, plain FFN."""

    name = "gpt_neox"
    model_types = ("gpt_neox",)
    prefix = "gpt_neox."
    heads = ("embed_out.weight", "lm_head.weight")

    def decoder_config(self, config: Any) -> DecoderConfig:
        """Read a `GPTNeoXConfig`."""
        n_layers = whole(config, "num_hidden_layers", MOST_LAYERS)
        width = whole(config, "hidden_size", MOST_WIDTH)
        n_heads = whole(config, "num_attention_heads", MOST_HEADS)
        check_divides(n_heads, "num_attention_heads", width, "hidden_size")
        return DecoderConfig(
            shape=ModelShape(
                n_layers=n_layers,
                width=width,
                n_heads=n_heads,
                n_kv_heads=n_heads,
                head_size=width // n_heads,
                ffn_width=whole(config, "intermediate_size", MOST_FFN_WIDTH),
                gated=False,
                vocabulary=whole(config, "vocab_size", MOST_VOCABULARY),
            ),
            rms_norm=False,
            norm_eps=epsilon(config, "layer_norm_eps"),
            activation=check_activation(config.hidden_act),
            rotaries=(rotary(config, width // n_heads, partial=True),),
            rotary_layers=(0,) * n_layers,
            parallel_residual=flag(config, "use_parallel_residual", default=True),
            context_window=positions(config),
            attention_scale=(width // n_heads) ** -0.5,
        )

    def presence(self, config: Any) -> Presence:
        """LayerNorms and the FFN always have biases; attention has them unless told otherwise."""
        bias = flag(config, "attention_bias", default=True)
        return Presence(qkv_bias=bias, out_bias=bias, ffn_bias=True, norm_bias=True)

    def layer_tensors(self, config: DecoderConfig, layer: int, lookup: Lookup) -> LayerTensors:
        """Parameters under `gpt_neox.layers.N`, with the fused QKV taken apart."""
        p = f"gpt_neox.layers.{layer}"
        fused = affine(lookup, f"{p}.attention.query_key_value")
        heads, size = config.shape.n_heads, config.shape.head_size

        def part(tensor: Tensor, which: int) -> Tensor:
            # Rows are ordered (head, q|k|v, head_size).
            return tensor.reshape(heads, 3, size, -1)[:, which].reshape(heads * size, -1)

        def projection(which: int) -> Affine:
            bias = None if fused.bias is None else part(fused.bias, which).squeeze(-1)
            return Affine(weight=part(fused.weight, which), bias=bias)

        return LayerTensors(
            attention_norm=affine(lookup, f"{p}.input_layernorm"),
            query=projection(0),
            key=projection(1),
            value=projection(2),
            out=affine(lookup, f"{p}.attention.dense"),
            query_norm=None,
            key_norm=None,
            ffn_norm=affine(lookup, f"{p}.post_attention_layernorm"),
            gate=None,
            up=affine(lookup, f"{p}.mlp.dense_h_to_4h"),
            down=affine(lookup, f"{p}.mlp.dense_4h_to_h"),
        )

    def model_tensors(self, lookup: Lookup) -> ModelTensors:
        """Embedding, final norm and head."""
        embedding = need(lookup, "gpt_neox.embed_in.weight")
        head = next((h for h in map(lookup, self.heads) if h is not None), None)
        return ModelTensors(
            embedding=embedding,
            final_norm=affine(lookup, "gpt_neox.final_layer_norm"),
            head=embedding if head is None else head,
            head_bias=None,
        )

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """`model.gpt_neox.layers`."""
        return list(model.get_submodule("gpt_neox.layers").children())

    def modules(self, layer: nn.Module) -> LayerModules:
        """By attribute names of `GPTNeoXLayer`."""

        def linear(name: str) -> nn.Linear:
            module = layer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            return module

        return LayerModules(
            attention=layer.get_submodule("attention"),
            query_key_value=(linear("attention.query_key_value"),),
            out=linear("attention.dense"),
            attention_end=layer.get_submodule("attention"),
            ffn_norm=layer.get_submodule("post_attention_layernorm"),
            ffn=layer.get_submodule("mlp"),
            ffn_in=(linear("mlp.dense_h_to_4h"),),
            ffn_out=linear("mlp.dense_4h_to_h"),
            ffn_end=layer.get_submodule("mlp"),
        )
