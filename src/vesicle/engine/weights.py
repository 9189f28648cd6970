"""Loads a decoder's weights into the engine's layout: channel-major, joined by shared input.

Tensors are read one at a time, so the peak is one copy of the model and one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.engine.linear import ChannelMajor
from vesicle.errors import ModelError
from vesicle.families import DecoderConfig, find_family
from vesicle.families.base import Affine, Lookup
from vesicle.files import read_json

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer: values, keys, queries share `attention_in`, in that order; gate, up `ffn_in`.

    Keys and queries lie side by side so that one rotation serves both; values and keys come first
    so that a token whose attention is skipped computes a leading part of the projection.
    """

    attention_norm: Affine
    attention_in: ChannelMajor
    attention_out: ChannelMajor
    query_norm: Affine | None
    key_norm: Affine | None
    ffn_norm: Affine
    ffn_in: ChannelMajor
    ffn_out: ChannelMajor


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole decoder."""

    config: DecoderConfig
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Affine
    head: Tensor
    head_bias: Tensor | None


def build(config: Any, lookup: Lookup, dtype: torch.dtype) -> Weights:
    """Arrange the parameters that `lookup` finds for a Hugging Face config, in `dtype`.

    Raises:
        ModelError: If the family is not supported or a parameter is missing or of the wrong shape.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    family = find_family(config)
    decoder = family.decoder_config(config)
    size = torch.empty(0, dtype=dtype).element_size()
    decoder = replace(decoder, shape=replace(decoder.shape, weight_bytes=size, kv_bytes=size))
    shape = decoder.shape

    def get(name: str) -> Tensor | None:
        tensor = lookup(name)
        return None if tensor is None else tensor.detach().to(dtype)

    layers = []
    for number in range(shape.n_layers):
        t = family.layer_tensors(decoder, number, get)
        expected = {
            "query": (t.query, (shape.query_width, shape.width)),
            "key": (t.key, (shape.kv_width, shape.width)),
            "value": (t.value, (shape.kv_width, shape.width)),
            "attention output": (t.out, (shape.width, shape.query_width)),
            "FFN up": (t.up, (shape.ffn_width, shape.width)),
            "FFN down": (t.down, (shape.width, shape.ffn_width)),
        }
        for role, (affine, size_2d) in expected.items():
            if tuple(affine.weight.shape) != size_2d:
                raise ModelError(
                    f"layer {number}'s {role} weight is {tuple(affine.weight.shape)}; "
                    f"the config asks for {size_2d}"
                )
        ffn_in = [t.up] if t.gate is None else [t.gate, t.up]
        layers.append(
            LayerWeights(
                attention_norm=t.attention_norm,
                attention_in=_joined(t.value, t.key, t.query),
                attention_out=_joined(t.out),
                query_norm=t.query_norm,
                key_norm=t.key_norm,
                ffn_norm=t.ffn_norm,
                ffn_in=_joined(*ffn_in),
                ffn_out=_joined(t.down),
            )
        )
    m = family.model_tensors(get)
    return Weights(
        config=decoder,
        embedding=m.embedding,
        layers=tuple(layers),
        final_norm=m.final_norm,
        head=m.head,
        head_bias=m.head_bias,
    )


def _joined(*parts: Affine) -> ChannelMajor:
    return ChannelMajor.stack([p.weight for p in parts], [p.bias for p in parts])


def from_model(model: nn.Module, dtype: torch.dtype | None) -> Weights:
    """Copy the weights of a Hugging Face causal LM; its own dtype by default."""
    config: Any = model.config
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors = {
            k: v
            for k, v in tensors.items()
            if not k.endswith(("lm_head.weight", "embed_out.weight"))
        }
    return build(config, tensors.get, dtype or next(model.parameters()).dtype)


def read_config(folder: Path) -> Any:
    """The Hugging Face config of a model folder.

    Importing transformers takes longer than reading the default model's weights. A config that
    spells out all that a family asks for needs no class with defaults; any other is read by
    transformers.

    Raises:
        ModelError: If it is missing or damaged.
    """
    path = folder / "config.json"
    values = read_json(path)
    if isinstance(values, dict) and {"rope_parameters", "tie_word_embeddings"} <= set(values):
        plain = SimpleNamespace(**values)
        try:
            find_family(plain).decoder_config(plain)
            return plain
        except (AttributeError, KeyError, TypeError):
            pass
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


def from_folder(folder: Path, dtype: torch.dtype | None) -> Weights:
    """Read a folder of safetensors and `config.json`.

    Args:
        folder: As `resolve_model` returns.
        dtype: Of the engine; by default bfloat16 where the file has it, else float32.

    Raises:
        ModelError: If files are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    find_family(config)
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        with ExitStack() as stack:
            where: dict[str, Callable[[str], Tensor]] = {}
            for name in files:
                opened = stack.enter_context(safe_open(folder / name, framework="pt"))
                where.update(dict.fromkeys(opened.keys(), opened.get_tensor))
            tied = config.tie_word_embeddings

            def lookup(name: str) -> Tensor | None:
                if name not in where or (tied and name in ("lm_head.weight", "embed_out.weight")):
                    return None
                return where[name](name)

            if dtype is None:
                first = next(iter(where))
                stored = where[first](first).dtype
                dtype = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
            return build(config, lookup, dtype)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read the weights in {folder}: {error}") from error
