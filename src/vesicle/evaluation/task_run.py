"""`vesicle eval`: tasks under methods, at equal executed cost, one item at a time.

    result = evaluate_tasks(subject, TaskConfig(tasks=("squad",), budgets=(1.0, 0.8)), "out")

For each task the dense model comes first, then for each budget the learnt modulator, whose dial is
turned until the task's own prompts execute that share of the dense FLOPs, then the controls, scaled
to the share that the learnt modulator executed. The output folder holds

    items.jsonl   one line a finished item, written as it finishes; those that fit are kept
    result.json   the whole `TaskResult` of the last run
    earlier/      results of runs before it that it does not hold
    levels/       released levels of learnt items, where a control needs them

What one item cannot do, the others do without: it is listed as missing, in the task if it cannot
be asked, in the row if it cannot be run, and tried again by the next run. Only one process at a
time writes to a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation.controls import FROM_LEARNT, control
from vesicle.evaluation.earlier import keep_earlier
from vesicle.evaluation.executors import Execution, Executor
from vesicle.evaluation.item_ledger import ItemLedger
from vesicle.evaluation.methods import NAMES, PRESS, check_trained
from vesicle.evaluation.progress import progress_bar
from vesicle.evaluation.prompts import Codec
from vesicle.evaluation.provenance import digest, fingerprint, hardware, versions, with_code
from vesicle.evaluation.session import Say, resumable, tell_kept, to_standard_error
from vesicle.evaluation.store import ITEMS, ItemStore
from vesicle.evaluation.task_config import TaskConfig
from vesicle.evaluation.task_items import Prepared, prepare
from vesicle.evaluation.task_results import Key, TaskResult, TaskRow
from vesicle.evaluation.task_rows import Record, executed_share, make_record, make_row, spans_of
from vesicle.evaluation.tuning import tune_dial
from vesicle.folders import locked
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import ALL, GENERATED
from vesicle.plan import Dense, FloatArray, Method
from vesicle.tasks.base import Settings, Task
from vesicle.tasks.items import Missing
from vesicle.tasks.registry import find_task
from vesicle.tasks.sources import Loaded, load_items

_PREVIEW_ITEMS, _PREVIEW_TOKENS = 4, 6000
_NAMED = 5
"""Missing items that are told one by one; the record has them all."""

FILES = ("result.json", "table.md", "quality_against_cost.png")
"""The record, and what is made from it."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A method that is ready to run.

    Attributes:
        of: From an item's place in the task to the method that decides on it.
        details: What it was set to, as JSON can hold it.
    """

    of: Callable[[int], Method | None]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Subject:
    """What is evaluated.

    Attributes:
        executor: Who runs items.
        codec: The model's text side.
        ends: Tokens that end an answer.
        modulator: Under whose effectors controls act; None for dense and presses alone.
        model: Name and number formats, for the record.
        modulator_name: For the record.
        hugging_face: Loads the model in transformers, which presses read.
    """

    executor: Executor
    codec: Codec
    ends: frozenset[int]
    modulator: Modulator | None
    model: dict[str, Any]
    modulator_name: str = ""
    hugging_face: Callable[[], Any] | None = None


def evaluate_tasks(
    subject: Subject,
    config: TaskConfig,
    out: Path | str,
    *,
    restart: bool = False,
    show_progress: bool = True,
    say: Say = to_standard_error,
) -> TaskResult:
    """Run tasks under methods, or go on with a run that was cut off.

    Args:
        subject: What is evaluated.
        config: On what, under which methods.
        out: Folder to write to.
        restart: Forget what `out` holds.
        show_progress: Show a progress bar on the terminal.
        say: Takes one-line notices; by default they go to standard error.

    Returns:
        The result, as written to `out`.

    Raises:
        DataError: Data are missing or empty, or no item of a task can be asked.
        ModelError: The modulator was made for another model.
        VesicleError: The folder cannot be written or another process writes to it, a method needs
            a modulator, or no item at all could be run.
        KeyboardInterrupt: After Ctrl-C; finished items are on disk.
    """
    with locked(out):
        return _evaluate(subject, config, Path(out), restart, show_progress, say)


def _evaluate(
    subject: Subject,
    config: TaskConfig,
    folder: Path,
    restart: bool,
    show_progress: bool,
    speak: Say,
) -> TaskResult:
    _check_subject(subject, config)
    runs = [_TaskRun(find_task(name), subject, config) for name in config.tasks]
    for run in runs:
        run.tell_missing(speak)
    store = ItemStore(folder, restart)
    keys = [(run, key) for run in runs for key in config.keys(run.task.name)]
    kept = sum(store.count(run.hash, key) for run, key in keys)
    stale = sum(store.count_by_other_code(run.hash, key) for run, key in keys)
    tell_kept(speak, "items", kept, stale, folder / ITEMS)
    with (
        resumable(speak, lambda: "finished items are kept"),
        progress_bar([run.n_tokens for run, _ in keys], show_progress) as bar,
    ):
        for run, key in keys:
            name = f"{key[0]}: {key[1]} at {key[2]:g}"
            with bar(name) as tick:
                run.finish(key, store, tick)
            _tell(speak, f"{name}, item", run.gone(key, store))
    rows: list[TaskRow] = []
    missing: list[dict[str, Any]] = []
    for run in runs:
        found, absent = run.rows(store)
        rows += found
        missing += absent
    result = TaskResult(
        config=config.to_dict(),
        config_hash=digest([run.hash for run in runs]),
        seed=config.seed,
        versions=versions(),
        hardware=hardware(),
        model={**subject.model, "shape": subject.executor.shape.fingerprint()},
        modulator=_modulator_facts(subject),
        tasks=[run.facts() for run in runs],
        rows=rows,
        missing=missing,
    )
    keep_earlier(result, folder, FILES, speak)
    result.save(folder / FILES[0])
    if not rows:
        raise VesicleError(f"nothing could be scored: {missing[0]['reason']}")
    return result


class _TaskRun:
    """One task: its items, and its rows as they are run."""

    def __init__(self, task: Task, subject: Subject, config: TaskConfig) -> None:
        self.task, self._subject, self._config = task, subject, config
        self.loaded = _load(task, subject, config)
        window = subject.executor.context_window
        self.items, self._unfit = prepare(task, self.loaded.items, config, subject.codec, window)
        self.hash = with_code(
            {
                "task": task.name,
                "sha256": self.loaded.sha256,
                "prompts": digest([p.prompt.ids for p in self.items]),
                "settings": {
                    k: getattr(config, k) for k in ("seed", "dial", "best_of", "selection")
                },
                "phases": config.acts.to_dict(),
                "model": subject.model,
                "modulator": _modulator_facts(subject),
            },
            versions(),
        )
        self._pressed: Any = None

    @property
    def n_tokens(self) -> int:
        """Tokens of one row, answers as long as they may be."""
        return sum(p.n_most for p in self.items)

    def facts(self) -> dict[str, Any]:
        """What the record says of the task: one entry of `TaskResult.tasks`."""
        task = self.task
        return {
            "name": task.name,
            "title": task.title,
            "kind": task.kind,
            "style": task.style,
            "split": self.loaded.split,
            "data": self.loaded.description,
            "sha256": self.loaded.sha256,
            "n_items": len(self.items),
            "n_rows": self.loaded.n_rows,
            "missing": [asdict(one) for one in (*self.loaded.missing, *self._unfit)],
            "prompt_tokens": sum(len(p.prompt.ids) for p in self.items),
            "shortened": sum(p.prompt.shortened > 0 for p in self.items),
            "metrics": [
                {
                    "name": m.name,
                    "title": m.title,
                    "percent": m.percent,
                    "higher_is_better": m.higher_is_better,
                    "signature": m.signature,
                }
                for m in task.metrics
            ],
        }

    def tell_missing(self, speak: Say) -> None:
        """Name what cannot be asked, before anything is run."""
        rows, place = self.loaded.missing, self.loaded.place
        if rows:
            speak(
                f"{self.task.name}: {len(rows)} of {self.loaded.n_rows} rows of {place} cannot be "
                "asked and are left out"
            )
        _tell(speak, place, rows)
        if self._unfit:
            n = len(self._unfit)
            speak(f"{self.task.name}: {n} of {n + len(self.items)} items are left out")
        _tell(speak, f"{self.task.name} item", self._unfit)

    def gone(self, key: Key, store: ItemStore) -> list[Missing]:
        """Items of a row that could not be run."""
        why = store.missing(self.hash, key)
        return [
            Missing(item=p.item.id, reason=why[p.item.id]) for p in self.items if p.item.id in why
        ]

    def finish(self, key: Key, store: ItemStore, tick: Callable[[int], None]) -> None:
        """Run the items of a row that are not stored."""
        _, method, _ = key
        left = [i for i, p in enumerate(self.items) if not store.has(self.hash, key, p.item.id)]
        keeps = method == "learnt" and any(m in FROM_LEARNT for m in self._config.methods)
        if keeps:  # an item whose levels are gone is run again
            names = [self._levels_name(key, p.item.id) for p in self.items]
            gone = [i for i, name in enumerate(names) if not store.has_levels(name)]
            left = sorted({*left, *gone})
        target = self._target(key, store)
        settings = store.settings(self.hash, key)
        if settings is not None and settings.get("target") != target:
            store.forget(self.hash, key)  # made for another share
            left, settings = list(range(len(self.items))), None
        tick(self.n_tokens - sum(self.items[i].n_most for i in left))
        if settings is not None and (not left or "missing" in settings):
            return
        try:
            chosen = self._choose(key, store, target, settings)
        except BudgetError as error:
            store.add_settings(self.hash, key, {"target": target, "missing": str(error)})
            return
        if settings is None:
            store.add_settings(self.hash, key, {"target": target, **chosen.details})
        for i in left:
            prepared = self.items[i]
            try:
                execution = self._run(prepared, chosen.of(i), keep_levels=keeps)
            except VesicleError as error:
                store.add_missing(self.hash, key, prepared.item.id, str(error))
                tick(prepared.n_most)
                continue
            if keeps and execution.levels is not None:
                store.save_levels(
                    self._levels_name(key, prepared.item.id), self._released(execution)
                )
            store.add(self.hash, key, prepared.item.id, make_record(self.task, prepared, execution))
            tick(prepared.n_most)

    def rows(self, store: ItemStore) -> tuple[list[TaskRow], list[dict[str, Any]]]:
        """The rows, and what could not be had."""
        rows, missing = [], []
        for key in self._config.keys(self.task.name):
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
        beside = method not in ("dense", "learnt") and "learnt" in self._config.methods
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
            details=settings,
            missing=self.gone(key, store),
        )

    @property
    def _dense(self) -> Key:
        return (self.task.name, "dense", 1.0)

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

    def _run(
        self, prepared: Prepared, method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        subject, item = self._subject, prepared.item
        executor = subject.executor
        if self.task.kind == "loss":
            found = executor.loss(prepared.prompt.ids, method, keep_levels=keep_levels)
            output = replace(found.output, n_bytes=prepared.n_bytes)
        elif self.task.kind == "choose":
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
        if method in ("dense", "learnt") or method.startswith(PRESS):
            return budget
        learnt = (task, "learnt", budget)
        if "learnt" not in self._config.methods:
            return budget
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
        learnt: dict[int, FloatArray] = {}
        if method in FROM_LEARNT:
            source = (key[0], "learnt", budget)
            learnt = {
                i: store.levels(self._levels_name(source, self.items[i].item.id))
                for i in self._done(source, store)
            }
            if not learnt:
                raise BudgetError("there are no levels to make it from: no learnt item was run")
        selection = [self.items[i] for i in self._done(self._dense, store)]

        def loss(method: Method) -> float:
            with _for_the_row():
                return self._selection_nats(method, selection[: self._config.selection])

        built = control(
            method,
            self._item_ledger(modulator, key, store),
            target,
            seed=self._config.seed,
            learnt=[*learnt.values()],
            n=self._config.best_of,
            loss=loss,
        )
        place = {i: n for n, i in enumerate(learnt)}

        def of(i: int) -> Method:
            if isinstance(built.method, list) and i not in place:
                raise VesicleError("there are no learnt levels of it to shuffle")
            return built.of(place.get(i, 0))

        return Chosen(of=of, details={"priced": built.cost_share, **built.details})

    def _item_ledger(self, modulator: Modulator, key: Key, store: ItemStore) -> ItemLedger:
        """Prices on the tokens of the learnt run, else of the dense one."""
        task, _, budget = key
        source: Key = (task, "learnt", budget)
        if "learnt" not in self._config.methods or not store.count(self.hash, source):
            source = self._dense
        records = self._records(source, store).values()
        spans = [spans_of(record, self._counted) for record in records]
        if not spans:
            raise BudgetError("there is nothing to price it on: no dense item was run")
        shape, screens = self._subject.executor.shape, self.task.kind == "generate"
        return ItemLedger(modulator, shape, spans, screens=screens, phases=self._config.acts)

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

        def share(method: ModulatorMethod) -> float:
            executed = dense = 0
            for prepared in preview:
                item = replace(prepared.item, max_new_tokens=min(8, prepared.item.max_new_tokens))
                with _for_the_row():
                    found = self._run(replace(prepared, item=item), method)
                spans, cost = found.spans, found.prefill.flops_total + found.decode.flops_total
                if self._counted == GENERATED:
                    spans = tuple(span.behind(found.prompt) for span in spans)
                    cost = found.generated.flops_total
                executed += cost
                dense += self._subject.executor.dense(spans).flops_total
            return executed / dense

        return tune_dial(modulator, budget, share, self._config.acts)

    def _selection_nats(self, method: Method, selection: list[Prepared]) -> float:
        """Loss of the right answers of items, in nats per token."""
        nats, tokens = 0.0, 0
        codec, executor = self._subject.codec, self._subject.executor
        for prepared in selection:
            item = prepared.item
            if self.task.kind == "loss":
                output = executor.loss(prepared.prompt.ids, method).output
                nats, tokens = nats + output.nats, tokens + output.n_tokens
                continue
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
        from vesicle.presses import make_press, press_method

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
def _for_the_row() -> Iterator[None]:
    """While a method is set: what an item cannot do then, no item of the row can have."""
    try:
        yield
    except VesicleError as error:
        raise BudgetError(str(error)) from error


def _tell(speak: Say, where: str, missing: Sequence[Missing]) -> None:
    """Name the first missing items."""
    for one in missing[:_NAMED]:
        speak(f"{where} {one}")
    if len(missing) > _NAMED:
        speak(f"{where}: and {len(missing) - _NAMED} more, which the record lists")


def _load(task: Task, subject: Subject, config: TaskConfig) -> Loaded:
    settings = Settings(
        seed=config.seed,
        encode=lambda text: subject.codec.encode(text, control_tokens=False),
        lengths=config.lengths,
        depths=config.depths,
        per_cell=config.per_cell,
    )
    return load_items(
        task, data=config.data, split=config.split, settings=settings, limit=config.limit
    )


def _check_subject(subject: Subject, config: TaskConfig) -> None:
    ours = [m for m in config.methods if m in NAMES and m != "dense"]
    modulator = subject.modulator
    if ours and min(config.budgets) < 1:
        if modulator is None:
            raise VesicleError(f"{ours[0]} needs a modulator; name one with --modulator")
        check_trained(modulator, subject.executor.shape)


def _modulator_facts(subject: Subject) -> dict[str, Any]:
    modulator = subject.modulator
    if modulator is None:
        return {}
    effectors = {name: e.to_dict() for name, e in modulator.effectors.items()}
    return {
        "name": subject.modulator_name,
        "kind": modulator.predictor.kind,
        "transmitters": list(modulator.predictor.config.transmitters),
        "sha256": digest([fingerprint(modulator), effectors, modulator.info.dial]),
    }
