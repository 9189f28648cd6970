"""Longformer (Beltagy et al. 2020): a window of the newest positions, and a few global ones.

Causal, so that the global positions are the first of the text, which all later ones read. Windows
are not dilated.
"""

from __future__ import annotations

from torch import Tensor

from vesicle.scratch.patterns.base import Masked, asking, places


class Sliding(Masked):
    """The newest positions, and the first."""

    kind = "longformer"

    def __init__(self, window: int, n_global: int = 16) -> None:
        """The pattern.

        Args:
            window: Newest positions, the query's own among them.
            n_global: First positions.
        """
        super().__init__()
        self.window, self.n_global = window, n_global

    def seen(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """(T, S)."""
        place = places(key)
        return (place > asking(query, key)[:, None] - self.window) | (place < self.n_global)
