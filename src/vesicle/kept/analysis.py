"""Reads a text under a method that forgets, and sums up which entries are held.

T tokens, F layers that forget (windowed ones are left out: they hold their window), G KV heads, N
times at which the method was asked.

Entries that stay whatever a method thinks of them are those that it always keeps (of a NAMM the
first 4 and the newest 64) and those since it was asked last. Shares of classes leave them out: else
a class would seem to be kept for standing at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.eviction import Forgetful, HeavyHitters
from vesicle.kept.classes import CLASSES
from vesicle.namm import NammMemory

if TYPE_CHECKING:
    from vesicle.engine import Engine

PARTS = 10
"""Equal parts of a text, by which age is told."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What is held of a text at its end.

    Attributes:
        held: (F, G, T) bool, whether a KV head holds a token's entry.
        layers: (F,) numbers of the layers.
        always: (T,) bool, tokens whose entries stay whatever the method thinks of them.
        asked: (N,) lengths at which the method was asked, rising.
        over_time: (N,) the mean share of entries that were held then.
    """

    held: NDArray[np.bool_]
    layers: list[int]
    always: NDArray[np.bool_]
    asked: list[int]
    over_time: list[float]

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.held.shape[2]

    @property
    def entries(self) -> NDArray[np.int64]:
        """(F, G) entries that each KV head holds."""
        return self.held.sum(2)

    @property
    def by_token(self) -> NDArray[np.float64]:
        """(T,) share of the KV heads that hold a token's entry."""
        return self.held.mean((0, 1))

    @property
    def share(self) -> float:
        """Of all entries that are held."""
        return float(self.held.mean())

    @property
    def by_age(self) -> list[tuple[int, int, float]]:
        """The first token of each tenth of the text, the one after its last, and the mean share."""
        shares = self.by_token
        return [(a, b, float(shares[a:b].mean())) for a, b in tenths(self.n_tokens)]


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """What is kept of a class of tokens, those left out that stay in any case.

    Attributes:
        name: Of the class.
        tokens: How many there are.
        share: Mean share of KV heads that hold one's entry.
        to_mean: That share over the mean of all classes; None where nothing is held.
        to_age: The same over the mean of their tenths of the text: what is left of it when tokens
            are compared with others as old.
    """

    name: str
    tokens: int
    share: float
    to_mean: float | None
    to_age: float | None


def read(
    engine: Engine,
    method: Forgetful,
    ids: Sequence[int],
    show: Callable[[int], None] = lambda length: None,
) -> Kept:
    """Read a text under a method, and note at each length at which it is asked what is held.

    Args:
        engine: The model.
        method: Forgets.
        ids: (T,) tokens.
        show: Told how many were read.

    Raises:
        VesicleError: The method is never asked, so short is the text; or no layer forgets.
    """
    n, interval = len(ids), method.interval
    check_length(n, interval)
    layers = np.nonzero(engine.shape.layer_windows == 0)[0].tolist()
    if not layers:
        raise VesicleError("every layer of this model has a sliding window; none forgets")
    sequence = engine.start(method)
    try:
        sequence.begin_prompt(n, scored=False)
        over_time = list[float]()
        for begin in range(0, n, interval):
            engine.forward([(sequence, list(ids[begin : begin + interval]))], "none")
            show(sequence.length)
            if sequence.length % interval == 0:
                counts = [len(head) for layer in layers for head in sequence.cache.held(layer)]
                over_time.append(float(np.mean(counts)) / sequence.length)
        held = np.zeros((len(layers), engine.shape.n_kv_heads, n), bool)
        for rows, layer in zip(held, layers, strict=True):
            for row, positions in zip(rows, sequence.cache.held(layer), strict=True):
                row[positions] = True
    finally:
        sequence.close()
    asked = list(range(interval, n + 1, interval))
    return Kept(
        held=held,
        layers=layers,
        always=always_held(method, n, asked[-1]),
        asked=asked,
        over_time=over_time,
    )


def check_length(n_tokens: int, interval: int) -> None:
    """Refuse a text in which nothing is forgotten.

    Raises:
        VesicleError: Naming its length and the one that is needed.
    """
    if n_tokens < interval:
        raise VesicleError(
            f"the text has {n_tokens} tokens, and the first are forgotten after {interval}: give a "
            "longer one"
        )


def always_held(method: Forgetful, n_tokens: int, asked_last: int) -> NDArray[np.bool_]:
    """(T,) tokens whose entries stay whatever a method thinks of them."""
    positions = np.arange(n_tokens, dtype=np.int32)
    stays = positions >= asked_last
    if isinstance(method, NammMemory):
        stays |= method.protected(positions, asked_last)
    elif isinstance(method, HeavyHitters):
        stays |= positions >= asked_last - method.recent
    return stays


def sees_entries(method: Forgetful) -> bool:
    """Whether what a method keeps depends on more than where a token stands."""
    return not isinstance(method, NammMemory) or method.namm.sees_entries


def by_class(kept: Kept, classes: Sequence[str]) -> list[ClassShare]:
    """What is kept of each class that is there.

    Args:
        kept: Of a text.
        classes: (T,) of its tokens.
    """
    counted, shares = ~kept.always, kept.by_token
    if not counted.any():
        return []
    mean = float(shares[counted].mean())
    alike = np.zeros(kept.n_tokens)
    for first, stop in tenths(kept.n_tokens):
        if counted[first:stop].any():
            alike[first:stop] = shares[first:stop][counted[first:stop]].mean()
    names, found = np.array(classes), list[ClassShare]()
    for name in CLASSES:
        mine = counted & (names == name)
        if not mine.any():
            continue
        share, expected = float(shares[mine].mean()), float(alike[mine].mean())
        found.append(
            ClassShare(
                name=name,
                tokens=int(mine.sum()),
                share=share,
                to_mean=share / mean if mean else None,
                to_age=share / expected if expected else None,
            )
        )
    return found


def tenths(n_tokens: int) -> list[tuple[int, int]]:
    """Where equal parts of a text begin and end; fewer than ten only if it has fewer tokens."""
    edges = [round(n_tokens * i / PARTS) for i in range(PARTS + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def to_dict(kept: Kept, classes: Sequence[str], ids: Sequence[int], pieces: Sequence[str]) -> Any:
    """All of it as JSON has it.

    Args:
        kept: Of a text.
        classes: (T,) of its tokens.
        ids: (T,) the tokens.
        pieces: (T,) their text.
    """
    shares, entries = kept.by_token, kept.entries
    return {
        "share": kept.share,
        "share_when_asked_last": kept.over_time[-1],
        "asked_last": kept.asked[-1],
        "layers": [
            {
                "layer": layer,
                "share": float(row.mean()) / kept.n_tokens,
                "heads": [{"entries": n, "share": n / kept.n_tokens} for n in row.tolist()],
            }
            for layer, row in zip(kept.layers, entries, strict=True)
        ],
        "classes": [vars(row) for row in by_class(kept, classes)],
        "over_time": [
            {"length": length, "share": share}
            for length, share in zip(kept.asked, kept.over_time, strict=True)
        ],
        "by_age": [{"first": a, "stop": b, "share": share} for a, b, share in kept.by_age],
        "tokens": [
            {"id": i, "text": piece, "share": share, "class": name, "always": always}
            for i, piece, share, name, always in zip(
                ids, pieces, shares.tolist(), classes, kept.always.tolist(), strict=True
            )
        ],
    }
