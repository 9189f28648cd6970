"""The networks of a NAMM: from features of entries to one score each.

`bam` is the paper's: one head of *backward attention*, in which an entry looks at itself and at the
newer ones alone, so that what came later can make it needless; then a layer on what it found
(Cetin et al. 2024, section 3.2). `mlp` and `linear` look at each entry by itself; they are its
ablations, and cheaper.

Parameters lie in one row of numbers, as evolution wants them. Zeros give every entry the score 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
KINDS = ("bam", "mlp", "linear")
_ROWS = 512
"""Entries that look back at a time: what they see is a matrix."""


def shapes_of(kind: str, n_features: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a network, by name."""
    f, h = n_features, hidden
    match kind:
        case "linear":
            return {"out": (f,), "bias": ()}
        case "mlp":
            return {"inner": (f, h), "inner_bias": (h,), "out": (h,), "skip": (f,), "bias": ()}
    joint = {"query": (f, h), "key": (f, h), "value": (f, h)}
    inner = {"inner": (h, h), "inner_skip": (f, h), "inner_bias": (h,)}
    return {**joint, **inner, "out": (h,), "skip": (f,), "bias": ()}


def size_of(kind: str, n_features: int, hidden: int) -> int:
    """Numbers of a network."""
    return sum(math.prod(shape) for shape in shapes_of(kind, n_features, hidden).values())


def spread_of(kind: str, n_features: int, hidden: int) -> Array:
    """(P,) how far each number is from 0 in a network whose units have the scale of its features.

    Evolution measures its steps by it.
    """
    parts = [
        np.full(math.prod(shape), 1 / math.sqrt(shape[0]) if shape else 1.0)
        for shape in shapes_of(kind, n_features, hidden).values()
    ]
    return np.concatenate(parts).astype(np.float32)


def score(kind: str, parameters: Array, features: Array, hidden: int) -> Array:
    """(..., n) scores of entries.

    Args:
        kind: One of `KINDS`.
        parameters: (P,) numbers, as `shapes_of` orders them.
        features: (..., n, F) of the entries that a KV head holds, in order of position.
        hidden: Units.
    """
    given, x, at = {}, torch.from_numpy(np.ascontiguousarray(features)), 0
    numbers = torch.from_numpy(np.ascontiguousarray(parameters, np.float32))
    for name, shape in shapes_of(kind, features.shape[-1], hidden).items():
        size = math.prod(shape)
        given[name] = numbers[at : at + size].view(shape)
        at += size
    with torch.inference_mode():
        found: Array = _score(kind, given, x).numpy()
    return found


def _score(kind: str, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if kind == "linear":
        return x @ w["out"] + w["bias"]
    if kind == "mlp":
        inner = x @ w["inner"] + w["inner_bias"]
    else:
        inner = _looking_back(w, x) @ w["inner"] + x @ w["inner_skip"] + w["inner_bias"]
    return inner.relu() @ w["out"] + x @ w["skip"] + w["bias"]


def _looking_back(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(..., n, H) what each entry finds among itself and the newer ones."""
    query, key, value = x @ w["query"], x @ w["key"], x @ w["value"]
    n, scale = x.shape[-2], 1 / math.sqrt(query.shape[-1])
    found = torch.empty_like(value)
    places = torch.arange(n)
    for first in range(0, n, _ROWS):
        last = min(first + _ROWS, n)
        scores = query[..., first:last, :] @ key[..., first:, :].mT * scale
        scores.masked_fill_(places[first:last, None] > places[None, first:], -torch.inf)
        found[..., first:last, :] = scores.softmax(-1) @ value[..., first:, :]
    return found
