"""What one pass of the engine touched, per token.

Kept apart from prices so that the two can disagree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FULL_BITS, IntArray
from vesicle.shapes import ModelShape, Overhead

_ALL = slice(None)


class Counters:
    """Running totals (N,) of a pass over N tokens."""

    def __init__(self, shape: ModelShape, n_tokens: int) -> None:
        """All zero."""
        self._shape = shape
        # Written layer by layer and added up once per pass: decoding is too fast for sums as it
        # goes.
        sites = (shape.n_layers, 4, n_tokens)
        self._rows = np.zeros(sites, np.int64)
        self._outputs = np.zeros(sites, np.int64)
        self._bits = np.full(sites, FULL_BITS, np.int64)
        self._visited = np.zeros((shape.n_layers, n_tokens), np.int64)
        self._compared = np.zeros((shape.n_layers, n_tokens), np.int64)
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
        tokens: IntArray | slice = _ALL,
    ) -> None:
        """Rows of a weight read at a site, each of `outputs` numbers of `bits` bits."""
        self._rows[layer, site, tokens] = rows_read
        self._outputs[layer, site, tokens] = outputs
        self._bits[layer, site, tokens] = bits

    def attention(
        self, layer: int, tokens: IntArray, visited: IntArray, compared: IntArray, vectors: int
    ) -> None:
        """Positions read by queries, and block summaries compared to choose them."""
        self._visited[layer, tokens] = visited
        self._compared[layer, tokens] = compared.astype(np.int64) * vectors

    def expose(self, token: Any) -> None:
        """Let the native kernel write the counts of a pass of one token, by layer."""
        token.rows, token.outputs = self._rows.ctypes.data, self._outputs.ctypes.data
        token.visited, token.compared = self._visited.ctypes.data, self._compared.ctypes.data

    def released(self, overhead: Overhead, n_layers: int) -> None:
        """`modulator` for all layers of a pass of one token."""
        self._modulator_flops += n_layers * overhead.modulator_flops
        self._modulator_bytes += n_layers * overhead.modulator_bytes

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
        numbers = self._rows[..., rows] * self._outputs[..., rows]
        bits = self._bits[..., rows]
        eighths = numbers * np.where(bits == FULL_BITS, 8 * shape.weight_bytes, bits + 1)
        visited, compared = self._visited[:, rows].sum(0), self._compared[:, rows].sum(0)
        head = self._heads[rows] * shape.width * shape.vocabulary
        standin = self._standin[rows] * 2 * shape.width
        return {
            "flops_linear": 2 * numbers.sum((0, 1)),
            "flops_attention": 4 * shape.query_width * visited,
            "flops_selection": 2 * shape.query_width * compared,
            "flops_standin": 2 * standin,
            "flops_modulator": self._modulator_flops[rows],
            "flops_head": 2 * head,
            "weight_bytes": eighths.sum((0, 1)) // 8
            + (standin + head) * shape.weight_bytes
            + self._modulator_bytes[rows],
            "kv_bytes_read": shape.kv_width * shape.kv_bytes * (2 * visited + compared),
        }
