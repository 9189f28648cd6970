"""What the page holds of the cards: arrays as base64, and the texts that they number.

Numbers are little-endian, as browsers read them on every processor that they run on. Tokens and
places are kept as numbers of a table, in the smallest type that holds them.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vesicle.models import Text
from vesicle.neurons.cards import Cards
from vesicle.neurons.own_text import own_texts
from vesicle.terminal import visible

Numbers = NDArray[np.generic]

TYPES = {"<u2": "Uint16Array", "<u4": "Uint32Array", "<f4": "Float32Array"}
"""What JavaScript calls them."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a page holds.

    Attributes:
        arrays: By name. `ids` (L, P, F, 2, k) number the rows of `vocabulary`; `scores` (L, P, F,
            2); `high`, `low` (L, F, C) activations and `high_places`, `low_places` (L, F, C) where
            they stand in `text`, (N T,), which numbers `strings`; `mean`, `deviation`, `share`
            (L, F); `drive`, `size` (R, L, F); `vocabulary` (n,) token ids.
        tokens: (n,) texts of those.
        strings: The texts that tokens of the text stand for.
    """

    arrays: dict[str, Numbers]
    tokens: list[str]
    strings: list[str]


def held(cards: Cards, text: Text) -> Held:
    """Gather it.

    Args:
        cards: A model's.
        text: Its tokens.
    """
    decoded, contexts, drives = cards.decoded, cards.contexts, cards.drives
    vocabulary, ids = np.unique(decoded.ids.numpy(), return_inverse=True)
    strings, places = _numbered(contexts.tokens, text)
    length = contexts.tokens.shape[1]
    shape = (len(drives.size), *cards.shape)
    return Held(
        arrays={
            "vocabulary": _whole(vocabulary),
            "ids": _whole(ids.reshape(decoded.ids.shape)),
            "scores": _real(decoded.scores),
            "text": _whole(places),
            "high": _real(contexts.activations),
            "high_places": _flat(contexts.places, length, len(places)),
            "low": _real(contexts.low_activations),
            "low_places": _flat(contexts.low_places, length, len(places)),
            "mean": _real(contexts.mean),
            "deviation": _real(cards.deviation),
            "share": _real(cards.share_above_half),
            "drive": _stacked(drives.drive, shape),
            "size": _stacked(drives.size, shape),
        },
        tokens=[visible(piece) for piece in text.pieces(vocabulary.tolist())],
        strings=strings,
    )


def packed(array: Numbers) -> tuple[str, str]:
    """JavaScript's name of an array's type, and its numbers in base64."""
    return TYPES[array.dtype.newbyteorder("<").str], base64.b64encode(array.tobytes()).decode()


def _numbered(windows: Tensor, text: Text) -> tuple[list[str], NDArray[np.int64]]:
    """Different texts of tokens, and (N T,) which one each token of windows stands for."""
    table = dict[str, int]()
    numbers = [
        table.setdefault(own, len(table))
        for window in windows.tolist()
        for own in own_texts(window, text)
    ]
    return list(table), np.array(numbers, np.int64)


def _whole(numbers: NDArray[np.integer], most: int | None = None) -> Numbers:
    """Whole numbers in the smallest type that holds them and `most`."""
    top = max(int(numbers.max()), 0 if most is None else most)
    return np.ascontiguousarray(numbers, "<u2" if top < 1 << 16 else "<u4")


def _flat(places: Tensor, length: int, count: int) -> Numbers:
    """Windows and tokens (..., 2) as tokens of all windows one after the other."""
    pairs = places.numpy().astype(np.int64)
    return _whole(pairs[..., 0] * length + pairs[..., 1], count - 1)


def _real(values: Tensor) -> Numbers:
    return np.ascontiguousarray(values.float().numpy(), "<f4")


def _stacked(by_name: dict[str, Tensor], shape: tuple[int, ...]) -> Numbers:
    rows = [value.float().numpy() for value in by_name.values()]
    return np.ascontiguousarray(np.stack(rows) if rows else np.zeros(shape), "<f4")
