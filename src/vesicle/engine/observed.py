"""Queries of a sequence's newest tokens, and what attention they pay when its forgetter is asked.

The native core and `torch_pass` keep them as passes run, and no attention matrix: scores are worked
out anew where somebody asks.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.engine.cache import SequenceCache
from vesicle.plan import BLOCK, IntArray
from vesicle.shapes import ModelShape


class Observed:
    """The newest queries of one sequence, in the layers that have no window.

    A pass that is broken off leaves queries behind, and nothing has to be undone. All positions up
    to the next asking are read again before it, so the place of each of those queries is by then
    that of a token that was read later: it is overwritten, or its token skips attention and it is
    not looked at.

    Attributes:
        queries: (L, w, H, K) fp32, rotated and not scaled, at their positions modulo w.
        entries: (L, w) the entries, of all KV heads, against which each query was scored when it
            was asked about last, in order of position.
    """

    def __init__(self, shape: ModelShape, n_queries: int) -> None:
        """Room for the newest `n_queries`."""
        size = (shape.n_layers, n_queries)
        self.queries = np.zeros((*size, shape.n_heads, shape.head_size), np.float32)
        self.entries = np.zeros(size, np.int64)

    def keep(self, layer: int, positions: IntArray, queries: Tensor) -> None:
        """Keep the newest of queries (T, H, K) at positions (T,), rising."""
        w = self.queries.shape[1]
        newest = positions > positions[-1] - w
        self.queries[layer, positions[newest] % w] = queries[torch.from_numpy(newest)].float()

    def attention(
        self, cache: SequenceCache, layer: int, runs: NDArray[np.bool_], scale: float
    ) -> list[NDArray[np.float32]]:
        """For each KV head (w, n) as `Evidence` has it, of the queries before the cache's length.

        Args:
            cache: Of the sequence.
            layer: Whose entries and queries.
            runs: (w,) which of the queries ran, in order of position.
            scale: Of the attention logits.
        """
        held, w = cache.held(layer), self.queries.shape[1]
        rows = np.nonzero(runs)[0]
        positions = cache.length - w + rows
        queries = torch.from_numpy(self.queries[layer, positions % w])
        queries = queries.unflatten(1, (len(held), -1)) * scale
        self.entries[layer], found = 0, []
        for head, entries in enumerate(held):  # scores of one at a time lie in memory
            n = len(entries)
            blocks = cache.tables[layer, head, : -(-n // BLOCK)]
            keys = cache.pool.read_keys(blocks, torch.float32)[:n]
            # All but the newest w entries lie before all of the queries.
            later = torch.from_numpy(entries[-w:] > positions[:, None])  # (rows, w or n)
            scores = queries[:, head] @ keys.T  # (rows, R, n)
            scores[..., -w:].masked_fill_(later[:, None], -torch.inf)
            chances = np.zeros((w, n), np.float32)
            chances[rows] = scores.softmax(-1).mean(1)
            self.entries[layer, rows] += n - later.sum(1).numpy()
            found.append(chances)
        return found

    def fork(self) -> Observed:
        """The same queries, to go on by themselves."""
        fork = copy.copy(self)
        fork.queries, fork.entries = self.queries.copy(), self.entries.copy()
        return fork
