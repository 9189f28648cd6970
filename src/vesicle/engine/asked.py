"""The authors of a pass, asked layer by layer, and their answers checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.plan import Author, Dense, IntArray, Rows, check_rows, resting_rows
from vesicle.plan.rows import bounds, check_kept, of_attention
from vesicle.shapes import ModelShape


class Asked:
    """Has each of some authors write its rows.

    One that fails is at rest from then on, so that the others go on: nothing of another sequence
    depends on what it decides.

    Attributes:
        failed: What went wrong, by place in the pass.
        released: (T,) for each, where its predictor runs.
    """

    def __init__(
        self,
        shape: ModelShape,
        authors: list[Author],
        positions: list[IntArray],
        plans: list[Rows],
    ) -> None:
        """Of the authors of a pass, in order.

        Args:
            shape: Of the model.
            authors: One of each sequence.
            positions: (T,) of each sequence's tokens.
            plans: (T, L) of each sequence, at rest, to be written.
        """
        self._shape, self._authors = shape, list(authors)
        self._positions, self._plans = positions, plans
        self._limits: dict[int, tuple[IntArray, IntArray]] = {}  # of each one's numbers
        self.failed: dict[int, Exception] = {}
        self.released = [np.zeros(len(p), bool) for p in positions]
        for i in range(len(authors)):
            self._ask(i, 0, partial(self._releases, i))

    def attention(self, layer: int) -> None:
        """Have all decide the attention of a layer."""
        for i in range(len(self._authors)):
            self._ask(i, layer, partial(self._attention, i, layer))

    def ffn(self, layer: int, hidden: list[Tensor]) -> None:
        """Give each the residual stream (T, D) after a layer's attention, and have it decide."""
        for i, x in enumerate(hidden):
            self._ask(i, layer, partial(self._ffn, i, layer, x))

    def _ask(self, i: int, layer: int, question: Callable[[], None]) -> None:
        if i in self.failed:
            return
        try:
            question()
            if not self._authors[i].bounded:
                self._check(i, layer)
        except Exception as error:  # whatever an author of anyone's making may raise
            self.failed[i] = error
            self._authors[i] = Dense().author(self._shape)
            self._plans[i][:] = resting_rows(self._shape, self._positions[i])

    def _releases(self, i: int) -> None:
        released = np.asarray(self._authors[i].releases(self._positions[i]), bool)
        if released.shape != self._positions[i].shape:
            raise VesicleError(
                f"releases gives an array of {released.shape}; allowed: {self._positions[i].shape}"
            )
        self.released[i] = released

    def _attention(self, i: int, layer: int) -> None:
        self._authors[i].attention(layer, self._positions[i], self._plans[i][:, layer])

    def _ffn(self, i: int, layer: int, hidden: Tensor) -> None:
        author, rows = self._authors[i], self._plans[i][:, layer]
        before = None if author.bounded else of_attention(rows)
        author.ffn(layer, hidden, self._positions[i], rows)
        if before is not None:
            check_kept(rows, before, layer)

    def _check(self, i: int, layer: int) -> None:
        """Refuse rows of a layer that sequence i may not have."""
        if i not in self._limits:
            self._limits[i] = bounds(self._shape, self._positions[i])
        here = slice(None), slice(layer, layer + 1)
        low, high = (limit[here] for limit in self._limits[i])
        check_rows(
            self._plans[i][here], self._shape, self._positions[i], [layer], limits=(low, high)
        )
