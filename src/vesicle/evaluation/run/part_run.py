"""PartRun: runs the rows of a part, one method at one budget after another, at equal executed cost.

A row is set, then run: the learnt modulator's dial is turned until its items execute the budget,
and controls are scaled to a share; then each item is run under the method, and what it gave is
stored. An item that cannot be run is stored as missing, with the reason, and tried again by the
next run; so is a row whose method cannot be set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation.execution.executor import Execution
from vesicle.evaluation.execution.items import Prepared
from vesicle.evaluation.methods.controls import FROM_LEARNT, Control, control
from vesicle.evaluation.methods.descent import OracleConfig
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.methods.memory import (
    READING,
    find_namm,
    holds_share,
    is_namm,
    memory_method,
    reading_method,
)
from vesicle.evaluation.methods.names import ORACLE, PRESS, saves_memory
from vesicle.evaluation.methods.tuning import NEAR, tune_dial
from vesicle.evaluation.report.results import Key, TaskRow
from vesicle.evaluation.report.rows import Record, executed_share, make_record, make_row, spans_of
from vesicle.evaluation.run.item_runner import ItemRunner, Methods, for_the_row
from vesicle.evaluation.run.part import Part
from vesicle.evaluation.run.progress import Tick
from vesicle.evaluation.run.provenance import digest, versions, with_code
from vesicle.evaluation.run.store import ItemStore
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import ALL, GENERATED
from vesicle.plan import Dense, FloatArray, Method
from vesicle.tasks.items import Missing

_PREVIEW_ITEMS, _PREVIEW_TOKENS = 4, 6000


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A method that is ready to run.

    Attributes:
        of: From an item's place in the part to the method that decides on it.
        details: What it was set to, as JSON can hold it.
    """

    of: Methods
    details: dict[str, Any] = field(default_factory=dict)


def _namms(methods: Sequence[str]) -> dict[str, Any]:
    """What the record says of NAMMs, where there are any."""
    found = {name: find_namm(name).digest() for name in methods if is_namm(name)}
    return {"namms": found} if found else {}


class PartRun:
    """The rows of a part as they are run."""

    def __init__(self, part: Part, subject: Subject, config: TaskConfig) -> None:
        """Run `part`.

        Args:
            part: Items and rows.
            subject: What is evaluated.
            config: How controls are made, and on which tokens methods act.
        """
        self.part, self._subject, self._config = part, subject, config
        self.task, self.items, self._dense = part.task, part.items, part.dense
        self.hash = with_code(
            {
                "task": part.name,
                "sha256": part.loaded.sha256,
                "prompts": digest([p.prompt.ids for p in self.items]),
                "settings": {
                    k: getattr(config, k) for k in ("seed", "dial", "best_of", "selection")
                },
                "more": part.settings,
                "phases": config.acts.to_dict(),
                "model": subject.model,
                "modulator": subject.modulator_facts(),
                **_namms(config.methods),
            },
            versions(),
        )
        self._runner = ItemRunner(part.task, subject)
        self._pressed: Any = None

    def size(self, key: Key, store: ItemStore) -> int:
        """Tokens that a row takes, roughly: those of its items, and of what sets its method."""
        _, method, budget = key
        once = self.part.n_tokens
        if store.settings(self.hash, key) is not None:
            return once
        if method == "learnt" and budget < 1:
            return (4 if self.part.exact else 2) * once
        if method == "best-of-n":
            few = self._selection(self.items)
            return once + self._config.best_of * sum(p.n_tokens for p in few)
        modulator = self._subject.modulator
        if method == "static-shape" and modulator is not None:
            few = self._selection(self.items)
            config = modulator.predictor.config
            n_cells = config.n_layers * len(config.transmitters)
            return once + OracleConfig().tokens(n_cells, sum(p.n_tokens for p in few), budget)
        return once

    def gone(self, key: Key, store: ItemStore) -> list[Missing]:
        """Items of a row that could not be run."""
        why = store.missing(self.hash, key)
        return [
            Missing(item=p.item.id, reason=why[p.item.id]) for p in self.items if p.item.id in why
        ]

    def finish(self, key: Key, store: ItemStore, tick: Tick) -> None:
        """Run the items of a row that are not stored."""
        _, method, _ = key
        self._runner.tick = tick
        left = [i for i, p in enumerate(self.items) if not store.has(self.hash, key, p.item.id)]
        keeps = method == "learnt" and any(m in FROM_LEARNT for m in self.part.methods)
        if keeps:  # an item whose levels are gone is run again
            names = [self._levels_name(key, p.item.id) for p in self.items]
            gone = [i for i, name in enumerate(names) if not store.has_levels(name)]
            left = sorted({*left, *gone})
        target = self._target(key, store)
        settings = store.settings(self.hash, key)
        if settings is not None and settings.get("target") != target:
            store.forget(self.hash, key)  # made for another share
            left, settings = list(range(len(self.items))), None
        tick(self.part.n_tokens - sum(self.items[i].n_most for i in left))
        if settings is not None and (not left or "missing" in settings):
            return
        start = time.perf_counter()
        try:
            chosen = self._choose(key, store, target, settings)
        except BudgetError as error:
            store.add_settings(self.hash, key, {"target": target, "missing": str(error)})
            store.finish_row()
            return
        if settings is None:
            seconds = round(time.perf_counter() - start, 3)
            details = {"target": target, "seconds": seconds, **chosen.details}
            store.add_settings(self.hash, key, details)
        for i, found in self._runner.each(self.items, left, chosen.of, keeps=keeps):
            prepared = self.items[i]
            if isinstance(found, VesicleError):
                store.add_missing(self.hash, key, prepared.item.id, str(found))
            else:
                if keeps and found.levels is not None:
                    name = self._levels_name(key, prepared.item.id)
                    store.save_levels(name, self._released(found))
                record = make_record(self.task, prepared, found)
                store.add(self.hash, key, prepared.item.id, record)
            tick(prepared.n_most)
        store.finish_row()

    def rows(self, store: ItemStore) -> tuple[list[TaskRow], list[dict[str, Any]]]:
        """The rows, and what could not be had."""
        rows, missing = [], []
        for key in self.part.keys:
            settings = dict(store.settings(self.hash, key) or {})
            reason = settings.get("missing") or self._no_row(key, store)
            if reason:
                task, method, budget = key
                absent = {"task": task, "method": method, "budget": budget, "reason": reason}
                missing.append(absent)
                continue
            rows.append(self._row(key, store, settings))
        return rows, missing

    def _no_row(self, key: Key, store: ItemStore) -> str:
        """Why a row whose method was set has nothing to compare; "" if it has."""
        own, dense = self._records(key, store), self._records(self._dense, store)
        if own.keys() & dense.keys():
            return ""
        if own:
            return "the dense model could run none of its items"
        return f"no item could be run: {self.gone(key, store)[0]}"

    def _row(self, key: Key, store: ItemStore, settings: dict[str, Any]) -> TaskRow:
        task, method, budget = key
        learnt: Key = (task, "learnt", budget)
        details = {name: value for name, value in settings.items() if name != "seconds"}
        beside = method not in ("dense", "learnt") and "learnt" in self.part.methods
        return make_row(
            key,
            self.task,
            self.items,
            self._records(key, store),
            self._subject.executor,
            dense=self._records(self._dense, store),
            learnt=self._records(learnt, store)
            if beside and store.count(self.hash, learnt)
            else None,
            seed=self._config.seed,
            details=details,
            setting_seconds=settings.get("seconds", 0.0),
            missing=self.gone(key, store),
        )

    def _records(self, key: Key, store: ItemStore) -> dict[str, Record]:
        """Finished items of a row, in their order."""
        return {self.items[i].item.id: record for i, record in self._done(key, store).items()}

    def _done(self, key: Key, store: ItemStore) -> dict[int, Record]:
        """Finished items of a row, by their index in `items`."""
        return {
            i: store.get(self.hash, key, p.item.id)
            for i, p in enumerate(self.items)
            if store.has(self.hash, key, p.item.id)
        }

    def _levels_name(self, key: Key, item: str) -> str:
        return digest([self.hash, key, item])[:24]

    def _target(self, key: Key, store: ItemStore) -> float:
        """The share that a row is to execute."""
        task, method, budget = key
        given = method in ("dense", "learnt") or saves_memory(method)
        if given or self.part.exact or "learnt" not in self.part.methods:
            return budget
        learnt = (task, "learnt", budget)
        if "missing" in (store.settings(self.hash, learnt) or {}):
            return budget
        records = [*self._records(learnt, store).values()]
        executor = self._subject.executor
        return executed_share(records, executor, self._counted) if records else budget

    @property
    def _counted(self) -> str:
        """The tokens of whose work a budget is a share."""
        modulator = self._subject.modulator
        assert modulator is not None
        return ALL if modulator.at(1.0, self._config.acts).counts_prompt else GENERATED

    def _released(self, execution: Execution) -> FloatArray:
        """Levels (T, L, 5) of the tokens that a budget counts: a prompt at rest says nothing."""
        assert execution.levels is not None
        return execution.levels[execution.prompt if self._counted == GENERATED else 0 :]

    def _choose(
        self, key: Key, store: ItemStore, target: float, settings: dict[str, Any] | None
    ) -> Chosen:
        _, method, budget = key
        if method == "dense":
            return Chosen(of=lambda i: None)
        if method.startswith(PRESS):
            return self._press(method, budget)
        if holds_share(method):

            def remembering(i: int) -> Method:
                prompt = self.items[i].prompt
                if method == READING:
                    shape = self._subject.executor.shape
                    return reading_method(budget, len(prompt.ids), shape)
                return memory_method(method, budget, len(prompt.ids), prompt.n_preamble)

            return Chosen(of=remembering, details={"memory": budget})
        modulator = self._subject.modulator
        assert modulator is not None
        if method == "learnt":
            dial = self._dial(modulator, budget, store) if settings is None else settings["dial"]
            tuned = ModulatorMethod(modulator, dial, self._config.acts)
            return Chosen(of=lambda i: tuned, details={"dial": dial})
        built, places = self._control(key, store, target)
        place = {i: n for n, i in enumerate(places)}

        def of(i: int) -> Method:
            if isinstance(built.method, list) and i not in place:
                raise VesicleError(
                    "the oracle has not searched it"
                    if method == ORACLE
                    else "there are no learnt levels of it to shuffle"
                )
            return built.of(place.get(i, 0))

        return Chosen(of=of, details={"priced": built.cost_share, **built.details})

    def _control(self, key: Key, store: ItemStore, target: float) -> tuple[Control, list[int]]:
        """A control, and the items that it has methods of their own for, if it has such."""
        task, method, budget = key
        modulator = self._subject.modulator
        assert modulator is not None
        learnt: dict[int, FloatArray] = {}
        if method in FROM_LEARNT:
            source = (task, "learnt", budget)
            if "learnt" not in self.part.methods:
                self.finish(source, store, self._runner.tick)
            learnt = {
                i: store.levels(self._levels_name(source, self.items[i].item.id))
                for i in self._done(source, store)
            }
            if not learnt:
                why = (store.settings(self.hash, source) or {}).get("missing")
                raise BudgetError(
                    why or "there are no levels to make it from: no learnt item was run"
                )
        able = [self.items[i] for i in self._done(self._dense, store)]

        def loss(method: Method) -> float:
            with for_the_row():
                return self._runner.nats_of_right_answers(method, self._selection(able))

        built = control(
            method,
            self._ledger(modulator, key, store),
            target,
            seed=self._config.seed,
            learnt=[*learnt.values()],
            n=self._config.best_of,
            loss=loss,
        )
        return built, [*learnt]

    def _ledger(self, modulator: Modulator, key: Key, store: ItemStore) -> Ledger:
        """Prices on the tokens of the learnt run, else of the dense one."""
        task, _, budget = key
        source: Key = (task, "learnt", budget)
        if "learnt" not in self.part.methods or not store.count(self.hash, source):
            source = self._dense
        records = self._records(source, store).values()
        spans = [spans_of(record, self._counted) for record in records]
        if not spans:
            raise BudgetError("there is nothing to price it on: no dense item was run")
        shape, screens = self._subject.executor.shape, self.task.kind == "generate"
        return Ledger(modulator, shape, spans, screens=screens, phases=self._config.acts)

    def _dial(self, modulator: Modulator, budget: float, store: ItemStore) -> float:
        if self._config.dial == "shipped":
            return modulator.dial(budget, self._config.acts)
        able = [self.items[i] for i in self._done(self._dense, store)]
        if not able:
            raise BudgetError("there is nothing to turn its dial on: no dense item was run")
        preview: list[Prepared] = []
        order = np.argsort([p.n_tokens for p in able], kind="stable")
        spread = order[np.linspace(0, len(order) - 1, min(_PREVIEW_ITEMS, len(order))).astype(int)]
        for i in dict.fromkeys(spread[::-1].tolist()):
            size = sum(p.n_tokens for p in preview) + able[i].n_tokens
            if not preview or size <= _PREVIEW_TOKENS:
                preview.append(able[i])
        acts = self._config.acts
        parts = [preview]
        if self.part.exact:
            parts = [preview, able] if len(preview) < len(able) else [able]
        stages = [self._runner.share_on(some, self._counted) for some in parts]
        near = TOLERANCE if self.part.exact else NEAR
        return tune_dial(modulator, budget, *stages, phases=acts, near=near)

    def _selection(self, able: Sequence[Prepared]) -> list[Prepared]:
        """The items on which best-of-n and static-shape select."""
        length = self.part.selection_length
        few = able[: self._config.selection]
        if length is None:
            return list(few)
        return [replace(p, prompt=replace(p.prompt, ids=p.prompt.ids[:length])) for p in few]

    def _press(self, name: str, budget: float) -> Chosen:
        from vesicle.integrations.kvpress import make_press, press_method

        if self.task.kind == "loss":
            raise BudgetError("a press compresses a context before a question; a text has none")
        if self._subject.hugging_face is None:
            raise VesicleError(f"{name} needs the model in transformers")
        if self._pressed is None:
            self._pressed = self._subject.hugging_face()
        model, press = self._pressed, make_press(name.removeprefix(PRESS), 1 - budget)

        def of(i: int) -> Method:
            prompt = self.items[i].prompt
            ids = prompt.ids[: prompt.n_context]
            return press_method(press, model, ids) if ids else Dense()

        return Chosen(of=of, details={"compression_ratio": 1 - budget})
