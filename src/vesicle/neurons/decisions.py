"""A method whose levels and decisions are edited before they act.

What the inner author releases is edited and decides again; what it decides is edited last. So a
clamped level costs and does what a released one would, and the Plan that is recorded is the one
that was executed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vesicle.effectors.rules import decide
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.modulator.author import ModulatorAuthor
from vesicle.neurons.edits import Edit
from vesicle.neurons.names import LEVELS, PLAN, split
from vesicle.plan import Author, FloatArray, IntArray, Method, Rows, StandIns, opening
from vesicle.plan.rows import BY_NAME, OF_HEAD
from vesicle.shapes import ModelShape, Overhead
from vesicle.transmitters import NAMES

_WITH_ATTENTION = {"channels": (0, 1), "bits": (0, 1), "attention": (0,), "kv_blocks": (0,)}
_WITH_FFN = {"channels": (2, 3), "bits": (2, 3), "ffn": (0,), **dict.fromkeys(OF_HEAD, (0,))}
"""Which numbers of a field are due when."""


class EditedMethod(Method):
    """Another method, with edits of its levels and decisions."""

    def __init__(self, inner: Method, edits: Sequence[Edit]) -> None:
        """Wrap a method.

        Args:
            inner: Who decides.
            edits: Checked, all of levels or of fields of a Plan.

        Raises:
            VesicleError: An edit of levels, and the method releases none.
        """
        self.inner, self.edits = inner, tuple(edits)
        levels = [edit.name for edit in edits if split(edit.name)[1] == LEVELS]
        if levels and not isinstance(inner, ModulatorMethod):
            raise VesicleError(f"{levels[0]} needs a modulator, and {type(inner).__name__} is none")

    @property
    def decider(self) -> Method:
        """The inner method's."""
        return self.inner.decider

    @property
    def stand_ins(self) -> StandIns:
        """The inner method's."""
        return self.inner.stand_ins

    def overhead(self, shape: ModelShape) -> Overhead:
        """The inner method's."""
        return self.inner.overhead(shape)

    def author(self, shape: ModelShape) -> EditedAuthor:
        """The inner method's author, edited."""
        return EditedAuthor(self.inner.author(shape), shape, self.edits)


class EditedAuthor(Author):
    """Writes what another author decides, after edits."""

    def __init__(self, inner: Author, shape: ModelShape, edits: Sequence[Edit]) -> None:
        """Wrap one sequence's author on a model of `shape`."""
        self.inner, self.shape, self._edits = inner, shape, tuple(edits)
        self.evict_after, self.forgetter = inner.evict_after, inner.forgetter
        self._of_levels: dict[int, list[Edit]] = {}
        self._of_fields: dict[int, list[tuple[str, Edit]]] = {}
        for edit in edits:
            layer, own = split(edit.name)
            assert layer is not None
            if own == LEVELS:
                self._of_levels.setdefault(layer, []).append(edit)
            else:
                self._of_fields.setdefault(layer, []).append((own.removeprefix(PLAN), edit))
        self._released: FloatArray | None = None
        self._edited: list[FloatArray] = []

    @property
    def levels(self) -> FloatArray | None:
        """Levels (T, L, 5) as they acted."""
        if self.inner.levels is None:
            return None
        none = np.ones((0, self.shape.n_layers, len(NAMES)))
        return np.concatenate([none, *self._edited])

    def prompt(self, start: int, stop: int) -> None:
        """Tell the inner author."""
        self.inner.prompt(start, stop)

    def releases(self, positions: IntArray) -> NDArray[np.bool_]:
        """The inner author's."""
        return self.inner.releases(positions)

    def acting(self, positions: IntArray) -> NDArray[np.bool_]:
        """The inner author's."""
        return self.inner.acting(positions)

    def fork(self, n_tokens: int) -> Author:
        """The inner author's fork, edited as this one is."""
        other = EditedAuthor(self.inner.fork(n_tokens), self.shape, self._edits)
        other._edited = opening(self._edited, n_tokens)
        return other

    def rewind(self, n_tokens: int) -> None:
        """Tell the inner author, and forget what was released since."""
        self.inner.rewind(n_tokens)
        self._edited = opening(self._edited, n_tokens)

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        """What the edited levels of the layer before decide, then edits of fields."""
        self.inner.attention(layer, positions, rows)
        if layer and self._released is not None and self._of_levels.get(layer - 1):
            self._decide(layer, positions, rows, next_layer=True)
        self._edit_fields(layer, positions, rows, attention=True)

    def ffn(self, layer: int, hidden: torch.Tensor, positions: IntArray, rows: Rows) -> None:
        """The same for the FFN; levels are released here."""
        self.inner.ffn(layer, hidden, positions, rows)
        levels = self.inner.levels
        if levels is not None:
            own = levels[-len(positions) :, layer].copy()
            for edit in self._of_levels.get(layer, ()):
                own = edit.apply(torch.from_numpy(own)[None], int(positions[0]))[0].numpy()
            if layer == 0:
                self._edited.append(np.ones((len(positions), self.shape.n_layers, len(NAMES))))
            self._edited[-1][:, layer] = self._released = np.clip(own, 0.0, 1.0)
            if self._of_levels.get(layer):
                self._decide(layer, positions, rows, next_layer=False)
        self._edit_fields(layer, positions, rows, attention=False)

    def _decide(self, layer: int, positions: IntArray, rows: Rows, *, next_layer: bool) -> None:
        assert isinstance(self.inner, ModulatorAuthor)
        assert self._released is not None
        decide(
            self.inner.rules,
            self._released,
            positions,
            rows,
            next_layer=next_layer,
            last_layer=layer == self.shape.n_layers - 1,
            window=int(self.shape.layer_windows[layer]),
        )
        if self.inner.most is not None:
            np.minimum(rows["kv_blocks"], self.inner.most[layer], out=rows["kv_blocks"])

    def _edit_fields(self, layer: int, positions: IntArray, rows: Rows, *, attention: bool) -> None:
        """Edit what is due before attention, or before the FFN."""
        for name, edit in self._of_fields.get(layer, ()):
            due = _WITH_ATTENTION.get(name, ()) if attention else _WITH_FFN.get(name, ())
            own = rows[name].reshape(len(positions), BY_NAME[name].width)
            new = edit.apply(torch.from_numpy(own.astype(float))[None], int(positions[0]))[0]
            for column in due:
                own[:, column] = new[:, column].round().numpy()
            rows[name] = own.reshape(rows[name].shape)
