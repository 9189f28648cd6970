"""Attention that stored entries receive, summed as passes run, for those who decide what to forget.

One number for each slot of each KV head and layer; no attention matrix is kept. The native core and
`torch_pass` add to it, each query in order, so that sums do not depend on how a text is cut.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import BLOCK
from vesicle.shapes import ModelShape


class Received:
    """Sums of attention probability by slot (see `engine.cache`), of one sequence.

    Attributes:
        sums: (L, G, slots) fp32; the array is replaced as it grows.
    """

    def __init__(self, shape: ModelShape) -> None:
        """Nothing received, and no room."""
        self.sums: NDArray[np.float32] = np.zeros((shape.n_layers, shape.n_kv_heads, 0), np.float32)
        self._before: NDArray[np.float32] | None = None

    def begin(self, n_blocks: int) -> None:
        """Make room for the slots of a pass, and remember what was before it.

        Args:
            n_blocks: The most that any layer holds in the pass.
        """
        have = self.sums.shape[2]
        if n_blocks * BLOCK > have:
            more = max(n_blocks, 2 * have // BLOCK) * BLOCK - have
            self.sums = np.pad(self.sums, ((0, 0), (0, 0), (0, more)))
        self._before = self.sums[..., : n_blocks * BLOCK].copy()

    def undo(self) -> None:
        """Forget what the pass that was begun last has added."""
        if self._before is not None:
            self.sums[..., : self._before.shape[2]] = self._before
            self._before = None

    def clear(self) -> None:
        """Start from zero again: somebody has been told."""
        self.sums[:] = 0
        self._before = None

    def fork(self) -> Received:
        """The same sums, to go on by themselves."""
        fork = copy.copy(self)
        fork.sums, fork._before = self.sums.copy(), None
        return fork
