"""What one pass of the engine touched, per token; kept apart from prices so that the two can disagree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FULL_BITS, IntArray
from vesicle.shapes import ModelShape, Overhead


class Counters:
    """Running totals (N,) of a pass over N tokens."""

    def __init__(self, shape: ModelShape, n_tokens: int) -> None:
        """All zero."""
        self._shape = shape
        self._linear = np.zeros(n_tokens, np.int64)
        self._eighths = np.zeros(n_tokens, np.int64)
        self._visited = np.zeros(n_tokens, np.int64)
        self._compared = np.zeros(n_tokens, np.int64)
        self._standin = np.zeros(n_tokens, np.int64)
        self._modulator_flops = np.zeros(n_tokens, np.int64)
        self._modulator_bytes = np.zeros(n_tokens, np.int64)
        self._heads = np.zeros(n_tokens, np.int64)

    def projection(
        self,
        site: int,
        layer: int,
        rows_read: IntArray,
        outputs: IntArray | int,
        bits: IntArray,
        tokens: IntArray | None = None,
    ) -> None:
        """Rows of a weight read at a site, each of `outputs` numbers of `bits` bits."""
        numbers = rows_read.astype(np.int64) * outputs
        eighths = numbers * np.where(bits == FULL_BITS, 8 * self._shape.weight_bytes, bits + 1)
        if tokens is None:
            self._linear += numbers
            self._eighths += eighths
        else:
            self._linear[tokens] += numbers
            self._eighths[tokens] += eighths

    def attention(
        self, layer: int, tokens: IntArray, visited: IntArray, compared: IntArray, vectors: int
    ) -> None:
        """Positions read by queries, and block summaries compared to choose them."""
        self._visited[tokens] += visited
        self._compared[tokens] += compared.astype(np.int64) * vectors

    def stand_in(self, tokens: IntArray, rank: int) -> None:
        """A stand-in of `rank` run for tokens."""
        self._standin[tokens] += rank

    def modulator(self, rows: slice, overhead: Overhead) -> None:
        """One layer's release."""
        self._modulator_flops[rows] += overhead.modulator_flops
        self._modulator_bytes[rows] += overhead.modulator_bytes

    def head(self, rows: slice) -> None:
        """The LM head run for rows."""
        self._heads[rows] += 1

    def totals(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """Fields of `cost.Cost` (but the bytes held) for a slice of tokens."""
        shape = self._shape
        head = self._heads[rows] * shape.width * shape.vocabulary
        standin = self._standin[rows] * 2 * shape.width
        return {
            "flops_linear": 2 * self._linear[rows],
            "flops_attention": 4 * shape.query_width * self._visited[rows],
            "flops_selection": 2 * shape.query_width * self._compared[rows],
            "flops_standin": 2 * standin,
            "flops_modulator": self._modulator_flops[rows],
            "flops_head": 2 * head,
            "weight_bytes": self._eighths[rows] // 8
            + (standin + head) * shape.weight_bytes
            + self._modulator_bytes[rows],
            "kv_bytes_read": shape.kv_width
            * shape.kv_bytes
            * (2 * self._visited[rows] + self._compared[rows]),
        }
