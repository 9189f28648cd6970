"""Rotary position embedding of queries and keys (Su et al., RoFormer, 2021), half-split layout."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vesicle.engine.core import MOST_TOKENS
from vesicle.families.base import Rotation
from vesicle.plan import IntArray

STRIDE = MOST_TOKENS
"""Tables begin at multiples of it and reach over two, so that one holds those of any pass."""


@dataclass(eq=False)
class RotaryTable:
    """Cosines and signed sines (2 STRIDE, 1, R) of positions from `start` on."""

    start: int
    cos: Tensor
    sin: Tensor

    def addresses(self, position: int) -> tuple[int, int]:
        """Of the cosines and signed sines (R,) of a position and of those that follow it."""
        offset = (position - self.start) * self.cos.stride(0) * self.cos.element_size()
        return self.cos.data_ptr() + offset, self.sin.data_ptr() + offset


class Rotary:
    """Cosines and sines of the positions at hand.

    Those of a whole window would take more memory than the cache of a model with sliding windows:
    134 MB for Gemma 3's 32,768 positions. Tables live as long as somebody reads there.
    """

    def __init__(self, rotation: Rotation, dtype: torch.dtype) -> None:
        """For a decoder that computes in `dtype`."""
        self._frequencies = rotation.frequencies.float()
        self._scale = rotation.scale
        self._dtype = dtype
        self._size = 2 * len(self._frequencies)
        self._tables = WeakValueDictionary[int, RotaryTable]()

    def at(self, positions: IntArray) -> tuple[Tensor, Tensor]:
        """(N, 1, R) cosines and signed sines for positions (N,)."""
        return self._made(torch.from_numpy(positions))

    def table(self, position: int) -> RotaryTable:
        """The table that holds `STRIDE` positions from this one on, to be kept by the caller."""
        start = position // STRIDE * STRIDE
        table = self._tables.get(start)
        if table is None:
            table = RotaryTable(start, *self._made(torch.arange(start, start + 2 * STRIDE)))
            self._tables[start] = table
        return table

    def _made(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self._frequencies  # (N, R / 2)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        # x cos + rotate_half(x) sin, with rotate_half's sign folded into the first half of the
        # sine.
        return (
            torch.cat([cos, cos], -1)[:, None].to(self._dtype),
            torch.cat([-sin, sin], -1)[:, None].to(self._dtype),
        )

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the leading R dimensions of x (N, heads, K)."""
        cos, sin = rotation
        if self._size == x.shape[-1]:
            return x * cos + x.roll(self._size // 2, -1) * sin
        turned, rest = x[..., : self._size], x[..., self._size :]
        turned = turned * cos + turned.roll(self._size // 2, -1) * sin
        return torch.cat([turned, rest], -1)
