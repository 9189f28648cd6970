"""Gates and a profile by repetition: what of a text is read while it is said once more.

Whoever repeats a text needs all of it, and what attention an entry receives meanwhile at most says
how much it would be missed, whatever will be asked (KVzip, Kim et al. 2025, arXiv:2505.23416).
Gates learn to tell it from the entry's key and value alone (KVzap does from hidden states, Jegou
and Jeblick 2026), by ridge regression on its logarithm, and so need forward passes only. The
profile is what of each head is among the entries that receive most, all heads of all layers taken
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vesicle.engine import Engine
from vesicle.eviction import Forgetful
from vesicle.namm import Namm
from vesicle.namm.gates import gate_inputs, width_of
from vesicle.plan import BLOCK, Dense, Events, Evidence, Forgetter, all_but
from vesicle.shapes import ModelShape

REQUEST = "\n\nRepeat the previous context exactly:\n\n"
_INTERVAL = 64
_MOST_TOKENS = 1024
"""Of a context that are repeated: what attention costs grows with their square."""
_RIDGE = 1e-4
"""Of the inputs' own mean squares."""
_LEAST = 1e-6
"""Attention below which nothing is told apart."""


class _Repeating(Forgetful):
    """Forgets nothing, and keeps what the first entries receive at most of later queries."""

    def __init__(self, n_entries: int, first_query: int, shape: ModelShape) -> None:
        super().__init__(interval=_INTERVAL)
        self.n_entries, self.first_query = n_entries, first_query
        self.most = np.zeros((shape.n_layers, shape.n_kv_heads, n_entries), np.float32)

    def forgetter(self, shape: ModelShape) -> Forgetter:
        return _Repeater(self)


class _Repeater(Forgetter):
    interval = observes = _INTERVAL

    def __init__(self, method: _Repeating) -> None:
        self._method = method

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        method = self._method
        asks = np.arange(length - self.observes, length) >= method.first_query
        if asks.any():
            for most, paid in zip(method.most[layer], evidence.attention, strict=True):
                np.maximum(most, paid[asks, : method.n_entries].max(0), out=most)
        every = [np.ones(positions.shape, bool) for positions in evidence.positions]
        return all_but(layer, length, evidence.positions, every)


def by_repetition(
    engine: Engine,
    start: Namm,
    contexts: Sequence[Sequence[int]],
    request: Sequence[int],
    memory: Sequence[float],
    wait: Callable[[str], None] = lambda note: None,
) -> Namm:
    """A NAMM whose gates and profile say what is needed to repeat contexts.

    Args:
        engine: Of the model.
        start: Whose network it has.
        contexts: Token ids of each, of which the first 1,024 are repeated; those below 128 tokens
            are left out.
        request: Token ids that ask for a repetition.
        memory: Shares of the cache that the profile is for; the mean of its logarithms is taken.
        wait: Takes a note of which context it is at.

    Raises:
        VesicleError: If the model's context window cannot hold a context twice.
    """
    shape = engine.shape
    layers = np.nonzero(shape.layer_windows == 0)[0].tolist()
    width = width_of(shape.head_size)
    size = shape.n_layers, shape.n_kv_heads
    squares, products = np.zeros((*size, width, width)), np.zeros((*size, width))
    shares = np.zeros((len(memory), *size))
    long = [ids for ids in contexts if len(ids) >= 2 * _INTERVAL]
    for n, ids in enumerate(long):
        wait(f"repeating context {n + 1} of {len(long)}")
        length = min(len(ids), _MOST_TOKENS) // BLOCK * BLOCK
        most, entries = _repeated(engine, list(ids[:length]), list(request), layers)
        # Whatever is newest stays anyway, and the repetition may end before it is asked for.
        told = np.log(most[..., : length - _INTERVAL] + _LEAST)
        for layer, inputs in zip(layers, entries, strict=True):
            rows = inputs[:, : length - _INTERVAL].astype(np.float64)  # (G, n, F)
            squares[layer] += rows.swapaxes(1, 2) @ rows
            products[layer] += np.einsum("gnf,gn->gf", rows, told[layer])
        for row, share in zip(shares, memory, strict=True):
            least = np.quantile(told[layers], 1 - share)
            row += (told >= least).mean(-1) / len(long)
    gates = np.zeros((*size, width), np.float32)
    for layer in layers:
        for head in range(shape.n_kv_heads):
            ridge = squares[layer, head].copy()
            ridge[np.diag_indices(width - 1)] += _RIDGE * np.diag(ridge)[:-1] + 1e-9
            gates[layer, head] = np.linalg.solve(ridge, products[layer, head])
    profile = np.log(np.maximum(shares, 1e-3)).mean(0).astype(np.float32)
    return replace(start, gates=gates, profile=profile)


def _repeated(
    engine: Engine, ids: list[int], request: list[int], layers: list[int]
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """What entries (L, G, n) received at most, and (G, n, 2 K + 1) of each layer's what gates see.

    Args:
        engine: Of the model.
        ids: (n,) a multiple of 16.
        request: Token ids between a text and its repetition.
        layers: Those that forget.
    """
    text = engine.start(Dense())
    engine.forward([(text, ids)], "none")
    entries = []
    for layer in layers:
        keys, values = (x.numpy() for x in text.newest_entries(layer, len(ids)))
        entries.append(gate_inputs(keys, values))
    method = _Repeating(len(ids), len(ids) + len(request), engine.shape)
    again = engine.fork(text, method=method)
    try:
        engine.forward([(again, [*request, *ids])], "none")
    finally:
        text.close()
        again.close()
    return method.most, entries
