"""The PlanBuilder: collects rows pass by pass."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vesicle.plan.events import FOREVER, Events, check_windows, forgetting, joined
from vesicle.plan.plan import Plan
from vesicle.plan.rows import ROW, IntArray, Rows, rest_head
from vesicle.shapes import ModelShape

_T = TypeVar("_T", bound=np.generic)


def opening(pieces: list[NDArray[_T]], n_rows: int) -> list[NDArray[_T]]:
    """Views of the first `n_rows` rows of arrays that follow one another."""
    views = []
    for piece in pieces:
        if n_rows <= 0:
            break
        views.append(piece[:n_rows])
        n_rows -= len(piece)
    return views


class PlanBuilder:
    """Collects the rows of one sequence into a Plan.

    An executor adds the table of each pass.
    """

    def __init__(self, shape: ModelShape, evict_after: IntArray | None = None) -> None:
        """Start with no tokens.

        Args:
            shape: Of the model.
            evict_after: As `Author.evict_after` tells.

        Raises:
            VesicleError: If an entry of a windowed layer is to be forgotten.
        """
        if evict_after is not None:
            check_windows((evict_after != FOREVER).any((0, 2)), shape)
        self._shape = shape
        self._evict_after = evict_after
        self._forgetting: Events | None = None
        self._forgotten: list[Events] = []
        self._passes: list[Rows] = []

    def add(self, rows: Rows) -> None:
        """Take the rows (T, L) of the next T tokens, which the executor may still fill in."""
        self._passes.append(rows)

    def forget(self, events: Events) -> None:
        """Take events that a forgetter has decided on."""
        self._forgotten.append(events)

    def opening(self, n_tokens: int) -> PlanBuilder:
        """A builder of its own that begins with the first `n_tokens` rows.

        The LM head is whole there: who takes a token over is not asked for its logits.
        """
        other = PlanBuilder(self._shape, self._evict_after)
        other._passes = [rows.copy() for rows in opening(self._passes, n_tokens)]
        for rows in other._passes:
            rest_head(rows)
        other._forgotten = [events[events["position"] <= n_tokens] for events in self._forgotten]
        return other

    def newest(self, n_tokens: int) -> Rows:
        """The rows (T, L) of the last `n_tokens`, or of all if there are fewer."""
        pieces = [np.zeros((0, self._shape.n_layers), ROW)]
        for rows in reversed(self._passes):
            if n_tokens <= 0:
                break
            pieces.append(rows[-n_tokens:])
            n_tokens -= len(rows)
        return np.concatenate(pieces[::-1])

    def build(self) -> Plan:
        """The Plan of all tokens added so far, with the entries that were forgotten."""
        none = np.zeros((0, self._shape.n_layers), ROW)
        rows = np.concatenate([none, *self._passes])
        return Plan(rows=rows, events=self._events(len(rows)))

    def _events(self, n_tokens: int) -> Events:
        if self._evict_after is None:
            return joined(self._forgotten)
        if n_tokens < len(self._evict_after):
            return forgetting(self._evict_after[:n_tokens])
        if self._forgetting is None:  # the same from here on
            self._forgetting = forgetting(self._evict_after)
        return self._forgetting
