"""The rows of a text, one method at one budget on one set of windows each, by the hard reference.

Rows share what is dear: the levels of the learnt run, from which some controls are made, the
controls of a budget, which the oracle takes up, and the oracle's path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from vesicle.errors import BudgetError
from vesicle.evaluation import controls
from vesicle.evaluation.controls import Control
from vesicle.evaluation.language_modelling import Scores, Windows, evenly, model_shape, score
from vesicle.evaluation.ledger import Ledger
from vesicle.evaluation.methods import BESIDE_ORACLE, ORACLE
from vesicle.evaluation.oracle import Descent, Losses, oracle
from vesicle.evaluation.prompts import Codec
from vesicle.evaluation.row_store import RowStore
from vesicle.evaluation.text_config import EvalConfig
from vesicle.evaluation.text_results import Key, Row, paired_difference
from vesicle.evaluation.tuning import Tuned, tune_learnt
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import Method


class Subset:
    """A set of windows, with the ledger for their length."""

    def __init__(self, windows: Windows, model: nn.Module, modulator: Modulator) -> None:
        self.windows = windows
        self.ledger = Ledger(modulator, model_shape(model), windows.length)
        self.learnt: dict[float, Tuned | BudgetError] = {}
        self.controls: dict[float, dict[str, Control]] = {}


class TextRows:
    """Computes and stores the rows of one run, and keeps levels and controls that rows share."""

    def __init__(
        self,
        model: nn.Module,
        modulator: Modulator,
        windows: Windows,
        config: EvalConfig,
        codec: Codec,
        store: RowStore,
    ) -> None:
        self._model, self._modulator, self._config, self._store = model, modulator, config, store
        self.on_tokens: Callable[[int], None] = lambda n: None
        few = windows.ids[evenly(len(windows), config.oracle_windows), : config.oracle_length]
        self._subsets = {
            "all": Subset(windows, model, modulator),
            "oracle": Subset(Windows.of(few, codec, ""), model, modulator),
        }
        m = min(config.selection_windows, len(windows))
        self._selection: Tensor = windows.ids[:m, : config.selection_length]
        self._descents: list[Descent] = []

    def tokens(self, key: Key) -> int:
        """Tokens that a row is expected to run, for the progress bar; 0 for finished ones."""
        method, name, budget = key
        if key in self._store.done:
            return 0
        ids = self._subsets[name].windows.ids
        once = ids.numel()
        if method == "learnt" and budget < 1:
            return 2 * once + 3 * min(4, len(ids)) * ids.shape[1]
        if method == "best-of-n":
            return once + self._config.best_of * self._selection.numel()
        if method == ORACLE:
            config = self._modulator.predictor.config
            cells = config.n_layers * len(config.transmitters)
            budgets = [b for b in self._config.budgets if b < 1]
            whole = self._config.oracle.tokens(cells, ids.shape[1], budgets[-1])
            return once * 5 + len(ids) * whole // len(budgets)
        return once

    def finish(self, key: Key) -> None:
        """Compute a row, or find that it cannot be had, and store which."""
        start = time.perf_counter()
        try:
            scores, details = self._scores(key)
        except BudgetError as error:
            self._store.add_missing(key, str(error))
            return
        self._store.add(self._row(key, scores, details, time.perf_counter() - start))

    def _row(self, key: Key, scores: Scores, details: dict[str, Any], seconds: float) -> Row:
        method, name, budget = key
        windows = self._subsets[name].windows
        mean = scores.nats / (windows.length - 1)
        dense = self._store.row(("dense", name, 1.0))
        delta = paired_difference(
            mean, mean if dense is None else dense.window_nats, self._config.seed
        )
        return Row(
            method=method,
            subset=name,
            budget=budget,
            cost_share=scores.cost_share,
            loss_nats=float(mean.mean()),
            delta_nats=delta.mean,
            delta_se_nats=delta.standard_error,
            delta_low_nats=delta.low,
            delta_high_nats=delta.high,
            bits_per_byte=windows.bits_per_byte(scores.nats),
            n_windows=len(windows),
            n_tokens=windows.n_scored,
            seconds=round(seconds, 3),
            window_nats=mean.tolist(),
            details=details,
        )

    def _scores(self, key: Key) -> tuple[Scores, dict[str, Any]]:
        method, name, budget = key
        ids = self._subsets[name].windows.ids
        batch = self._config.batch
        if method == "dense":
            return score(self._model, ids, None, batch=batch, on_tokens=self.on_tokens), {}
        if method == "learnt":
            tuned = self._learnt(name, budget)
            return tuned.scores, {"dial": tuned.dial}
        built = self._control(method, name, budget)
        scores = score(self._model, ids, built.method, batch=batch, on_tokens=self.on_tokens)
        return scores, built.details

    def _learnt(self, name: str, budget: float) -> Tuned:
        """The learnt modulator at a budget; a finished row's dial is run again for its levels."""
        subset = self._subsets[name]
        if budget not in subset.learnt:
            # Levels are large, and rows come budget by budget.
            subset.learnt.clear()
            try:
                subset.learnt[budget] = self._tuned(subset, budget, ("learnt", name, budget))
            except BudgetError as error:
                subset.learnt[budget] = error
        found = subset.learnt[budget]
        if isinstance(found, BudgetError):
            raise found
        return found

    def _tuned(self, subset: Subset, budget: float, key: Key) -> Tuned:
        done = self._store.done.get(key)
        batch, ids = self._config.batch, subset.windows.ids
        if isinstance(done, dict):
            raise BudgetError(done["reason"])
        if done is None:
            return tune_learnt(
                self._model, self._modulator, ids, budget, batch=batch, on_tokens=self.on_tokens
            )
        dial = done.details["dial"]
        method = ModulatorMethod(self._modulator, dial)
        scores = score(
            self._model, ids, method, batch=batch, keep_levels=True, on_tokens=self.on_tokens
        )
        return Tuned(dial=dial, scores=scores)

    def _control(self, method: str, name: str, budget: float) -> Control:
        subset = self._subsets[name]
        if budget not in subset.controls:
            subset.controls.clear()
            subset.controls[budget] = {}
        built = subset.controls[budget]
        if method not in built:
            built[method] = self._build(method, name, budget)
        return built[method]

    def _build(self, method: str, name: str, budget: float) -> Control:
        if method == ORACLE:
            return self._oracle(budget)
        learnt = self._learnt(name, budget).scores.levels if method in controls.FROM_LEARNT else ()
        built = controls.control(
            method,
            self._subsets[name].ledger,
            budget,
            seed=self._config.seed,
            learnt=learnt,
            n=self._config.best_of,
            loss=self._selection_loss,
        )
        if method == "best-of-n":
            m, length = self._selection.shape
            built.details.update(selection_windows=m, selection_length=length)
        return built

    def _selection_loss(self, method: Method) -> float:
        """Of the windows on which `best-of-n` selects, in nats per token."""
        m, length = self._selection.shape
        scores = score(self._model, self._selection, method, batch=m, on_tokens=self.on_tokens)
        return float(scores.nats.sum() / (m * (length - 1)))

    def _oracle(self, budget: float) -> Control:
        subset = self._subsets["oracle"]
        others: list[Control] = []
        static = [m for m in BESIDE_ORACLE[1:] if m == "uniform" or m in self._config.methods]
        for method in static:
            with suppress(BudgetError):  # its own row says so
                others.append(self._control(method, "oracle", budget))
        if not self._descents:
            self._descents = [
                Descent(self._losses(window), subset.ledger, self._config.oracle)
                for window in subset.windows.ids
            ]
        return oracle(self._descents, subset.ledger, budget, others)

    def _losses(self, window: Tensor) -> Losses:
        """What the oracle asks of a window (T,), run a few times in one pass."""
        most = self._config.oracle.batch

        def losses(methods: Sequence[Method]) -> list[float]:
            found: list[float] = []
            for start in range(0, len(methods), most):
                part = methods[start : start + most]
                rows = window.expand(len(part), -1)
                scores = score(self._model, rows, part, batch=most, on_tokens=self._tick)
                found += (scores.nats / (len(window) - 1)).tolist()
            return found

        return losses

    def _tick(self, n: int) -> None:
        self.on_tokens(n)
