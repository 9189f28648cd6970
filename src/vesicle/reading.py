"""Reading: everything stays in the cache, and a query reads a fixed number of its entries.

    method = Reading(1024, engine.shape, profile=namm.profile_of(engine.shape))
    engine.generate(prompt, method)

What a query looks for in a long text lies in some dozens of places, however long the text is: so a
fixed number loses less than a share of what is seen that reads as much, and the time that a token
takes does not grow with the text. Which blocks of 16 entries these are each query decides for
itself, by an estimate of what it would pay them (see `blocks`); the first and the nearest are among
them in any case. How many, may depend on the KV head: a *profile*, as a NAMM has one for the memory
that heads need, says which of them look far back. Nothing is forgotten, so that whatever a later
question asks for is still there.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.plan import BLOCK, Author, IntArray, Method, Rows, StandIns, resting_rows
from vesicle.plan.spread import LEAST, UNIT
from vesicle.plan.windows import visible_blocks
from vesicle.shapes import ModelShape, Spread

if TYPE_CHECKING:
    import torch

Array = NDArray[np.floating]
LEAST_TOKENS = LEAST * BLOCK
"""Entries that a query reads at least."""
_NEAREST = 6
"""Blocks up to its own that a query reads before it chooses others."""
_TEMPER, _LOW, _HIGH = 0.5, 0.5, 8.0
"""How far a profile is followed (it is of memory, which heads need more unequally), and the bounds
of what a head reads, as multiples of the mean."""


class Reading(Method):
    """Reads a number of entries, in prompts and while writing; all else is at rest."""

    def __init__(
        self,
        entries: int,
        shape: ModelShape,
        *,
        profile: Array | None = None,
        summary: str = "mean",
    ) -> None:
        """Read so many of the entries that a query sees, in layers that see all of a text.

        Args:
            entries: Of a KV head, on average over layers and heads, in whole blocks of 16; 128 and
                above. Where a query sees no more, it reads them all.
            shape: Of the model.
            profile: (L, G) the logarithm of each head's part; alike by default.
            summary: What blocks are chosen by, `mean` or `bounds`.

        Raises:
            VesicleError: If `entries` is below 128, or the profile of another shape.
        """
        if isinstance(entries, bool) or not isinstance(entries, int) or entries < LEAST_TOKENS:
            raise VesicleError(f"entries is {entries}; allowed: {LEAST_TOKENS} and above")
        size = shape.n_layers, shape.n_kv_heads
        profile = np.zeros(size) if profile is None else profile
        if profile.shape != size or not np.isfinite(profile).all():
            raise VesicleError(
                f"a profile of shape {profile.shape} is given; allowed: finite numbers, {size}"
            )
        self.entries, self.summary = entries, summary
        full = shape.layer_windows == 0
        self._blocks = blocks_for(-(-entries // BLOCK), profile, full)  # (L, G)
        self._full = full

    @property
    def layer_blocks(self) -> IntArray:
        """(L,) blocks that a layer's KV heads read on average; 0 in windowed layers for all."""
        return np.where(self._full, np.ceil(self._blocks.mean(1)), 0).astype(np.int32)

    @property
    def most(self) -> IntArray:
        """(L,) the same as a bound, which no windowed layer reaches."""
        return np.where(self._full, self.layer_blocks, np.iinfo(np.int32).max).astype(np.int32)

    @property
    def spread(self) -> Spread:
        """L rows of G numbers; see `plan.spread`."""
        means = np.where(self._full, self.layer_blocks, 1)[:, None]
        parts = np.where(self._full[:, None], np.rint(self._blocks / means * UNIT), UNIT)
        return tuple(tuple(row) for row in parts.astype(int).tolist())

    @property
    def stand_ins(self) -> StandIns:
        """None but how blocks are summarised, and dealt out to KV heads."""
        return StandIns(summary=self.summary, spread=self.spread, nearest=_NEAREST)

    def author(self, shape: ModelShape) -> Author:
        """An author whose rows depend on nothing but positions."""
        return _ReadingAuthor(self, shape)


def blocks_for(mean: int, profile: Array, sees_all: NDArray[np.bool_]) -> Array:
    """(L, G) blocks that each KV head reads, `mean` on average over the layers that see all.

    Args:
        mean: Of them.
        profile: (L, G) the logarithm of each head's part; its root is taken.
        sees_all: (L,) the layers whose heads share them; 0 in the others.
    """
    found = np.zeros(profile.shape)
    if not sees_all.any():
        return found
    parts = np.exp(_TEMPER * (profile[sees_all] - profile[sees_all].max()))  # the largest is 1
    parts = np.maximum(parts, 1e-9)
    bounds = _LOW * mean, _HIGH * mean
    low, high = 0.0, bounds[1] / parts.min()
    for _ in range(100):
        middle = (low + high) / 2
        inside = np.clip(middle * parts, *bounds).mean() <= mean
        low, high = (middle, high) if inside else (low, middle)
    found[sees_all] = np.clip(low * parts, *bounds)
    return found


class _ReadingAuthor(Author):
    bounded = True  # never more than is visible, nor less than may be

    def __init__(self, method: Reading, shape: ModelShape) -> None:
        self._layers, self._shape = method.layer_blocks, shape

    def _blocks(self, positions: IntArray) -> IntArray:
        """(T, L) blocks to read."""
        visible = visible_blocks(positions[:, None], self._shape.layer_windows)
        return np.where(self._layers > 0, np.minimum(self._layers, visible), visible)

    def planned(self, positions: IntArray) -> Rows:
        rows = resting_rows(self._shape, positions)
        rows["kv_blocks"] = self._blocks(positions)
        return rows

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        rows["kv_blocks"] = self._blocks(positions)[:, layer]

    def ffn(self, layer: int, hidden: torch.Tensor, positions: IntArray, rows: Rows) -> None:
        return None

    def fork(self, n_tokens: int) -> Author:
        return copy.copy(self)
