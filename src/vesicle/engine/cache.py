"""The key-value cache of one sequence.

One growing pair of tensors per layer, read in blocks of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.blocks import summarise
from vesicle.plan import BLOCK
from vesicle.shapes import ModelShape

_GROWTH = 256
"""Positions by which room grows at least.

Growth doubles, so that appending is linear on the whole.
"""


class LayerCache:
    """Keys and values (G, capacity, K) of one layer, of which `length` positions are filled.

    Summaries of complete blocks are kept as blocks complete, for the methods that choose among
    blocks.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        """Empty."""
        size = (shape.n_kv_heads, 0, shape.head_size)
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)
        self.length = 0
        self._summaries: Tensor | None = None  # (G, capacity, V, K)
        self._summarised = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys and values (G, T, K)."""
        end = self.length + keys.shape[1]
        self.grow(end)
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end

    def grow(self, end: int) -> None:
        """Make room for `end` positions."""
        if end > self.keys.shape[1]:
            room = max(_GROWTH, 2 * self.keys.shape[1], -(-end // BLOCK) * BLOCK)
            self.keys, self.values = (
                _grown(old, room, self.length) for old in (self.keys, self.values)
            )

    def summaries(self, summary: str) -> Tensor:
        """Summaries (G, N, V, K) of the N complete blocks."""
        complete = self.length // BLOCK
        if self._summaries is None or complete > self._summaries.shape[1]:
            room = max(16, 2 * complete)
            vectors = 1 if summary == "mean" else 2
            g, _, k = self.keys.shape
            grown = self.keys.new_empty(g, room, vectors, k)
            if self._summaries is not None:
                grown[:, : self._summarised] = self._summaries[:, : self._summarised]
            self._summaries = grown
        if complete > self._summarised:
            fresh = self.keys[:, self._summarised * BLOCK : complete * BLOCK]
            self._summaries[:, self._summarised : complete] = summarise(fresh, summary)
            self._summarised = complete
        return self._summaries[:, :complete]

    @property
    def bytes_held(self) -> int:
        """Bytes of the filled positions."""
        return 2 * self.keys.shape[0] * self.length * self.keys.shape[2] * self.keys.element_size()


def _grown(old: Tensor, room: int, length: int) -> Tensor:
    new = old.new_empty(old.shape[0], room, old.shape[2])
    new[:, :length] = old[:, :length]
    return new
