"""Whether it matters what is released where: the trained whole beside levels that no one learnt.

The decoder stays the one that was trained with its modulator; only the levels are others, at the
cost that the learnt ones executed on the same task. Beside the rivals of
`evaluation.methods.controls` stand

- *swapped*: each transmitter takes the next one's levels;
- *inverted*: deficits are mirrored at their layer's mean, so that what had more has less;
- *oracle*: a table for each text, found greedily with that text's own labels, at what the learnt
  levels cost on that text; on some texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vesicle.errors import BudgetError
from vesicle.evaluation.methods.controls import (
    Control,
    best_of_n,
    from_deficits,
    per_layer,
    random,
    shuffled,
    uniform,
)
from vesicle.evaluation.methods.descent import Descent, OracleConfig
from vesicle.evaluation.methods.matching import match
from vesicle.plan import FloatArray, Method
from vesicle.studies.neuro.judging import dial_for, executed
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.tables import WHOLE
from vesicle.studies.neuro.variants import variants

if TYPE_CHECKING:
    from torch import Tensor

    from vesicle.studies.neuro.subject import Subject

ORACLE = "oracle"


def judge_controls(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Losses of the whole under other levels, at each budget, by task and text; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    whole = variants()[WHOLE]
    subject, points = run.trained(whole), run.points(whole)
    rows = list[dict[str, Any]]()
    for budget in run.size.budgets:
        dial = dial_for(run, subject, points, budget)
        if dial is None:
            continue
        for task, ids, scored in run.judged("test"):
            judged = _Judged(run, subject, task, ids, scored, budget, dial)
            rows += judged.rows()
    return {"rows": rows}


class _Judged:
    """The test texts of one task, at one budget."""

    def __init__(
        self,
        run: Run,
        subject: Subject,
        task: str,
        ids: Tensor,
        scored: Tensor,
        budget: float,
        dial: float,
    ) -> None:
        self.run, self.subject, self.task, self.budget = run, subject, task, budget
        self.ids, self.scored, self.dial = ids, scored, dial
        self.ledger = subject.ledger(*ids.shape)
        losses, self.cost, self.learnt = executed(subject, subject.method(dial), ids, scored)
        self._found = [self._row("learnt", losses, self.cost)]

    def rows(self) -> list[dict[str, Any]]:
        """The learnt levels, and each control that reaches the budget."""
        ledger, budget, learnt = self.ledger, self.cost, self.learnt
        seed = self.run.seed
        deficits = [1.0 - levels[..., ledger.columns] for levels in learnt]
        made: dict[str, Callable[[], Control]] = {
            "uniform": lambda: uniform(ledger, budget, seed),
            "per layer": lambda: per_layer(ledger, budget, learnt, seed),
            "random": lambda: random(ledger, budget, seed),
            "shuffled": lambda: shuffled(ledger, budget, learnt, seed),
            "swapped": lambda: self._scaled("swapped", [np.roll(d, 1, -1) for d in deficits]),
            "inverted": lambda: self._scaled("inverted", [_mirrored(d) for d in deficits]),
            "best of N random": self._best_of_n,
        }
        for name, make in made.items():
            try:
                control = make()
            except BudgetError:
                continue
            losses, cost, _ = executed(self.subject, control.method, self.ids, self.scored)
            self._found.append(self._row(name, losses, cost))
        self._search()
        return self._found

    def _row(self, name: str, losses: Sequence[float | None], cost: float) -> dict[str, Any]:
        return {
            "name": name,
            "task": self.task,
            "budget": self.budget,
            "cost": round(cost, 5),
            "losses": [None if v is None else round(v, 5) for v in losses],
        }

    def _scaled(self, name: str, deficits: list[FloatArray]) -> Control:
        found = match(self.ledger, lambda x: [x * d for d in deficits], self.cost)
        return from_deficits(name, self.ledger, found)

    def _best_of_n(self) -> Control:
        """Chosen on validation texts of the same task."""
        _, ids, scored = next(part for part in self.run.judged("valid") if part[0] == self.task)

        def loss(method: Method) -> float:
            return float(np.mean(executed(self.subject, method, ids, scored)[0]))

        return best_of_n(
            self.ledger, self.cost, loss, n=self.run.size.random_tables, seed=self.run.seed
        )

    def _search(self) -> None:
        """The oracle, on the first texts alone; of the others' it has no losses."""
        n = min(self.run.size.oracle_windows, len(self.ids))
        ledger, costs = self.subject.ledger(1, self.ids.shape[1]), []
        losses: list[float | None] = [None] * len(self.ids)
        for i in range(n):
            ids, scored = self.ids[i : i + 1], self.scored[i : i + 1]

            def run(
                methods: Sequence[Method], ids: Tensor = ids, scored: Tensor = scored
            ) -> list[float]:
                return [executed(self.subject, m, ids, scored)[0][0] for m in methods]

            own_cost = executed(self.subject, self.subject.method(self.dial), ids, scored)[1]
            found = Descent(run, ledger, OracleConfig()).at(own_cost)
            if found is None:
                return
            control = from_deficits(ORACLE, ledger, found)
            own, cost, _ = executed(self.subject, control.of(0), ids, scored)
            losses[i] = own[0]
            costs.append(cost)
        self._found.append(self._row(ORACLE, losses, float(np.mean(costs))))


def _mirrored(deficits: FloatArray) -> FloatArray:
    """(T, L, A) at the mean of each layer and transmitter."""
    return np.clip(2 * deficits.mean(0) - deficits, 0.0, 1.0)
