"""Gates and a profile by repetition: what of a text is read while it is said once more, or goes on.

Whoever repeats a text needs all of it, and what attention an entry receives meanwhile at most says
how much it would be missed, whatever will be asked (KVzip, Kim et al. 2025, arXiv:2505.23416). The
tokens that come next need other entries, and newer ones: what these pay counts as well, and the
more of both. Gates learn to tell it from the entry's key, value and age alone (KVzap does from
hidden states, Jegou and Jeblick 2026), by ridge regression on its logarithm, and so need forward
passes only. The profile is what of each head is among the entries that receive most, all heads of
all layers taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vesicle.engine import Engine
from vesicle.errors import DataError
from vesicle.eviction import Forgetful
from vesicle.namm import Namm
from vesicle.namm.gates import gate_inputs, width_of
from vesicle.plan import BLOCK, Dense, Events, Evidence, Forgetter, all_but
from vesicle.shapes import ModelShape

REQUEST = "\n\nRepeat the previous context exactly:\n\n"
_INTERVAL = 64
LEAST_TOKENS = 3 * _INTERVAL
"""Of a context that is repeated."""
_MOST_TOKENS, _MOST_LATER = 1024, 768
"""Of a context that are repeated, and of what comes next: attention costs their square."""
_RIDGE = 1e-4
"""Of the inputs' own mean squares."""
_LEAST = 1e-6
"""Attention below which nothing is told apart."""


class _Watching(Forgetful):
    """Forgets nothing, and keeps what the first entries receive at most of later queries."""

    def __init__(self, n_entries: int, first_query: int, shape: ModelShape) -> None:
        super().__init__(interval=_INTERVAL)
        self.n_entries, self.first_query = n_entries, first_query
        self.most = np.zeros((shape.n_layers, shape.n_kv_heads, n_entries), np.float32)

    def forgetter(self, shape: ModelShape) -> Forgetter:
        return _Watcher(self)


class _Watcher(Forgetter):
    interval = observes = _INTERVAL

    def __init__(self, method: _Watching) -> None:
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
    """A NAMM whose gates and profile say what is needed to repeat contexts or to go on with them.

    Args:
        engine: Of the model.
        start: Whose network it has.
        contexts: Token ids of each: the first two thirds, up to 1,024, are repeated, and what comes
            next goes on for up to 768. Those below 192 tokens are left out.
        request: Token ids that ask for a repetition.
        memory: Shares of the cache that the profile is for; the mean of its logarithms is taken.
        wait: Takes a note of which context it is at.

    Raises:
        DataError: If no context has 192 tokens.
        VesicleError: If the model's context window cannot hold what is repeated twice.
    """
    shape = engine.shape
    layers = np.nonzero(shape.layer_windows == 0)[0].tolist()
    width = width_of(shape.head_size) + 1  # and the age
    size = shape.n_layers, shape.n_kv_heads
    squares, products = np.zeros((*size, width, width)), np.zeros((*size, width))
    shares = np.zeros((len(memory), *size))
    long = [list(ids) for ids in contexts if len(ids) >= LEAST_TOKENS]
    if not long:
        longest = max(map(len, contexts), default=0)
        raise DataError(
            f"contexts have {longest} tokens at most; to be repeated they need {LEAST_TOKENS}"
        )
    for n, ids in enumerate(long):
        wait(f"repeating context {n + 1} of {len(long)}")
        length = min(len(ids) * 2 // 3, _MOST_TOKENS) // BLOCK * BLOCK
        later = ids[length : length + _MOST_LATER]
        most, entries = _needed(engine, ids[:length], list(request), later, layers)
        # Whatever is newest stays anyway, and the repetition may end before it is asked for.
        told = np.log(most[..., : length - _INTERVAL] + _LEAST)
        for layer, inputs in zip(layers, entries, strict=True):
            rows = inputs[:, : length - _INTERVAL].astype(np.float64)  # (G, n, F)
            squares[layer] += rows.swapaxes(1, 2) @ rows
            products[layer] += np.einsum("gnf,gn->gf", rows, told[layer])
        for row, share in zip(shares, memory, strict=True):
            least = np.quantile(told[layers], 1 - share)
            row += (told >= least).mean(-1) / len(long)
    gates, ages = np.zeros((*size, width - 1), np.float32), np.zeros(size, np.float32)
    for layer in layers:
        for head in range(shape.n_kv_heads):
            ridge = squares[layer, head].copy()
            ridge[np.diag_indices(width - 1)] += _RIDGE * np.diag(ridge)[:-1] + 1e-9
            found = np.linalg.solve(ridge, products[layer, head])
            ages[layer, head], gates[layer, head] = found[0], found[1:]
    profile = np.log(np.maximum(shares, 1e-3)).mean(0).astype(np.float32)
    return replace(start, gates=gates, ages=ages, profile=profile)


def _needed(
    engine: Engine, ids: list[int], request: list[int], later: list[int], layers: list[int]
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """What entries (L, G, n) received at most, and what is known of them.

    Args:
        engine: Of the model.
        ids: (n,) a multiple of 16.
        request: Token ids between a text and its repetition.
        later: Token ids that go on after the text.
        layers: Those that forget.

    Returns:
        The first, and (G, n, 2 K + 2) of each layer: the logarithm of the age when all was read,
        and what gates see.
    """
    n = len(ids)
    text = engine.start(Dense())
    engine.forward([(text, ids)], "none")
    ages = np.log(np.arange(n, 0, -1, dtype=np.float32))
    entries = []
    for layer in layers:
        keys, values = (x.numpy() for x in text.newest_entries(layer, n))
        inputs = gate_inputs(keys, values)
        aged = np.broadcast_to(ages[:, None], (*inputs.shape[:2], 1))
        entries.append(np.concatenate([aged, inputs], axis=-1))
    most = np.zeros((engine.shape.n_layers, engine.shape.n_kv_heads, n), np.float32)
    try:
        for coming, first in (([*request, *ids], n + len(request)), (later, n)):
            if not coming:
                continue
            method = _Watching(n, first, engine.shape)
            fork = engine.fork(text, method=method)
            try:
                engine.forward([(fork, coming)], "none")
            finally:
                fork.close()
            most = np.maximum(most, method.most)
    finally:
        text.close()
    return most, entries
