"""The author of a modulator: levels, layer by layer, and the decisions that follow from them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.effectors.rules import Rules, decide
from vesicle.errors import VesicleError
from vesicle.phases import EVERYWHERE, Spans
from vesicle.plan import Author, FloatArray, IntArray, Rows, opening, resting_rows
from vesicle.predictors import Predictor, State
from vesicle.shapes import ModelShape
from vesicle.transmitters import NAMES, index

if TYPE_CHECKING:
    from vesicle.modulator.method import ModulatorMethod
    from vesicle.modulator.modulator import Modulator

DECIMALS = 6
"""Released levels are rounded to this many.

One token and many are computed by other routes: rounding makes 0.25 the same level in both.
"""


class ModulatorAuthor(Author):
    """Writes one sequence's Plan from released levels; keeps the levels for reports.

    Attributes:
        most: (L,) KV blocks that a token reads at most, whatever its levels say; or None.
        state: What the predictor carries from token to token, by layer.
    """

    bounded = True  # rules clip, and effectors have checked their ladders

    def __init__(self, method: ModulatorMethod, shape: ModelShape) -> None:
        """Start a sequence of no tokens under `method`, on a model of `shape`."""
        self.modulator = method.modulator
        self.dial = method.dial
        self._rests = method.at_rest
        self.most = None if method.reading is None else method.reading.most
        self._shape = shape
        self._rules = self.modulator.rules(shape)
        self._columns = [index(name) for name in self.modulator.predictor.config.transmitters]
        phases = EVERYWHERE if method.counts_prompt else method.phases
        released = np.zeros(len(NAMES), bool)
        if not self._rests:
            released[self._columns] = True
        self._by_phase = phases.acting(np.array([False, True])) & released  # off and on a prompt
        self._prompts = Spans()
        self.state: State = {}
        self._released: FloatArray | None = None  # (T, 5) by the layer before, if anything acts
        self._levels: list[FloatArray] = []
        self._pass: tuple[int, State] | None = None  # where the newest began, and the state there

    @property
    def rests(self) -> bool:
        """Whether the dial is at rest, and all is read."""
        return self._rests and self.most is None

    def bound(self, rows: Rows) -> None:
        """Have rows (..., L) read no more KV blocks than may be."""
        if self.most is not None:
            np.minimum(rows["kv_blocks"], self.most, out=rows["kv_blocks"])

    @property
    def rules(self) -> Rules:
        """How levels become decisions on the model that the sequence is of."""
        return self._rules

    @property
    def reads_hidden(self) -> bool:
        """Whether levels depend on hidden states: not at rest, and not those of controls."""
        return not self._rests and isinstance(self.modulator.predictor, Predictor)

    @property
    def carries_state(self) -> bool:
        """Whether its predictor does."""
        return bool(self.state)

    def prompt(self, start: int, stop: int) -> None:
        """Transmitters rest on the tokens `start` to `stop` as far as `phases` says so."""
        self._prompts.add(start, stop)

    def fork(self, n_tokens: int) -> Author:
        """Levels, prompts and state as after `n_tokens`; state is known at the end alone."""
        read = sum(map(len, self._levels))
        if self.state and n_tokens != read:
            raise VesicleError(
                f"a {self.modulator.predictor.kind!r} predictor carries state from token to "
                f"token; fork after all {read} tokens, not after {n_tokens}"
            )
        other = copy.copy(self)
        other.state = {layer: carried.clone() for layer, carried in self.state.items()}
        other._levels = opening(self._levels, n_tokens)
        other._prompts = self._prompts.opening(n_tokens)
        other._released = other._pass = None
        return other

    def rewind(self, n_tokens: int) -> None:
        """Levels and state as before the pass that was broken off."""
        self._levels = opening(self._levels, n_tokens)
        if self._pass is not None and self._pass[0] == n_tokens:
            self.state = dict(self._pass[1])

    def acting(self, positions: IntArray) -> NDArray[np.bool_]:
        """(T, 5) which transmitters are released, and act, at `positions` (T,)."""
        return self._by_phase[self._prompts.contains(positions).astype(np.intp)]

    def releases(self, positions: IntArray) -> NDArray[np.bool_]:
        """Where any transmitter acts."""
        return np.logical_or.reduce(self.acting(positions), axis=1)

    def planned(self, positions: IntArray) -> Rows | None:
        """At rest and for controls everything; else the leading tokens on which nothing acts."""
        if not self.reads_hidden and not self._rests:
            rows = plan_rows(self.modulator, self._shape, self.foreseen(positions), positions)
        else:
            resting = ~self.releases(positions)
            n = len(resting) if resting.all() else int(resting.argmin())
            if not n and not self._rests:
                return None
            rows = resting_rows(self._shape, positions[:n])
        self.bound(rows)
        return rows

    def foreseen(self, positions: IntArray) -> FloatArray:
        """Levels (T, L, 5) of coming tokens that depend on no hidden state."""
        levels = np.ones((len(positions), self._shape.n_layers, len(NAMES)))
        acting = self.acting(positions)
        if acting.any():
            nothing = torch.zeros(1, len(positions), 0)
            places, dial = torch.from_numpy(positions)[None], torch.tensor([self.dial])
            for layer in range(self._shape.n_layers):
                released = self.modulator.predictor.release(layer, nothing, places, dial, {})
                levels[:, layer, self._columns] = released[0].double().numpy()
        return np.where(acting[:, None], levels.round(DECIMALS), 1.0)

    def adopt(self, levels: FloatArray) -> None:
        """Keep the levels (T, L, 5) of tokens for which an executor released them itself."""
        self._levels.append(levels)

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        """Decided by what the layer before released; the first layer rests."""
        if layer > 0 and self._released is not None:
            last = layer == self._shape.n_layers - 1
            decide(
                self._rules,
                self._released,
                positions,
                rows,
                next_layer=True,
                last_layer=last,
                window=int(self._shape.layer_windows[layer]),
            )
        if self.most is not None:
            np.minimum(rows["kv_blocks"], self.most[layer], out=rows["kv_blocks"])

    def ffn(self, layer: int, hidden: Tensor, positions: IntArray, rows: Rows) -> None:
        """Release levels for the tokens' hidden states (T, D) and decide."""
        n = len(positions)
        if layer == 0:
            self._pass = int(positions[0]), dict(self.state)
            self._levels.append(np.ones((n, self._shape.n_layers, len(NAMES))))
            self._acting = self.acting(positions)
        acting = self._acting
        governed = np.nonzero(acting.any(1))[0]
        self._released = None
        if not len(governed):
            return
        table = np.ones((n, len(NAMES)))
        table[governed[:, None], self._columns] = self._predict(
            layer,
            hidden if len(governed) == n else hidden[torch.from_numpy(governed)],
            positions[governed],
        )
        table = np.where(acting, table.round(DECIMALS), 1.0)
        if not np.isfinite(table).all():
            raise VesicleError(
                f"levels of layer {layer} are not finite at a position from {positions[0]} to "
                f"{positions[-1]}: the weights, the cache or the modulator are damaged"
            )
        self._levels[-1][:, layer] = self._released = table
        last = layer == self._shape.n_layers - 1
        decide(
            self._rules,
            table,
            positions,
            rows,
            next_layer=False,
            last_layer=last,
            window=int(self._shape.layer_windows[layer]),
        )

    def _predict(self, layer: int, hidden: Tensor, positions: IntArray) -> FloatArray:
        """The predictor's levels (T, A) for hidden states (T, D)."""
        predictor = self.modulator.predictor
        if len(positions) == 1 and hidden.device.type == "cpu":
            row = predictor.release_row(layer, hidden[0], int(positions[0]), self.dial, self.state)
            return np.asarray(row)[None]
        with torch.no_grad():
            released = predictor.release(
                layer,
                hidden[None],
                torch.from_numpy(positions)[None].to(hidden.device),
                torch.tensor([self.dial], device=hidden.device),
                self.state,
            )
        return released[0].double().cpu().numpy()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5) so far."""
        if not self._levels:
            return np.ones((0, self._shape.n_layers, len(NAMES)))
        return np.concatenate(self._levels)


def plan_rows(
    modulator: Modulator, shape: ModelShape, levels: FloatArray, positions: IntArray
) -> Rows:
    """Rows (T, L) of a Plan from levels (T, L, 5) of tokens at `positions` (T,).

    Levels released by layer l govern FFN l and attention l + 1; the first attention layer rests.
    The LM head is screened where dopamine allows it; executors do so only if nothing but the
    likeliest token is asked for.
    """
    rows, rules = resting_rows(shape, positions), modulator.rules(shape)
    for layer in range(shape.n_layers):
        last = layer == shape.n_layers - 1
        for released, next_layer in ((layer, False), (layer - 1, True)):
            if released >= 0:
                decide(
                    rules,
                    levels[:, released],
                    positions,
                    rows[:, layer],
                    next_layer=next_layer,
                    last_layer=last,
                    window=int(shape.layer_windows[layer]),
                )
    return rows
