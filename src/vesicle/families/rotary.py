"""Rotary frequencies of a config (Su et al., RoFormer, 2021), scaled as transformers scales them.

The scalings are transformers' own functions. It has none for unscaled frequencies, which each of
its models computes for itself: theta^(-2i / R) for i from 0 to R / 2, over R dimensions of a head.

Not reproduced are scalings that depend on the running length (`dynamic`, `longrope`).
"""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

from vesicle.errors import ModelError
from vesicle.families.base import Rotation
from vesicle.families.checks import check_rotary

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotary(
    config: Any, head_size: int, *, partial: bool = False, kind: str | None = None
) -> Rotation:
    """The rotary phases of a config.

    Args:
        config: As transformers' class reads it: with every setting in `rope_parameters`.
        head_size: Dimensions of a head.
        partial: Whether the architecture can rotate a part of a head.
        kind: Of the layers that have them, where `rope_parameters` differ by kind of layer.

    Raises:
        ModelError: For a scaling that is not supported, for a part of the head where the
            architecture rotates all, and for parameters that are missing or make no sense.
    """
    parameters = config.rope_parameters
    if not isinstance(parameters, dict):
        raise ModelError(
            f"the model's config has rope_parameters {reprlib.repr(parameters)}; allowed: an object"
        )
    if kind is not None:
        parameters = parameters.get(kind)
        if not isinstance(parameters, dict):
            raise ModelError(
                f"the model's config has rope_parameters {reprlib.repr(parameters)} of {kind!r}; "
                "allowed: an object for each kind of layer"
            )
    try:
        frequencies, scale = _rotary(config, head_size, parameters, kind)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model's config has rope_parameters {reprlib.repr(parameters)} that make no sense "
            f"({type(error).__name__}: {error})"
        ) from error
    check_rotary(frequencies, scale, head_size)
    if not partial and 2 * frequencies.numel() != head_size:
        # transformers' own code for these models reads it in some scalings, and not in others.
        share = parameters.get("partial_rotary_factor")
        raise ModelError(
            f"the model's config has partial_rotary_factor {share}; "
            f"model type {config.model_type!r} rotates whole heads: allowed: 1.0"
        )
    return Rotation(frequencies=frequencies, scale=scale)


def _rotary(
    config: Any, head_size: int, parameters: dict[str, Any], of_kind: str | None
) -> tuple[Tensor, float]:
    if nested := [name for name, value in parameters.items() if isinstance(value, dict)]:
        raise ModelError(
            f"the model's config has rope_parameters of their own for {nested[0]!r}; "
            f"model type {config.model_type!r} rotates all layers alike"
        )
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"rotary scaling {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    share = parameters.get("partial_rotary_factor")
    size = int(head_size * (1.0 if share is None else share))
    if size % 2 or not 2 <= size <= head_size:
        raise ModelError(
            f"the model's config rotates {size} of {head_size} dimensions of a head; "
            f"allowed: even numbers from 2 to {head_size}"
        )
    if kind == "default":
        powers = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (parameters["rope_theta"] ** powers), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    named = {} if of_kind is None else {"layer_type": of_kind}
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **named)
    return frequencies, float(scale)
