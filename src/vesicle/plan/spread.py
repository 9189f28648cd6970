"""How the blocks that a query reads in a layer are dealt out to its KV heads.

A Plan says how many blocks a query reads in each KV head. Heads need them unequally: of the default
model's 90, some seven look far back and most read what is near. A *spread* is a method's, not a
Plan's: for each layer and KV head the multiple of the Plan's number that the head reads. Both
executors and the ledger work it out here, or by the same whole numbers in the native core, so that
they agree to the last block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.shapes import ModelShape, Spread

UNIT = 1 << 16
"""Of a spread's numbers: a head with this one reads as many blocks as the Plan says."""
LEAST = 8
"""Blocks that a head reads at least, where the Plan says as many."""


def blocks_of_heads(
    kv_blocks: NDArray[np.integer],
    visible: NDArray[np.integer],
    spread: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """(..., G) blocks that KV heads read.

    Args:
        kv_blocks: (..., 1) as the Plan has them.
        visible: (..., G or 1) blocks that are seen.
        spread: (..., G) of a layer, or of all, from `as_array`.

    Returns:
        All that are visible where the Plan says as many.
    """
    wanted = kv_blocks.astype(np.int64)
    if spread is None:
        return np.minimum(wanted, visible)
    dealt = np.maximum(wanted * spread // UNIT, np.minimum(wanted, LEAST))
    return np.where(wanted < visible, np.minimum(dealt, visible), visible)


def as_array(spread: Spread) -> NDArray[np.int64] | None:
    """(L, G); None where all heads read alike."""
    return np.array(spread, np.int64) if spread else None


def check_spread(spread: Spread, shape: ModelShape) -> None:
    """Refuse a spread that does not fit a model.

    Raises:
        VesicleError: With what is wrong and what is allowed.
    """
    if not spread:
        return
    if len(spread) != shape.n_layers or any(len(row) != shape.n_kv_heads for row in spread):
        raise VesicleError(
            f"a spread is of {len(spread)} layers and {len(spread[0])} KV heads; allowed: "
            f"{shape.n_layers} and {shape.n_kv_heads} in each"
        )
    numbers = np.array(spread)
    outside = numbers[(numbers < 0) | (numbers >= 1 << 31)]
    if numbers.dtype.kind != "i" or len(outside):
        found = outside[0] if len(outside) else numbers.flat[0]
        raise VesicleError(f"a spread has {found}; allowed: whole numbers from 0 to {2**31 - 1}")
    bad = (shape.layer_windows > 0) & (numbers != UNIT).any(1)
    if bad.any():
        raise VesicleError(
            f"a spread has unequal numbers in layer {int(bad.argmax())}, which attends through a "
            f"window; allowed there: {UNIT}"
        )
