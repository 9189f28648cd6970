"""Retention: which entries of the key-value cache are kept once a prompt was read.

An *entry* is the key and the value of one token in one layer and KV head. `Retention` keeps chosen
entries of the first `at` tokens and forgets the others for good when `at` tokens were read; all
else is at rest, or as another method decides. Whoever chooses (a compression method, a control, an
oracle) need only say which: the engine frees the memory, the reference hides the keys, and the
ledger prices what is left.

The cache lies in pages of 16 positions of one KV head of a layer, and a page is freed as a whole.
So what is kept is rounded up to what pages can hold:

- the incomplete last block of the first `at` tokens stays;
- in the complete blocks a KV head keeps a multiple of 16 entries; the most recent ones not chosen
  fill it up.

Which entries they are, and how many, may differ from head to head. A layer that attends through a
window holds what its window shows, whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from vesicle.errors import VesicleError
from vesicle.plan import BLOCK, FOREVER, Author, Dense, IntArray, Method, StandIns
from vesicle.plan.forgetting import rounded_up
from vesicle.shapes import ModelShape, Overhead


class Retention(Method):
    """Keeps chosen entries of the first `at` tokens once these were read."""

    def __init__(
        self,
        kept: Sequence[Sequence[ArrayLike]] | Sequence[IntArray],
        at: int,
        inner: Method | None = None,
    ) -> None:
        """Keep `kept`, rounded up as the module docstring says.

        Args:
            kept: For each layer, for each KV head, the positions to keep, in any order: (G, n), or
                G rows of different lengths.
            at: Tokens to be read before the others are forgotten.
            inner: Decides everything else; `Dense` by default.

        Raises:
            VesicleError: If `at` is below 1, or a position is given twice or is not below `at`.
        """
        if at < 1:
            raise VesicleError(f"entries are to be forgotten after {at} tokens; allowed: from 1")
        self.at = at
        self.inner = inner or Dense()
        self.kept = [[_positions(head, at) for head in layer] for layer in kept]
        self._evict_after: IntArray | None = None

    @property
    def decider(self) -> Method:
        """The inner method's."""
        return self.inner.decider

    @property
    def stand_ins(self) -> StandIns:
        """The inner method's stand-ins and block summary."""
        return self.inner.stand_ins

    def overhead(self, shape: ModelShape) -> Overhead:
        """The inner method's: what choosing the entries took is not counted."""
        return self.inner.overhead(shape)

    def author(self, shape: ModelShape) -> Author:
        """The inner method's author, which forgets.

        Raises:
            VesicleError: If layers or KV heads are not the model's, or the inner method forgets
                already.
        """
        author = self.inner.author(shape)
        if author.evict_after is not None:
            raise VesicleError("the inner method forgets entries already; one of the two may")
        evict_after = self.evict_after(shape)
        if (evict_after != FOREVER).any():
            author.evict_after = evict_after
        return author

    def evict_after(self, shape: ModelShape) -> IntArray:
        """(at, L, G) the Plan's field for the first `at` tokens, rounded up to pages.

        Raises:
            VesicleError: If layers or KV heads are not the model's.
        """
        n_layers, n_heads = shape.n_layers, shape.n_kv_heads
        if len(self.kept) != n_layers:
            raise VesicleError(
                f"entries of {len(self.kept)} layers are to be kept; this model has {n_layers}"
            )
        for layer, heads in enumerate(self.kept):
            if len(heads) != n_heads:
                raise VesicleError(
                    f"entries of {len(heads)} KV heads are to be kept in layer {layer}; "
                    f"this model has {n_heads}"
                )
        if self._evict_after is None:
            complete = self.at // BLOCK * BLOCK
            stays = np.ones((self.at, n_layers, n_heads), bool)
            for layer, heads in enumerate(self.kept):
                chosen = np.zeros((n_heads, complete), bool)
                for row, positions in zip(chosen, heads, strict=True):
                    row[positions[positions < complete]] = True
                if not shape.layer_windows[layer]:
                    stays[:complete, layer] = np.stack([rounded_up(row) for row in chosen], 1)
            self._evict_after = np.where(stays, FOREVER, self.at - 1).astype(np.int32)
        return self._evict_after


def eviction_lengths(evict_after: IntArray | None) -> list[int]:
    """After how many tokens entries are forgotten, rising; `evict_after` as an author has it."""
    if evict_after is None:
        return []
    return [int(last) + 1 for last in np.unique(evict_after) if last != FOREVER]


def held_entries(evict_after: IntArray, layer: int, length: int) -> list[IntArray]:
    """For each KV head the positions (n,) below `length`, rising, that the query there may read.

    Args:
        evict_after: (S, L, G) as an author has it.
        layer: Of the entries.
        length: Tokens before the query.
    """
    n_heads = evict_after.shape[2]
    stays = np.ones((length, n_heads), bool)
    stays[: len(evict_after)] = evict_after[:length, layer] >= length
    return [np.nonzero(head)[0].astype(np.int32) for head in stays.T]


def alike(counts: ArrayLike) -> list[slice]:
    """KV heads side by side of equal `counts` (G,), which can be worked out together."""
    given = np.asarray(counts)
    edges = (np.flatnonzero(np.diff(given)) + 1).tolist()
    return [slice(*pair) for pair in pairwise([0, *edges, len(given)])]


def _positions(head: ArrayLike, at: int) -> IntArray:
    """The positions (n,) to keep of one KV head, int32, rising.

    Raises:
        VesicleError: If they are not integers in a row, not from 0 to `at` - 1, or given twice.
    """
    given = np.asarray(head)
    if given.size and not (given.ndim == 1 and np.issubdtype(given.dtype, np.integer)):
        raise VesicleError(
            f"positions of a KV head are {given.dtype} of shape {given.shape}; "
            "allowed: integers in a row"
        )
    positions = np.sort(given.ravel())
    outside = positions[(positions < 0) | (positions >= at)]
    if len(outside):
        raise VesicleError(f"entry {outside[0]} is to be kept; allowed: 0 to {at - 1}")
    twice = positions[1:][positions[1:] == positions[:-1]]
    if len(twice):
        raise VesicleError(f"entry {twice[0]} is to be kept twice in one KV head")
    return positions.astype(np.int32)
