"""What Vesicle must know about a decoder: its sizes, and where its weights and modules are.

Only this folder knows Hugging Face's module and parameter names. A family answers for a set of
`model_type` values; everything else asks a `Family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vesicle.activations import ACTIVATIONS
from vesicle.errors import ModelError
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotary phases.

    Attributes:
        frequencies: (R / 2,) radians per position, R the dimensions of a head that are rotated.
        scale: Factor on the cosines and sines (YaRN).
    """

    frequencies: Tensor
    scale: float

    def undone(self, keys: Tensor, positions: Tensor) -> Tensor:
        """(..., N, K) rotated keys of positions (N,) as they were before."""
        half = len(self.frequencies)
        angles = positions[:, None].to(keys.dtype) * self.frequencies.to(keys)
        cosines, sines = angles.cos() / self.scale, angles.sin() / self.scale
        left, right, rest = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        turned = [left * cosines + right * sines, right * cosines - left * sines]
        return torch.cat([*turned, rest], -1)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's arithmetic, in one vocabulary for all families.

    Attributes:
        shape: Sizes.
        rms_norm: True for RMSNorm, False for LayerNorm.
        norm_eps: Added to the variance.
        activation: Key of `ACTIVATIONS`.
        rotaries: The rotary phases that layers have, all of as many dimensions.
        rotary_layers: For each layer, which of them rotates queries and keys; None for none.
        parallel_residual: Whether attention and FFN both read the layer's input.
        context_window: Positions the model was made for.
        attention_scale: Factor on the products of queries and keys.
        embedding_scale: Factor on embeddings.
        logit_cap: c of logits c tanh(x / c); None where they are x.
    """

    shape: ModelShape
    rms_norm: bool
    norm_eps: float
    activation: str
    rotaries: tuple[Rotation, ...]
    rotary_layers: tuple[int | None, ...]
    parallel_residual: bool
    context_window: int
    attention_scale: float
    embedding_scale: float = 1.0
    logit_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A weight (out, in) or a norm's gain (D,), and its bias (out,) if it has one.

    `name` is that of the parameter whose weight it is, if it is all of it.
    """

    weight: Tensor
    bias: Tensor | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """One layer's parameters under names that every family shares.

    `gate` and the norms of queries and keys may be absent, and those of what a module gives.
    """

    attention_norm: Affine
    query: Affine
    key: Affine
    value: Affine
    out: Affine
    query_norm: Affine | None
    key_norm: Affine | None
    ffn_norm: Affine
    gate: Affine | None
    up: Affine
    down: Affine
    attention_post_norm: Affine | None = None
    ffn_post_norm: Affine | None = None


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """Parameters outside the layers.

    `head` (V, D) is the embedding itself where the two are tied; `head_name` is the parameter's.
    """

    embedding: Tensor
    final_norm: Affine
    head: Tensor
    head_bias: Tensor | None
    head_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Which of the parameters that some decoders lack a config asks for.

    Attributes:
        qkv_bias: Biases of queries, keys and values.
        out_bias: Of the attention output.
        ffn_bias: Of every FFN projection.
        norm_bias: Of every norm.
        query_norm: Norms on queries and keys.
        post_norm: Norms on what attention and FFN give to the residual stream.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False
    query_norm: bool = False
    post_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """One layer's modules in a Hugging Face model, by role.

    `attention_end` and `ffn_end` give what is added to the residual stream: the modules themselves,
    or norms of what they give.
    """

    attention: nn.Module
    query_key_value: tuple[nn.Linear, ...]
    out: nn.Linear
    attention_end: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module
    ffn_in: tuple[nn.Linear, ...]
    ffn_out: nn.Linear
    ffn_end: nn.Module


Lookup = Callable[[str], Tensor | None]
"""Returns the named parameter, or None if the model has none of that name."""


class Family(ABC):
    """A set of architectures that share module names and arithmetic."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str]
    """What a causal LM's parameters are named with, and those of a base model saved alone not."""
    heads: ClassVar[tuple[str, ...]]
    """Names of the LM head's weight, which is not part of the base model."""

    @abstractmethod
    def decoder_config(self, config: Any) -> DecoderConfig:
        """Read a Hugging Face config.

        Raises:
            ModelError: If its sizes are absurd, or it asks for arithmetic that the executors do
                not do.
        """

    @abstractmethod
    def presence(self, config: Any) -> Presence:
        """Which optional parameters a Hugging Face config asks for."""

    @abstractmethod
    def layer_tensors(self, config: DecoderConfig, layer: int, lookup: Lookup) -> LayerTensors:
        """Layer `layer`'s parameters."""

    @abstractmethod
    def model_tensors(self, lookup: Lookup) -> ModelTensors:
        """The parameters outside the layers."""

    def canonical_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The names that a causal LM's parameters have, and what they are stored as.

        A base model saved alone has no prefix on any of them.
        """
        stored = tuple(stored)
        if any(name.startswith(self.prefix) for name in stored):
            return {name: name for name in stored}
        return {name if name in self.heads else self.prefix + name: name for name in stored}

    @abstractmethod
    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers of a Hugging Face causal LM, in order."""

    @abstractmethod
    def modules(self, layer: nn.Module) -> LayerModules:
        """The modules of one decoder layer."""


def need(lookup: Lookup, name: str) -> Tensor:
    """A parameter that must exist.

    Raises:
        ModelError: If it does not.
    """
    tensor = lookup(name)
    if tensor is None:
        raise ModelError(f"the weights lack {name!r}; the model folder is incomplete")
    return tensor


def affine(lookup: Lookup, prefix: str) -> Affine:
    """`prefix.weight` and, where there is one, `prefix.bias`."""
    name = f"{prefix}.weight"
    return Affine(weight=need(lookup, name), bias=lookup(f"{prefix}.bias"), name=name)


def optional_affine(lookup: Lookup, prefix: str) -> Affine | None:
    """Like `affine`, or None where the model has no such parameter."""
    weight = lookup(f"{prefix}.weight")
    return None if weight is None else Affine(weight=weight, bias=lookup(f"{prefix}.bias"))


def check_activation(name: Any) -> str:
    """The activation's name, if the executors have it.

    Raises:
        ModelError: If they do not.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ModelError(
            f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return name
