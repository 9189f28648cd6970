"""Gates: what an entry's own key and value say of how much it will be needed.

A gate is one row of weights for each KV head, on the entry's key before rotary phases, its value,
and 1. It is KVzap's idea (a head on hidden states that predicts an oracle's score) at the smallest
size: key and value are all that later queries can see of an entry, so the cache itself is the
input, and nothing need be computed as the model runs. A score is worked out once, when the entry is
first seen; what its age makes of it is added later, see `Namm.gated`.

Where gates come from is another matter: `evolution.repetition` and `training.decay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_DECIMALS = 3


def width_of(head_size: int) -> int:
    """Weights of one gate."""
    return 2 * head_size + 1


def gate_inputs(keys: Array, values: Array) -> Array:
    """(..., n, 2 K + 1) what a gate multiplies, of keys and values (..., n, K)."""
    ones = np.ones((*keys.shape[:-1], 1), np.float32)
    return np.concatenate([keys, values, ones], axis=-1, dtype=np.float32)


def gate_scores(gates: Array, keys: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """(n,) scores of each KV head's entries, rounded.

    In the first layer an entry is its token's alone, so that a word's entries are all alike but for
    what undoing their phases leaves behind; that is not to decide which of them stays.

    Args:
        gates: (G, 2 K + 1) of a layer's KV heads.
        keys: (n, K) of each, before rotary phases.
        values: (n, K) of each.
    """
    found = []
    for gate, key, value in zip(gates, keys, values, strict=True):
        k = len(gate) // 2
        found.append((key @ gate[:k] + value @ gate[k:-1] + gate[-1]).round(_DECIMALS))
    return found
