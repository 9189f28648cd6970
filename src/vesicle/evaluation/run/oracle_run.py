"""OracleRun: the greedy oracle on few, short windows of a text, beside what is as static as it is.

Search and scores are of the same executor as all other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vesicle.errors import BudgetError
from vesicle.evaluation.execution.items import Prepared
from vesicle.evaluation.methods.controls import Control
from vesicle.evaluation.methods.descent import Descent, Losses, OracleConfig
from vesicle.evaluation.methods.names import BESIDE_ORACLE, ORACLE
from vesicle.evaluation.methods.oracle import oracle
from vesicle.evaluation.report.results import Key
from vesicle.evaluation.run.item_runner import for_the_row
from vesicle.evaluation.run.part import Part
from vesicle.evaluation.run.part_run import PartRun
from vesicle.evaluation.run.store import ItemStore
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.plan import Method


class OracleRun(PartRun):
    """The rows of the oracle's windows."""

    def __init__(
        self,
        part: Part,
        subject: Subject,
        config: TaskConfig,
        search: OracleConfig | None = None,
    ) -> None:
        """Run `part`, as `PartRun`; `search` tells how the oracle searches."""
        super().__init__(part, subject, config)
        self._search = search or OracleConfig()
        self._descents: dict[int, Descent] = {}

    def size(self, key: Key, store: ItemStore) -> int:
        """As `PartRun.size`, with the search."""
        size, (_, method, _) = super().size(key, store), key
        if method != ORACLE or store.settings(self.hash, key) is not None:
            return size
        assert self._subject.modulator is not None
        config = self._subject.modulator.predictor.config
        budgets = [budget for _, m, budget in self.part.keys if m == ORACLE]
        cells = config.n_layers * len(config.transmitters)
        search = self._search.tokens(cells, self.part.n_tokens, min(budgets))
        return 5 * size + search // len(budgets)

    def _control(self, key: Key, store: ItemStore, target: float) -> tuple[Control, list[int]]:
        task, method, budget = key
        if method != ORACLE:
            return super()._control(key, store, target)
        others: list[Control] = []
        for other in BESIDE_ORACLE[1:]:
            if other == "uniform" or other in self.part.methods:
                with suppress(BudgetError):  # its own row says so
                    others.append(self._control((task, other, budget), store, target)[0])
        assert self._subject.modulator is not None
        ledger = self._ledger(self._subject.modulator, key, store)
        places = [*self._done(self._dense, store)]
        for i in places:
            if i not in self._descents:
                self._descents[i] = Descent(self._asked(self.items[i]), ledger, self._search)
        return oracle([self._descents[i] for i in places], ledger, target, others), places

    def _asked(self, prepared: Prepared) -> Losses:
        """What the oracle asks of a window, a few methods in one pass."""
        most = self._search.batch

        def losses(methods: Sequence[Method]) -> list[float]:
            found: list[float] = []
            for start in range(0, len(methods), most):
                part = methods[start : start + most]
                with for_the_row():
                    ran = self._runner.losses([prepared] * len(part), part)
                found += [e.output.nats / e.output.n_tokens for e in ran]
                self._runner.tick(len(part) * prepared.n_tokens)
            return found

        return losses
