"""What a query sees of the entries before it, in blocks of 16.

In a *windowed* layer (sliding-window attention) a query at position p sees the newest entries
alone: those from p - window + 1 to p, its own included. A window of 0 stands for all of them.
Where the window begins in the middle of a block, queries that read all they see read that block in
part; whoever chooses blocks chooses among those that it sees whole, and its own.

Every function takes positions and windows of any shapes that broadcast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = 16
"""Positions of a block."""


def first_seen(positions: NDArray[np.integer], windows: ArrayLike = 0) -> NDArray[np.int64]:
    """The first position that queries see."""
    size = np.asarray(windows)
    return np.where(size > 0, np.maximum(positions.astype(np.int64) - size + 1, 0), 0)


def visible_blocks(positions: NDArray[np.integer], windows: ArrayLike = 0) -> NDArray[np.int32]:
    """Blocks of which queries see at least a part, their own included."""
    own = positions // BLOCK
    return (own - first_seen(positions, windows) // BLOCK + 1).astype(np.int32)


def whole_blocks(positions: NDArray[np.integer], windows: ArrayLike = 0) -> NDArray[np.int64]:
    """Blocks before their own that queries see whole: those that they may choose among."""
    begins = -(-first_seen(positions, windows) // BLOCK)
    return np.maximum(positions // BLOCK - begins, 0)


def seen(positions: NDArray[np.integer], windows: ArrayLike = 0) -> NDArray[np.int64]:
    """Entries that queries see, their own included."""
    return positions - first_seen(positions, windows) + 1
