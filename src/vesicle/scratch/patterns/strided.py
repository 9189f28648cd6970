"""The fixed pattern of Sparse Transformers (Child et al. 2019).

A query reads its own block, and the last `columns` positions of each block before it. In the paper
heads may have patterns of their own; here all have both parts.
"""

from __future__ import annotations

from torch import Tensor

from vesicle.scratch.patterns.base import Masked, asking, places


class Strided(Masked):
    """The own block, and the ends of those before."""

    kind = "block-sparse"

    def __init__(self, block: int, columns: int) -> None:
        """The pattern.

        Args:
            block: Positions of a block.
            columns: Positions at the end of each that later queries read.
        """
        super().__init__()
        self.block, self.columns = block, columns

    def seen(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """(T, S)."""
        place = places(key)
        own = place // self.block == asking(query, key)[:, None] // self.block
        return own | (place % self.block >= self.block - self.columns)
