"""Loss against executed cost on a text: a modulator beside every control, hard reference.

    config = EvalConfig(data="test.jsonl.gz")
    result = evaluate(model, Text.from_folder(folder), modulator, config, "out")

For each budget the learnt modulator's dial is tuned until it executes that share of the dense
FLOPs, and each control is scaled to the same executed share (`controls`, `oracle`). The output
folder holds

    rows.jsonl             one line a finished row; rows whose config hash fits are kept
    result.json            the whole `Result`
    table.md               the same as tables
    loss_against_cost.png  a plot, if matplotlib is installed

The oracle is affordable on few, short windows only. On these the learnt modulator and the static
controls are tuned and scored once more (subset `oracle`), so that regret is taken at equal cost on
the same text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation import controls
from vesicle.evaluation.controls import Control, Ledger, Tuned, tune_learnt
from vesicle.evaluation.earlier import keep_earlier
from vesicle.evaluation.language_modelling import (
    Codec,
    Scores,
    Windows,
    load_windows,
    model_shape,
    score,
)
from vesicle.evaluation.oracle import Descent, OracleConfig, oracle
from vesicle.evaluation.progress import progress_bar
from vesicle.evaluation.provenance import fingerprint, hardware, versions
from vesicle.evaluation.regret_plots import MissingPlots, save_plot
from vesicle.evaluation.regret_results import (
    SCHEMA,
    Result,
    Row,
    paired_difference,
)
from vesicle.evaluation.regret_table import markdown
from vesicle.families import find_family
from vesicle.files import atomic_path
from vesicle.folders import locked
from vesicle.modulator import Modulator, ModulatorMethod, check_budget
from vesicle.predictors import Predictor

METHODS = (
    "learnt",
    "uniform",
    "uniform-mix",
    "per-layer",
    "random",
    "shuffled",
    "best-of-n",
    "oracle",
)
BESIDE_ORACLE = ("learnt", "uniform", "uniform-mix", "per-layer")
"""Methods that are scored on the oracle's windows too, if they are asked for."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_ROWS = "rows.jsonl"
FILES = ("result.json", "table.md", "loss_against_cost.png")
"""The record, and what is made from it."""
_NOT_IN_HASH = ("budgets", "methods", "data", "split", "field")

Key = tuple[str, str, float]
"""Method, subset, budget."""
_ORACLE = OracleConfig()


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        data: A file, a folder or a hub data set, as `vesicle.training.data` tells.
        split: Which part of it.
        field: The field of JSON lines that holds the text.
        length: Tokens in a window.
        limit: Windows, spread evenly over the text; None for all.
        budgets: Shares of the dense FLOPs, each in (0, 1].
        methods: Of `METHODS`.
        seed: Of random controls and bootstraps.
        best_of: Random tables among which `best-of-n` selects.
        selection_windows: Evaluated windows on which it selects: the first ones.
        selection_length: Their tokens, from the beginning.
        oracle_windows: Evaluated windows that the oracle searches on, spread evenly.
        oracle_length: Their tokens, from the beginning.
        oracle: How it searches.
        dtype: Of the model: `bfloat16`, `float32` or `float64`; the predictor stays as it is.
        batch: Windows in a forward pass.
    """

    data: str
    split: str = "test"
    field: str = "text"
    length: int = 1024
    limit: int | None = 16
    budgets: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6)
    methods: tuple[str, ...] = METHODS
    seed: int = 0
    best_of: int = 100
    selection_windows: int = 2
    selection_length: int = 512
    oracle_windows: int = 2
    oracle_length: int = 512
    oracle: OracleConfig = _ORACLE
    dtype: str = "bfloat16"
    batch: int = 2

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        whole = {
            "length": 2,
            "limit": 1,
            "seed": 0,
            "best_of": 1,
            "selection_windows": 1,
            "selection_length": 2,
            "oracle_windows": 1,
            "oracle_length": 2,
            "batch": 1,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise VesicleError(f"{name} is {value}; allowed: whole numbers from {least}")
        object.__setattr__(
            self, "budgets", tuple(sorted({check_budget(b) for b in self.budgets}, reverse=True))
        )
        if not self.budgets:
            raise VesicleError("budgets is empty; give at least one, above 0 and up to 1")
        if not self.methods:
            raise VesicleError(f"methods is empty; known: {', '.join(METHODS)}")
        for method in self.methods:
            if method not in METHODS:
                near = difflib.get_close_matches(str(method), METHODS, n=2, cutoff=0.5)
                hint = f" (did you mean {' or '.join(near)}?)" if near else ""
                raise VesicleError(f"unknown method {method!r}{hint}; known: {', '.join(METHODS)}")
        object.__setattr__(self, "methods", tuple(m for m in METHODS if m in self.methods))
        if self.dtype not in DTYPES:
            raise VesicleError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it; of a local source the name alone, as machines differ in folders."""
        local = Path(self.data).expanduser()
        values = {**asdict(self), "data": local.name if local.exists() else self.data}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a configuration.

        Raises:
            VesicleError: For unknown keys or values out of range.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise VesicleError(
                    f"unknown evaluation setting {name!r}; known: {', '.join(known)}"
                )
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if isinstance(given.get("oracle"), dict):
            given["oracle"] = OracleConfig(**given["oracle"])
        return cls(**given)

    def keys(self) -> list[Key]:
        """The rows of the evaluation, in the order in which they are computed.

        At a budget of 1 every method is the dense model, so that the learnt one alone is run, as a
        check.
        """
        keys: list[Key] = [("dense", "all", 1.0)]
        for budget in self.budgets:
            for method in self.methods:
                if method != "oracle" and (budget < 1 or method == "learnt"):
                    keys.append((method, "all", budget))
        if "oracle" in self.methods and self.budgets[-1] < 1:
            keys.append(("dense", "oracle", 1.0))
            for budget in self.budgets:
                for method in self.methods:
                    if budget < 1 and method in (*BESIDE_ORACLE, "oracle"):
                        keys.append((method, "oracle", budget))
        return keys


def evaluate(
    model: nn.Module,
    codec: Codec,
    modulator: Modulator,
    config: EvalConfig,
    out: Path | str,
    *,
    model_name: str = "",
    modulator_name: str = "",
    restart: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Evaluate a modulator and its controls, or go on with an evaluation that was cut off.

    The model is converted to the configured dtype and is otherwise left as it was.

    Args:
        model: A Hugging Face causal LM.
        codec: Its text side, such as `vesicle.models.text.Text`.
        modulator: With a trained predictor.
        config: What to evaluate.
        out: Folder to write to.
        model_name: For the record; by default the name in the model's own config.
        modulator_name: For the record.
        restart: Forget the rows that `out` holds.
        progress: Show a progress bar on the terminal.
        say: Takes one-line notices; by default they go to standard error.

    Returns:
        The result, as written to `out`.

    Raises:
        DataError: The text is missing, empty or shorter than a window.
        ModelError: The modulator was made for another model.
        VesicleError: The folder cannot be written or another process writes to it, or a loss is
            not finite.
        KeyboardInterrupt: After Ctrl-C; finished rows are on disk.
    """
    speak = say or (lambda line: print(line, file=sys.stderr))
    with locked(out):
        names = (model_name, modulator_name)
        return _evaluate(
            model, codec, modulator, config, Path(out), *names, restart, progress, speak
        )


def _evaluate(
    model: nn.Module,
    codec: Codec,
    modulator: Modulator,
    config: EvalConfig,
    folder: Path,
    model_name: str,
    modulator_name: str,
    restart: bool,
    progress: bool,
    speak: Callable[[str], None],
) -> Result:
    if not isinstance(modulator.predictor, Predictor):
        raise VesicleError(
            f"a {modulator.predictor.kind!r} control is no trained modulator; "
            "controls are built here"
        )
    model.to(dtype=DTYPES[config.dtype])
    modulator.check_fits(model_shape(model))
    _check_length(model, config.length)
    windows = load_windows(
        config.data,
        codec,
        split=config.split,
        field=config.field,
        length=config.length,
        limit=config.limit,
    )
    facts = _facts(model, modulator, windows, config, model_name, modulator_name)
    store = _Store(folder / _ROWS, facts["config_hash"], restart)
    keys = config.keys()
    kept = sum(key in store.done for key in keys)
    if kept:
        speak(f"{kept} of {len(keys)} rows were done before and are kept")
    stale = len(set(keys) & store.by_other_code - store.done.keys())
    if stale:
        speak(
            f"{stale} of {len(keys)} rows were done by other code than this and are run again; "
            f"their lines stay in {folder / _ROWS}"
        )
    session = _Session(model, modulator, windows, config, codec, store)
    try:
        with progress_bar([session.tokens(k) for k in keys], progress) as bar:
            for key in keys:
                with bar(_note(key)) as session.on_tokens:
                    if key not in store.done:
                        session.finish(key)
    except KeyboardInterrupt:
        done = sum(key in store.done for key in keys)
        speak(
            f"interrupted; {done} of {len(keys)} rows are done: run the same command again to go on"
        )
        raise
    found = [store.done[key] for key in keys]
    result = Result(
        **facts,
        rows=[row for row in found if isinstance(row, Row)],
        missing=[row for row in found if not isinstance(row, Row)],
    )
    keep_earlier(result, folder, FILES, speak)
    result.save(folder / FILES[0])
    with atomic_path(folder / FILES[1]) as part:
        part.write_text(markdown(result), encoding="utf-8")
    try:
        save_plot(result, folder / FILES[2])
    except MissingPlots as error:
        speak(f"no plot: {error}")
    return result


class _Store:
    """Finished rows, on disk as they come."""

    def __init__(self, path: Path, config_hash: str, restart: bool) -> None:
        self._path, self._hash = path, config_hash
        self.done: dict[Key, Row | dict[str, Any]] = {}
        self.by_other_code: set[Key] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if restart:
                path.unlink(missing_ok=True)
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise VesicleError(f"cannot use {path}: {error.strerror or error}") from error
        # A line cut short by a killed process must not swallow the next one.
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                values = json.loads(line)
                if values["config_hash"] == config_hash:
                    self._keep(values)
                elif _base(values["config_hash"]) == _base(config_hash):
                    row = values.get("row") or values["missing"]
                    self.by_other_code.add((row["method"], row["subset"], row["budget"]))
            except (ValueError, LookupError, TypeError, VesicleError):
                continue  # not a whole row: it will be computed again

    def _keep(self, values: dict[str, Any]) -> None:
        row = Row.from_dict(values["row"]) if "row" in values else values["missing"]
        key = row.key if isinstance(row, Row) else (row["method"], row["subset"], row["budget"])
        self.done[key] = row

    def add(self, values: dict[str, Any]) -> None:
        """Append {"row": ...} or {"missing": ...} and make sure that it is on disk."""
        line = json.dumps({"config_hash": self._hash, **values}, allow_nan=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise VesicleError(f"cannot write {self._path}: {error.strerror or error}") from error
        self._torn = False
        self._keep(values)


def _base(config_hash: str) -> str:
    """Without the code's part, which early lines do not have."""
    return config_hash.rpartition("-")[0] or config_hash


class _Subset:
    """A set of windows, with the ledger for their length."""

    def __init__(self, windows: Windows, model: nn.Module, modulator: Modulator) -> None:
        self.windows = windows
        self.ledger = Ledger(modulator, model_shape(model), windows.length)
        self.learnt: dict[float, Tuned | BudgetError] = {}
        self.controls: dict[float, dict[str, Control]] = {}


class _Session:
    """Computes and stores the rows of one run, and keeps levels and controls that rows share."""

    def __init__(
        self,
        model: nn.Module,
        modulator: Modulator,
        windows: Windows,
        config: EvalConfig,
        codec: Codec,
        store: _Store,
    ) -> None:
        self._model, self._modulator, self._config, self._store = model, modulator, config, store
        self.on_tokens: Callable[[int], None] = lambda n: None
        n = min(config.oracle_windows, len(windows))
        few = windows.ids[torch.arange(n) * len(windows) // n, : config.oracle_length]
        self._subsets = {
            "all": _Subset(windows, model, modulator),
            "oracle": _Subset(Windows.of(few, codec, ""), model, modulator),
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
        if method == "oracle":
            config = self._modulator.predictor.config
            cells = config.n_layers * len(config.transmitters)
            budgets = [b for b in self._config.budgets if b < 1]
            whole = self._config.oracle.tokens(cells, ids.shape[1], budgets[-1])
            return once * 5 + len(ids) * whole // len(budgets)
        return once

    def finish(self, key: Key) -> None:
        """Compute a row, or find that it cannot be had, and store which."""
        start = time.perf_counter()
        method, name, budget = key
        try:
            scores, details = self._scores(key)
        except BudgetError as error:
            reason = {"method": method, "subset": name, "budget": budget, "reason": str(error)}
            self._store.add({"missing": reason})
            return
        row = self._row(key, scores, details, time.perf_counter() - start)
        self._store.add({"row": asdict(row)})

    def _row(self, key: Key, scores: Scores, details: dict[str, Any], seconds: float) -> Row:
        method, name, budget = key
        windows = self._subsets[name].windows
        mean = scores.nats / (windows.length - 1)
        dense_row = self._store.done.get(("dense", name, 1.0))
        dense = dense_row.window_nats if isinstance(dense_row, Row) else mean
        delta = paired_difference(mean, dense, self._config.seed)
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

    def _tuned(self, subset: _Subset, budget: float, key: Key) -> Tuned:
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
        ledger, seed = self._subsets[name].ledger, self._config.seed
        match method:
            case "uniform":
                return controls.uniform(ledger, budget, seed)
            case "random":
                return controls.random(ledger, budget, seed)
            case "best-of-n":
                return controls.best_of_n(
                    ledger,
                    budget,
                    self._model,
                    self._selection,
                    n=self._config.best_of,
                    seed=seed,
                    on_tokens=self.on_tokens,
                )
            case "oracle":
                return self._oracle(budget)
        levels = self._learnt(name, budget).scores.levels
        rules = {
            "uniform-mix": controls.uniform_mix,
            "per-layer": controls.per_layer,
            "shuffled": controls.shuffled,
        }
        return rules[method](ledger, budget, levels, seed)

    def _oracle(self, budget: float) -> Control:
        subset = self._subsets["oracle"]
        others: list[Control] = []
        for method in ("uniform", *self._config.methods):
            if method in BESIDE_ORACLE[1:] and method not in [o.name for o in others]:
                try:
                    others.append(self._control(method, "oracle", budget))
                except BudgetError:
                    continue  # its own row says so
        if not self._descents:
            self._descents = [
                Descent(self._model, subset.ledger, window, self._config.oracle, self._tick)
                for window in subset.windows.ids
            ]
        return oracle(self._descents, subset.ledger, budget, others)

    def _tick(self, n: int) -> None:
        self.on_tokens(n)


def _check_length(model: nn.Module, length: int) -> None:
    config: Any = model.config
    longest = find_family(config).decoder_config(config).context_window
    if length > longest:
        raise VesicleError(f"length is {length}; this model was made for up to {longest} tokens")


def _facts(
    model: nn.Module,
    modulator: Modulator,
    windows: Windows,
    config: EvalConfig,
    model_name: str,
    modulator_name: str,
) -> dict[str, Any]:
    """Everything in a Result but its rows."""
    settings: Any = model.config
    own = str(getattr(settings, "_name_or_path", "") or "")
    facts: dict[str, Any] = {
        "config": config.to_dict(),
        "seed": config.seed,
        "versions": versions(),
        "hardware": hardware(),
        "model": {
            "name": model_name or Path(own).name or type(model).__name__,
            "shape": model_shape(model).fingerprint(),
            "fingerprint": fingerprint(model),
        },
        "modulator": {
            "name": modulator_name or "a modulator",
            "predictor": modulator.predictor.kind,
            "trained_on": modulator.info.model_name,
            "effectors": {name: e.to_dict() for name, e in modulator.effectors.items()},
            "fingerprint": fingerprint(modulator),
        },
        "data": {
            "description": windows.description,
            "sha256": windows.sha256,
            "n_windows": len(windows),
            "n_tokens": windows.n_scored,
            "n_bytes": sum(windows.n_bytes),
        },
    }
    identity = {
        "schema": SCHEMA,
        "config": {k: v for k, v in facts["config"].items() if k not in _NOT_IN_HASH},
        "versions": {k: v for k, v in facts["versions"].items() if k != "code"},
        "model": [facts["model"]["shape"], facts["model"]["fingerprint"]],
        "modulator": [facts["modulator"]["effectors"], facts["modulator"]["fingerprint"]],
        "dial": modulator.info.dial,
        "data": windows.sha256,
    }
    text = json.dumps(identity, sort_keys=True)
    base = hashlib.sha256(text.encode()).hexdigest()[:16]
    facts["config_hash"] = f"{base}-{facts['versions']['code']}"
    # Through JSON, so that tuples are lists now, as they are when the record is read again.
    return dict(json.loads(json.dumps(facts)))


def _note(key: Key) -> str:
    method, subset, budget = key
    return f"{method} at {budget:g}" + ("" if subset == "all" else ", the oracle's windows")
