"""Whether a model's config is sane, and whether its stored tensors are the ones it asks for."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.errors import ModelError
from vesicle.shapes import MOST_POSITIONS, context_window

if TYPE_CHECKING:
    from vesicle.families.base import Affine, DecoderConfig, Family, LayerTensors, Lookup, Presence

LAYER_TYPES = ("full_attention", "sliding_attention")
MOST_LAYERS = 4096
MOST_HEADS = 1 << 14
MOST_HEAD_SIZE = 1 << 14
MOST_WIDTH = 1 << 20
MOST_FFN_WIDTH = 1 << 22
MOST_VOCABULARY = 1 << 24
"""Far beyond any model, and small enough that nothing made from them exhausts memory."""


def whole(config: Any, name: str, most: int) -> int:
    """A size in the config.

    Args:
        config: The Hugging Face config.
        name: Of the attribute.
        most: The largest allowed value; the smallest is 1.

    Raises:
        ModelError: If it is no whole number from 1 to `most`.
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ModelError(
            f"the model's config has {name} {reprlib.repr(value)}; "
            f"allowed: whole numbers from 1 to {most}"
        )
    return value


def check_layer_types(each: Any, n_layers: int) -> Sequence[str] | None:
    """The kind of attention of each layer; None where the config does not say.

    Args:
        each: The config's `layer_types`.
        n_layers: As many there must be.

    Raises:
        ModelError: If there are more or fewer than layers, or one of another name.
    """
    if each is None:
        return None
    if not isinstance(each, list | tuple) or len(each) != n_layers:
        found = len(each) if isinstance(each, list | tuple) else reprlib.repr(each)
        raise ModelError(
            f"the model's config has {found} layer_types; allowed: one for each of its {n_layers} "
            "layers"
        )
    for name in each:
        if name not in LAYER_TYPES:
            raise ModelError(
                f"the model's config has {reprlib.repr(name)} among its layer_types; allowed: "
                f"{', '.join(LAYER_TYPES)}"
            )
    return each


def positions(config: Any) -> int:
    """The context window, which YaRN makes longer than `max_position_embeddings`.

    Raises:
        ModelError: If `max_position_embeddings` is no whole number within bounds.
    """
    own = whole(config, "max_position_embeddings", MOST_POSITIONS)
    # transformers moves all but the last into `rope_parameters`, and that when it is first used.
    settings = {
        "max_position_embeddings": own,
        "rope_parameters": config.rope_parameters,
        "original_max_position_embeddings": getattr(
            config, "original_max_position_embeddings", None
        ),
    }
    return context_window(settings) or own


def flag(config: Any, name: str, default: bool = False) -> bool:
    """A yes or no in the config; nothing, or null, is the default.

    Raises:
        ModelError: If it is anything else.
    """
    value = getattr(config, name, None)
    if value is not None and not isinstance(value, bool):
        raise ModelError(
            f"the model's config has {name} {reprlib.repr(value)}; allowed: true, false"
        )
    return default if value is None else value


def epsilon(config: Any, name: str) -> float:
    """The number that a norm adds to the variance.

    Raises:
        ModelError: If it is no number from 0 to 1, or 1 itself.
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ModelError(
            f"the model's config has {name} {reprlib.repr(value)}; allowed: from 0 to below 1"
        )
    return value


def positive(config: Any, name: str) -> float:
    """A number above 0 in the config.

    Raises:
        ModelError: If it is none.
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(
            f"the model's config has {name} {reprlib.repr(value)}; allowed: numbers above 0"
        )
    return float(value)


def check_divides(part: int, part_name: str, total: int, total_name: str) -> None:
    """Refuse sizes of which one should divide the other.

    Raises:
        ModelError: If it does not.
    """
    if total % part:
        raise ModelError(
            f"the model's config has {part_name} {part} and {total_name} {total}; "
            f"{part_name} must divide {total_name}"
        )


def check_rotary(frequencies: Tensor, scale: float, head_size: int) -> None:
    """Refuse rotary frequencies (R / 2,) that rotate too many dimensions, or by nonsense.

    Raises:
        ModelError: If R is beyond the head's size, none, or a frequency is not a positive number.
    """
    size = 2 * frequencies.numel()
    if frequencies.ndim != 1 or not 0 < size <= head_size:
        raise ModelError(
            f"the model's config rotates {size} of {head_size} dimensions of a head; "
            f"allowed: even numbers from 2 to {head_size}"
        )
    if not (frequencies.isfinite() & (frequencies > 0)).all() or not 0 < scale < math.inf:
        raise ModelError(
            "the model's config has rope_parameters whose frequencies are not positive numbers; "
            "check rope_theta and the scaling factors"
        )


def check_tensors(family: Family, config: Any, lookup: Lookup) -> None:
    """Check that stored tensors are all that a config asks for, in its shapes.

    Nothing is computed with them, so they may be on PyTorch's `meta` device.

    Args:
        family: The config's family.
        config: The Hugging Face config.
        lookup: Finds a tensor by its name, without those that are tied to another.

    Raises:
        ModelError: If one is missing, of another shape, or there where the config wants none.
    """
    decoder, presence = family.decoder_config(config), family.presence(config)
    s = decoder.shape
    for number in range(s.n_layers):
        try:
            layer = family.layer_tensors(decoder, number, lookup)
        except RuntimeError as error:  # fused weights that cannot be taken apart
            raise ModelError(
                f"layer {number}'s tensors do not have the shapes that the config asks for: {error}"
            ) from error
        for role, found, shape, bias in _roles(layer, decoder, presence):
            _check_affine(f"layer {number}'s {role}", found, shape, bias)
    model = family.model_tensors(lookup)
    _check_affine("the final norm", model.final_norm, (s.width,), presence.norm_bias)
    table = (s.vocabulary, s.width)
    _check_shape("the embedding", model.embedding, table)
    _check_shape("the head", model.head, table)
    if model.head is model.embedding and not flag(config, "tie_word_embeddings"):
        raise ModelError(
            "the weights lack the head, and the config has tie_word_embeddings false, so that the "
            "embedding cannot stand in for it: they are of a base model; save the causal language "
            "model, head included"
        )
    if model.head_bias is not None:
        _check_shape("the head's bias", model.head_bias, (s.vocabulary,))


def _roles(
    layer: LayerTensors, config: DecoderConfig, presence: Presence
) -> Iterator[tuple[str, Affine | None, tuple[int, ...] | None, bool]]:
    """Each role in a layer: what plays it, its shape (None: nothing may), and whether biased."""
    s, p = config.shape, presence
    norm = (s.width,)
    head_norm = (s.head_size,) if p.query_norm else None
    yield "attention norm", layer.attention_norm, norm, p.norm_bias
    yield "query weight", layer.query, (s.query_width, s.width), p.qkv_bias
    yield "key weight", layer.key, (s.kv_width, s.width), p.qkv_bias
    yield "value weight", layer.value, (s.kv_width, s.width), p.qkv_bias
    yield "attention output weight", layer.out, (s.width, s.query_width), p.out_bias
    post_norm = norm if p.post_norm else None
    yield "norm of attention's output", layer.attention_post_norm, post_norm, False
    yield "query norm", layer.query_norm, head_norm, False
    yield "key norm", layer.key_norm, head_norm, False
    yield "FFN norm", layer.ffn_norm, norm, p.norm_bias
    yield "FFN gate weight", layer.gate, (s.ffn_width, s.width) if s.gated else None, p.ffn_bias
    yield "FFN up weight", layer.up, (s.ffn_width, s.width), p.ffn_bias
    yield "FFN down weight", layer.down, (s.width, s.ffn_width), p.ffn_bias
    yield "norm of the FFN's output", layer.ffn_post_norm, post_norm, False


def _check_affine(
    role: str, found: Affine | None, shape: tuple[int, ...] | None, biased: bool
) -> None:
    if found is None or shape is None:
        if (found is None) != (shape is None):
            is_there = "is missing" if found is None else "is there"
            raise ModelError(f"{role} {is_there}, against what the config says")
        return
    _check_shape(role, found.weight, shape)
    if (found.bias is not None) != biased:
        is_there = "has no bias" if biased else "has a bias"
        raise ModelError(f"{role} {is_there}, against what the config says")
    if found.bias is not None:
        _check_shape(f"{role}'s bias", found.bias, shape[:1])


def _check_shape(role: str, found: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != shape:
        raise ModelError(f"{role} is {tuple(found.shape)}; the config asks for {shape}")
