"""Methods that decide nothing themselves: a Plan that is replayed, and the dense model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from vesicle.errors import VesicleError
from vesicle.plan.author import Author, Method, StandIns
from vesicle.plan.events import evict_after_of
from vesicle.plan.plan import Plan
from vesicle.plan.rows import IntArray, Rows, resting_rows
from vesicle.shapes import ModelShape

if TYPE_CHECKING:
    import torch


class Replay(Method):
    """Executes a saved Plan again; asking for a token beyond its end is an error."""

    def __init__(self, plan: Plan, stand_ins: StandIns | None = None) -> None:
        """Replay `plan` with the stand-ins of the method that wrote it."""
        self.plan = plan
        self._stand_ins = stand_ins or StandIns()

    @property
    def stand_ins(self) -> StandIns:
        """Those that were given; none by default."""
        return self._stand_ins

    def author(self, shape: ModelShape) -> Author:
        """An author that reads the Plan's rows by position."""
        self.plan.check(shape)
        return _ReplayAuthor(self.plan, shape)


class _ReplayAuthor(Author):
    bounded = True  # the whole Plan was checked

    def __init__(self, plan: Plan, shape: ModelShape) -> None:
        self._plan = plan
        if plan.forgets:
            size = (plan.n_tokens, plan.n_layers, shape.n_kv_heads)
            self.evict_after = np.broadcast_to(evict_after_of(plan.events, *size), size)

    def fork(self, n_tokens: int) -> Author:
        return copy.copy(self)

    def check(self, stop: int) -> None:
        if stop > self._plan.n_tokens:
            self._check(self._plan.n_tokens)

    def planned(self, positions: IntArray) -> Rows | None:
        if len(positions):
            self._check(int(positions[0]))
        rows: Rows = self._plan.rows[positions[positions < self._plan.n_tokens]]
        return rows

    def _check(self, position: int) -> None:
        if position >= self._plan.n_tokens:
            raise VesicleError(
                f"the plan covers {self._plan.n_tokens} tokens; token {position} was asked for"
            )

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        self._check(int(positions[-1]))
        rows[:] = self._plan.rows[positions, layer]

    def ffn(self, layer: int, hidden: torch.Tensor, positions: IntArray, rows: Rows) -> None:
        return None  # the whole row stands already


class Dense(Method):
    """Everything at rest, and nothing read or predicted: the dense model."""

    def author(self, shape: ModelShape) -> Author:
        """An author that always rests."""
        return _DenseAuthor(shape)


class _DenseAuthor(Author):
    bounded = True

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    @property
    def rests(self) -> bool:
        return True

    def fork(self, n_tokens: int) -> Author:
        return copy.copy(self)

    def planned(self, positions: IntArray) -> Rows | None:
        return resting_rows(self._shape, positions)

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        return None

    def ffn(self, layer: int, hidden: torch.Tensor, positions: IntArray, rows: Rows) -> None:
        return None
