"""Tiles: which past positions stand together.

Tiles are nodes of a tree of four: one of 64 positions begins at a multiple of 64, its children of
16 at multiples of 16, and so on down to single positions. Each position says how large a tile it
may lie in; a tile stands where all of its positions allow it. So a block of 64 is tiled by what its
own positions say, once it is complete, and nothing that comes later changes it: tiling as a text
goes on and tiling it at the end are the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

SIZES = (1, 4, 16, 64)
LARGEST = SIZES[-1]
IntArray = NDArray[np.int32]


def tile_sizes(wanted: ArrayLike, sinks: int = 16, sizes: Sequence[int] = SIZES) -> IntArray:
    """Sizes of the tiles that positions lie in.

    Args:
        wanted: (..., T) the largest tile that each position may lie in.
        sinks: First positions that stand alone, whatever they allow: attention parks there what it
            does not need.
        sizes: Those that there are.

    Returns:
        (..., T) of `SIZES`; 1 in the incomplete last block of 64.

    Raises:
        ValueError: If a size is wanted that is none.
    """
    allowed = np.array(wanted, dtype=np.int32)
    strange = set(np.unique(allowed).tolist()) - set(SIZES)
    if strange:
        raise ValueError(
            f"a tile of {min(strange)} positions; allowed: {', '.join(map(str, SIZES))}"
        )
    allowed[..., :sinks] = 1
    whole = allowed.shape[-1] // LARGEST * LARGEST
    found = np.ones_like(allowed)
    for size in sizes[1:]:
        nodes = (*allowed.shape[:-1], whole // size, size)
        fits = (allowed[..., :whole].reshape(nodes) >= size).all(-1)
        np.copyto(found[..., :whole], size, where=fits.repeat(size, -1))
    return found


def split_to_budget(importance: ArrayLike, n_tiles: int) -> IntArray:
    """Sizes that positions may lie in, so that at most `n_tiles` tiles stand.

    Begins with tiles of 64 and splits again and again the one of the most important position into
    its four children, as long as there is room. Of equal importance the older is split first.

    Args:
        importance: (T,) of each position, of complete blocks of 64.
        n_tiles: At least T / 64.

    Returns:
        (T,) of `SIZES`, for `tile_sizes`.

    Raises:
        ValueError: If T is no multiple of 64, or there are more blocks than tiles.
    """
    weights = np.asarray(importance, np.float64)
    length = len(weights)
    if length % LARGEST:
        raise ValueError(f"{length} positions; allowed: multiples of {LARGEST}")
    n_blocks = length // LARGEST
    if n_tiles < n_blocks:
        raise ValueError(f"{n_tiles} tiles for {n_blocks} blocks; allowed: one for each, or more")
    sizes = np.full(length, LARGEST, np.int32)
    tops = {size: weights.reshape(-1, size).max(-1) for size in SIZES}
    waiting = [(-float(top), b * LARGEST, LARGEST) for b, top in enumerate(tops[LARGEST])]
    heapq.heapify(waiting)
    left = n_tiles - n_blocks
    while waiting and left >= 3:  # a split makes four of one
        _, first, size = heapq.heappop(waiting)
        child = size // 4
        sizes[first : first + size] = child
        left -= 3
        if child > 1:
            for start in range(first, first + size, child):
                heapq.heappush(waiting, (-float(tops[child][start // child]), start, child))
    return sizes
