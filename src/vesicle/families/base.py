"""What Vesicle must know about a decoder: its sizes, and where its weights and modules are.

Only this folder knows Hugging Face's module and parameter names. A family answers for a set of
`model_type` values; everything else asks a `Family`.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vesicle.errors import ModelError
from vesicle.families.checks import MOST_POSITIONS, check_rotary, whole
from vesicle.shapes import ModelShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's arithmetic, in one vocabulary for all families.

    Attributes:
        shape: Sizes.
        rms_norm: True for RMSNorm, False for LayerNorm.
        norm_eps: Added to the variance.
        activation: Key of `ACTIVATIONS`.
        rotary_frequencies: (rotary_size / 2,) radians per position.
        rotary_scale: Factor on the cosines and sines (YaRN).
        rotary_layers: Which layers rotate queries and keys.
        parallel_residual: Whether attention and FFN both read the layer's input.
        context_window: Positions the model was made for.
    """

    shape: ModelShape
    rms_norm: bool
    norm_eps: float
    activation: str
    rotary_frequencies: Tensor
    rotary_scale: float
    rotary_layers: tuple[bool, ...]
    parallel_residual: bool
    context_window: int


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A weight (out, in) or a norm's gain (D,), and its bias (out,) if it has one."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """One layer's parameters under names that every family shares.

    `gate`, `query_norm` may be absent.
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


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """Parameters outside the layers.

    `head` (V, D) is the embedding itself where the two are tied.
    """

    embedding: Tensor
    final_norm: Affine
    head: Tensor
    head_bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Which of the parameters that some decoders lack a config asks for.

    Attributes:
        qkv_bias: Biases of queries, keys and values.
        out_bias: Of the attention output.
        ffn_bias: Of every FFN projection.
        norm_bias: Of every norm.
        query_norm: Norms on queries and keys.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False
    query_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """One layer's modules in a Hugging Face model, by role."""

    attention: nn.Module
    query_key_value: tuple[nn.Linear, ...]
    out: nn.Linear
    ffn_norm: nn.Module
    ffn: nn.Module
    ffn_in: tuple[nn.Linear, ...]
    ffn_out: nn.Linear


Lookup = Callable[[str], Tensor | None]
"""Returns the named parameter, or None if the model has none of that name."""


class Family(ABC):
    """A set of architectures that share module names and arithmetic."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

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
    return Affine(weight=need(lookup, f"{prefix}.weight"), bias=lookup(f"{prefix}.bias"))


def optional_affine(lookup: Lookup, prefix: str) -> Affine | None:
    """Like `affine`, or None where the model has no such parameter."""
    weight = lookup(f"{prefix}.weight")
    return None if weight is None else Affine(weight=weight, bias=lookup(f"{prefix}.bias"))


def rotary(config: Any, head_size: int) -> tuple[Tensor, float]:
    """Rotary frequencies (rotary_size / 2,) and scale (Su et al., RoFormer, 2021).

    Raises:
        ModelError: For a scaling that depends on the running length (dynamic, longrope), and for
            parameters that are missing or make no sense.
    """
    parameters = config.rope_parameters
    if not isinstance(parameters, dict):
        raise ModelError(
            f"the model's config has rope_parameters {reprlib.repr(parameters)}; allowed: an object"
        )
    try:
        frequencies, scale = _rotary(config, head_size, parameters)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model's config has rope_parameters {reprlib.repr(parameters)} that make no sense "
            f"({type(error).__name__}: {error})"
        ) from error
    check_rotary(frequencies, scale, head_size)
    return frequencies, scale


def _rotary(config: Any, head_size: int, parameters: dict[str, Any]) -> tuple[Tensor, float]:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"rotary scaling {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if kind == "default":
        size = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        if size % 2 or not 2 <= size <= head_size:
            raise ModelError(
                f"the model's config rotates {size} of {head_size} dimensions of a head; "
                f"allowed: even numbers from 2 to {head_size}"
            )
        if "rope_theta" not in parameters:
            # What an incomplete config is told: transformers' own classes have defaults for it.
            raise AttributeError("rope_parameters have no rope_theta")
        powers = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (parameters["rope_theta"] ** powers), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scale)


def check_activation(name: str) -> str:
    """The activation's name, if the executors have it.

    Raises:
        ModelError: If they do not.
    """
    if name not in ACTIVATIONS:
        raise ModelError(
            f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return name


def refuse_sliding_window(config: Any, window: int | None, layer_types: Sequence[str]) -> None:
    """Refuse a model whose attention window is shorter than its context.

    Raises:
        ModelError: Naming the window and the context.
    """
    context = whole(config, "max_position_embeddings", MOST_POSITIONS)
    if window is not None and window < context and "sliding_attention" in layer_types:
        raise ModelError(
            f"this model attends through a sliding window of {window} of its {context} positions; "
            "sliding-window attention is not supported"
        )
