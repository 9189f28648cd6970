"""What one pass of the engine touched, per token.

Kept apart from prices so that the two can disagree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import FULL_BITS, IntArray
from vesicle.shapes import ModelShape, Overhead

_ALL = slice(None)


def rescored(shape: ModelShape, entries: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Fields of `cost.Cost` for scores of `entries` (T,) of KV heads that are worked out again."""
    return {
        "flops_evidence": 2 * shape.queries_of_a_head * entries,
        "kv_bytes_read": shape.entry_bytes // 2 * entries,
    }


def reread(shape: ModelShape, entries: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Fields of `cost.Cost` for keys and values of `entries` (T,) that are read again."""
    return {"kv_bytes_read": shape.entry_bytes * entries}


class Counters:
    """Running totals (N,) of a pass over N tokens."""

    def __init__(self, shape: ModelShape, n_tokens: int) -> None:
        """Start all counts of `n_tokens` tokens at zero."""
        self._shape = shape
        # Written layer by layer and added up once per pass: decoding is too fast for sums as it
        # goes.
        sites = (shape.n_layers, 4, n_tokens)
        self._rows = np.zeros(sites, np.int64)
        self._outputs = np.zeros(sites, np.int64)
        self._bits = np.full(sites, FULL_BITS, np.int64)
        self._visited = np.zeros((shape.n_layers, n_tokens), np.int64)
        self._compared = np.zeros((shape.n_layers, n_tokens), np.int64)
        self._summed = np.zeros((shape.n_layers, n_tokens), np.int64)
        self._small = np.zeros(n_tokens, np.int64)
        self._coded = np.zeros(n_tokens, np.int64)
        self._modulator_flops = np.zeros(n_tokens, np.int64)
        self._modulator_bytes = np.zeros(n_tokens, np.int64)
        self._head_flops = np.zeros(n_tokens, np.int64)
        self._head_bits = np.zeros(n_tokens, np.int64)

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
        """Entries read by queries, and block summaries compared to choose them; of all KV heads."""
        self._visited[layer, tokens] = visited
        self._compared[layer, tokens] = compared.astype(np.int64) * vectors

    def summed(self, layer: int, tokens: IntArray, positions: IntArray) -> None:
        """Entries, of all KV heads, to whose sums attention probability was added."""
        self._summed[layer, tokens] = positions

    def adopt(
        self,
        *,
        rows: NDArray[np.int64],
        outputs: NDArray[np.int64],
        bits: IntArray,
        visited: NDArray[np.int64],
        compared: NDArray[np.int64],
        summed: NDArray[np.int64],
        small: NDArray[np.int64],
        coded: NDArray[np.int64],
    ) -> None:
        """Take over what the native core counted, (N, L, 4), (N, L) or (N,)."""
        self._rows[:], self._outputs[:] = rows.transpose(1, 2, 0), outputs.transpose(1, 2, 0)
        self._bits[:] = bits.transpose(1, 2, 0)
        self._visited[:], self._compared[:], self._summed[:] = visited.T, compared.T, summed.T
        self._small[:], self._coded[:] = small, coded

    def released(self, overhead: Overhead, rows: slice, released: NDArray[np.bool_]) -> None:
        """A predictor run in all layers, at those of the tokens `rows` (T,) where it did."""
        layers = self._shape.n_layers
        self._modulator_flops[rows] += released * layers * overhead.modulator_flops
        self._modulator_bytes[rows] += released * layers * overhead.modulator_bytes

    def small_module(self, tokens: IntArray, weights: int, coded: bool) -> None:
        """A small module that reads that many weights, coded or not, run for tokens."""
        self._small[tokens] += weights
        self._coded[tokens] += weights * (coded and self._shape.stored_bits is not None)

    def head(
        self,
        rows: slice | NDArray[np.intp],
        overhead: Overhead,
        survivors: IntArray | int = 0,
        exact: IntArray | int = 0,
    ) -> None:
        """The LM head run for rows: whole; screened, with survivors; or previewed, with exact ones.

        Args:
            rows: Which of the tokens.
            overhead: Of their method.
            survivors: Of each, rows of the head that are read again after a screen.
            exact: Of each, rows of the head that are read after a preview.
        """
        none = np.zeros(len(self._head_flops[rows]), np.int64)
        flops, bits = self._shape.price_head(overhead, none + 1, none + survivors, none + exact)
        self._head_flops[rows] += flops
        self._head_bits[rows] += bits

    def totals(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """Fields of `cost.Cost` (but the bytes held) for a slice of tokens."""
        shape = self._shape
        numbers = self._rows[..., rows] * self._outputs[..., rows]
        charged = np.moveaxis(shape.charged_bits(np.moveaxis(self._bits[..., rows], -1, 0)), 0, -1)
        bits_read = (numbers * charged).sum((0, 1))
        bits_read += self._head_bits[rows]
        visited, compared, summed = (
            counted[:, rows].sum(0) for counted in (self._visited, self._compared, self._summed)
        )
        small, again = self._small[rows], rescored(shape, summed)
        return {
            "flops_linear": 2 * numbers.sum((0, 1)),
            "flops_attention": 4 * shape.queries_of_a_head * visited,
            "flops_selection": 2 * shape.queries_of_a_head * compared,
            "flops_evidence": again["flops_evidence"],
            "flops_standin": 2 * small,
            "flops_modulator": self._modulator_flops[rows],
            "flops_head": self._head_flops[rows],
            "weight_bytes": bits_read // 8
            + shape.small_module_bytes(small, self._coded[rows])
            + self._modulator_bytes[rows],
            "kv_bytes_read": shape.entry_bytes * visited
            + again["kv_bytes_read"]
            + shape.summary_vector_bytes * compared,
        }
