"""Rotary position embedding of queries and keys (Su et al., RoFormer, 2021), half-split layout."""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.families.base import Rotation
from vesicle.plan import IntArray


class Rotary:
    """Cosines and sines by position, made as far as they are needed."""

    def __init__(self, rotation: Rotation, dtype: torch.dtype) -> None:
        """For a decoder that computes in `dtype`."""
        self._frequencies = rotation.frequencies.float()
        self._scale = rotation.scale
        self._dtype = dtype
        self._size = 2 * len(self._frequencies)
        self._cos = torch.empty(0, 1, self._size, dtype=dtype)
        self._sin = self._cos

    def at(self, positions: IntArray) -> tuple[Tensor, Tensor]:
        """(N, 1, R) cosines and signed sines for positions (N,)."""
        self.reach(int(positions.max()) + 1)
        index = torch.from_numpy(positions).long()
        return self._cos[index], self._sin[index]

    def addresses(self, position: int) -> tuple[int, int]:
        """Of the cosines and signed sines (R,) of a position, until `reach` makes more of them."""
        self.reach(position + 1)
        offset = position * self._size * self._cos.element_size()
        return self._cos.data_ptr() + offset, self._sin.data_ptr() + offset

    def reach(self, end: int) -> None:
        """Have cosines and sines for positions below `end`; those there are may move."""
        if end > len(self._cos):
            end = max(end, 2 * len(self._cos), 256)
            angles = torch.arange(end).float()[:, None] * self._frequencies  # (P, R / 2)
            cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
            # x cos + rotate_half(x) sin, with rotate_half's sign folded into the first half of the
            # sine.
            self._cos = torch.cat([cos, cos], -1)[:, None].to(self._dtype)
            self._sin = torch.cat([-sin, sin], -1)[:, None].to(self._dtype)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the leading R dimensions of x (N, heads, K)."""
        cos, sin = rotation
        if self._size == x.shape[-1]:
            return x * cos + x.roll(self._size // 2, -1) * sin
        turned, rest = x[..., : self._size], x[..., self._size :]
        turned = turned * cos + turned.roll(self._size // 2, -1) * sin
        return torch.cat([turned, rest], -1)
