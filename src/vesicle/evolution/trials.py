"""Where candidates are tried on contexts: in this process, or in others that answer to the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vesicle.engine import Engine
from vesicle.evolution.contexts import Context
from vesicle.evolution.questions import Question
from vesicle.namm import Namm, NammSettings

FloatArray = NDArray[np.float64]


class Trials(Protocol):
    """Contexts that were read once, by the numbers of their questions."""

    def excess(self, which: Sequence[int], candidates: Sequence[Namm], memory: float) -> FloatArray:
        """(n, C) what candidates lose on contexts, see `Context.excess`."""
        ...

    def excess_without(self, which: Sequence[int], namm: Namm) -> FloatArray:
        """(n, L, G) what is lost where one KV head forgets, see `Context.excess_without`."""
        ...

    def close(self) -> None:
        """Free the caches."""
        ...


Read = Callable[
    [Sequence[Question], NammSettings | None, NDArray[np.float32], Callable[[str], None]], Trials
]
"""Reads questions' contexts, for NAMMs that look at `settings` and have gates; takes notes."""


class Here:
    """Contexts of this process, one after another."""

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[Question],
        settings: NammSettings | None,
        gates: NDArray[np.float32],
        wait: Callable[[str], None] = lambda note: None,
    ) -> None:
        """Read them, see `Context`; `wait` takes a note of each, and of what takes long later."""
        self._contexts: list[Context] = []
        self._wait = wait
        try:
            for n, question in enumerate(questions):
                wait(f"reading context {n + 1} of {len(questions)}")
                self._contexts.append(Context(engine, question, settings, gates))
        except BaseException:
            self.close()
            raise

    def excess(self, which: Sequence[int], candidates: Sequence[Namm], memory: float) -> FloatArray:
        """(n, C) what candidates lose on contexts."""
        return np.array([self._contexts[i].excess(candidates, memory) for i in which])

    def excess_without(self, which: Sequence[int], namm: Namm) -> FloatArray:
        """(n, L, G) what is lost where one KV head forgets."""
        found = []
        for n, i in enumerate(which):
            self._wait(f"each KV head alone, context {n + 1} of {len(which)}")
            found.append(self._contexts[i].excess_without(namm))
        return np.array(found)

    def close(self) -> None:
        """Free the caches."""
        for context in self._contexts:
            context.close()
