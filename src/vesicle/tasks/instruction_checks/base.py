"""Instruction: one verifiable wish about an answer; asked in words, drawn at random, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Parameters = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A kind of wish.

    Attributes:
        ask: The wish in words, with parameters in braces.
        kept: Whether an answer keeps it: a pure function of the answer and, as keywords, the
            parameters. An answer without any text keeps nothing; that is checked elsewhere.
        draw: Parameters as JSON can hold them.
        conflicts: Kinds that cannot be asked beside it, or not without quibbles; one direction is
            enough.
    """

    ask: str
    kept: Callable[..., bool]
    draw: Callable[[np.random.Generator], dict[str, Any]] = field(default=lambda rng: {})
    conflicts: frozenset[str] = frozenset()


def one_of(name: str, values: tuple[Any, ...]) -> Callable[[np.random.Generator], dict[str, Any]]:
    """A draw of one parameter among values."""
    return lambda rng: {name: values[int(rng.integers(len(values)))]}
