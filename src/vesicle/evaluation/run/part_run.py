"""PartRun: runs the rows of a part, one method at one budget after another, at equal executed cost.

A row is set, then run: the learnt modulator's dial is turned until its items execute the budget,
and controls are scaled to a share; then each item is run under the method, and what it gave is
stored. An item that cannot be run is stored as missing, with the reason, and tried again by the
next run; so is a row whose method cannot be set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation.execution.executors import Execution
from vesicle.evaluation.execution.items import Prepared
from vesicle.evaluation.methods.controls import FROM_LEARNT, Control, control
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.methods.names import ORACLE, PRESS
from vesicle.evaluation.methods.tuning import tune_dial
from vesicle.evaluation.report.results import Key, TaskRow
from vesicle.evaluation.report.rows import Record, executed_share, make_record, make_row, spans_of
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
        of: From an item's place in the task to the method that decides on it.
        details: What it was set to, as JSON can hold it.
    """

    of: Callable[[int], Method | None]
    details: dict[str, Any] = field(default_factory=dict)


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
            },
            versions(),
        )
        self._pressed: Any = None
        self._tick: Tick = lambda n: None

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
        self._tick = tick
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
        for i, found in self._executions(left, chosen, keeps):
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

    def _executions(
        self, places: list[int], chosen: Chosen, keeps: bool
    ) -> Iterator[tuple[int, Execution | VesicleError]]:
        """Run items: windows of a text several in a pass, and one by one where that fails."""
        most = self._subject.executor.batch if self.task.kind == "loss" else 1
        for start in range(0, len(places), most):
            together = places[start : start + most]
            if len(together) > 1:
                windows = [self.items[i] for i in together]
                with suppress(VesicleError):
                    methods = [chosen.of(i) for i in together]
                    yield from zip(together, self._losses(windows, methods, keeps), strict=True)
                    continue
            for i in together:
                try:
                    yield i, self._run(self.items[i], chosen.of(i), keep_levels=keeps)
                except VesicleError as error:
                    yield i, error

    def _losses(
        self, windows: Sequence[Prepared], methods: Sequence[Method | None], keeps: bool = False
    ) -> list[Execution]:
        """Windows of a text in one pass."""
        ids = [p.prompt.ids for p in windows]
        ran = self._subject.executor.losses(ids, methods, keep_levels=keeps)
        return [
            replace(found, output=replace(found.output, n_bytes=p.n_bytes))
            for p, found in zip(windows, ran, strict=True)
        ]

    def _run(
        self, prepared: Prepared, method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        subject, item = self._subject, prepared.item
        executor = subject.executor
        if self.task.kind == "loss":
            return self._losses([prepared], [method], keep_levels)[0]
        if self.task.kind == "choose":
            found = executor.choose(
                prepared.prompt, prepared.choices, method, keep_levels=keep_levels
            )
            sizes = tuple(len(c.strip().encode("utf-8")) for c in item.choices)
            output = replace(found.output, choice_bytes=sizes)
        else:
            found = executor.generate(
                prepared.prompt,
                method,
                subject.codec,
                max_new_tokens=item.max_new_tokens,
                stop=item.stop,
                ends=subject.ends,
                keep_levels=keep_levels,
            )
            output = found.output
        return replace(found, output=output)

    def _levels_name(self, key: Key, item: str) -> str:
        return digest([self.hash, key, item])[:24]

    def _target(self, key: Key, store: ItemStore) -> float:
        """The share that a row is to execute."""
        task, method, budget = key
        given = method in ("dense", "learnt") or method.startswith(PRESS)
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
                self.finish(source, store, self._tick)
            learnt = {
                i: store.levels(self._levels_name(source, self.items[i].item.id))
                for i in self._done(source, store)
            }
            if not learnt:
                raise BudgetError("there are no levels to make it from: no learnt item was run")
        able = [self.items[i] for i in self._done(self._dense, store)]

        def loss(method: Method) -> float:
            with for_the_row():
                return self._selection_nats(method, self._selection(able))

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
        if not self.part.exact:
            return tune_dial(modulator, budget, self._share_on(preview), phases=acts)
        stages = [self._share_on(able)]
        if len(preview) < len(able):
            stages.insert(0, self._share_on(preview))
        return tune_dial(modulator, budget, *stages, phases=acts, near=TOLERANCE)

    def _share_on(self, items: Sequence[Prepared]) -> Callable[[ModulatorMethod], float]:
        """What a method executes of the dense FLOPs on items, with answers of a few tokens."""
        short = [
            replace(p, item=replace(p.item, max_new_tokens=min(8, p.item.max_new_tokens)))
            for p in items
        ]
        most = self._subject.executor.batch if self.task.kind == "loss" else 1

        def run(together: list[Prepared], method: ModulatorMethod) -> list[Execution]:
            if len(together) > 1:
                return self._losses(together, [method] * len(together))
            return [self._run(together[0], method)]

        def share(method: ModulatorMethod) -> float:
            executed = dense = 0
            for start in range(0, len(short), most):
                together = short[start : start + most]
                with for_the_row():
                    ran = run(together, method)
                for found in ran:
                    spans, cost = found.spans, found.prefill.flops_total + found.decode.flops_total
                    if self._counted == GENERATED:
                        spans = tuple(span.behind(found.prompt) for span in spans)
                        cost = found.generated.flops_total
                    executed += cost
                    dense += self._subject.executor.dense(spans).flops_total
                self._tick(sum(p.n_tokens for p in together))
            return executed / dense

        return share

    def _selection(self, able: Sequence[Prepared]) -> list[Prepared]:
        """The items on which best-of-n selects."""
        length = self.part.selection_length
        few = able[: self._config.selection]
        if length is None:
            return list(few)
        return [replace(p, prompt=replace(p.prompt, ids=p.prompt.ids[:length])) for p in few]

    def _selection_nats(self, method: Method, selection: list[Prepared]) -> float:
        """Loss of the right answers of items, in nats per token."""
        nats, tokens = 0.0, 0
        codec, executor = self._subject.codec, self._subject.executor
        if self.task.kind == "loss":
            ran = self._losses(selection, [method] * len(selection))
            self._tick(sum(p.n_tokens for p in selection))
            return sum(e.output.nats for e in ran) / sum(e.output.n_tokens for e in ran)
        for prepared in selection:
            item = prepared.item
            if self.task.kind == "choose":
                assert item.answer is not None
                right = prepared.choices[item.answer]
            else:
                answer = " " + item.references[0] if item.references else ""
                right = codec.encode(answer, control_tokens=False, continues=True)[:64]
            if right:
                output = executor.choose(prepared.prompt, [right], method).output
                nats, tokens = nats - output.choice_nats[0], tokens + len(right)
        if not tokens:
            raise BudgetError(
                f"{self.task.name} has no right answers by which best-of-n could select"
            )
        return nats / tokens

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


@contextmanager
def for_the_row() -> Iterator[None]:
    """While a method is set: what an item cannot do then, no item of the row can have."""
    try:
        yield
    except VesicleError as error:
        raise BudgetError(str(error)) from error
