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

import json
from pathlib import Path
from typing import Any

from torch import nn

from vesicle.errors import VesicleError
from vesicle.evaluation.earlier import keep_earlier
from vesicle.evaluation.language_modelling import Windows, load_windows, model_shape
from vesicle.evaluation.methods import check_trained
from vesicle.evaluation.plots import MissingPlots
from vesicle.evaluation.progress import progress_bar
from vesicle.evaluation.prompts import Codec
from vesicle.evaluation.provenance import fingerprint, hardware, versions, with_code
from vesicle.evaluation.row_store import ROWS, RowStore
from vesicle.evaluation.session import Say, resumable, tell_kept, to_standard_error
from vesicle.evaluation.text_config import DTYPES, EvalConfig
from vesicle.evaluation.text_plots import save_plot
from vesicle.evaluation.text_results import SCHEMA, Key, Result, Row
from vesicle.evaluation.text_rows import TextRows
from vesicle.evaluation.text_table import markdown
from vesicle.families import find_family
from vesicle.files import atomic_path
from vesicle.folders import locked
from vesicle.modulator import Modulator

FILES = ("result.json", "table.md", "loss_against_cost.png")
"""The record, and what is made from it."""
_NOT_IN_HASH = ("budgets", "methods", "data", "split", "field")


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
    say: Say = to_standard_error,
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
    with locked(out):
        check_trained(modulator, model_shape(model))
        windows = _windows(model, codec, config)
        facts = _facts(model, modulator, windows, config, model_name, modulator_name)
        store = RowStore(Path(out), facts["config_hash"], restart=restart)
        rows = TextRows(model, modulator, windows, config, codec, store)
        _run(rows, config.keys(), store, Path(out), progress, say)
        found = [store.done[key] for key in config.keys()]
        result = Result(
            **facts,
            rows=[row for row in found if isinstance(row, Row)],
            missing=[row for row in found if not isinstance(row, Row)],
        )
        _write(result, Path(out), say)
    return result


def _windows(model: nn.Module, codec: Codec, config: EvalConfig) -> Windows:
    """The text, in windows that the model can read; the model is converted."""
    model.to(dtype=DTYPES[config.dtype])
    loaded: Any = model.config
    longest = find_family(loaded).decoder_config(loaded).context_window
    if config.length > longest:
        raise VesicleError(
            f"length is {config.length}; this model was made for up to {longest} tokens"
        )
    return load_windows(
        config.data,
        codec,
        split=config.split,
        field=config.field,
        length=config.length,
        limit=config.limit,
    )


def _run(
    rows: TextRows, keys: list[Key], store: RowStore, folder: Path, progress: bool, say: Say
) -> None:
    """Compute the rows that are not done."""
    of = f"of {len(keys)} rows"
    kept = sum(key in store.done for key in keys)
    stale = len(set(keys) & store.by_other_code - store.done.keys())
    tell_kept(say, of, kept, stale, folder / ROWS)

    def done() -> str:
        return f"{sum(key in store.done for key in keys)} {of} are done"

    with resumable(say, done), progress_bar([rows.tokens(k) for k in keys], progress) as bar:
        for key in keys:
            with bar(_note(key)) as rows.on_tokens:
                if key not in store.done:
                    rows.finish(key)


def _write(result: Result, folder: Path, say: Say) -> None:
    """The record, and what is made from it."""
    keep_earlier(result, folder, FILES, say)
    result.save(folder / FILES[0])
    with atomic_path(folder / FILES[1]) as part:
        part.write_text(markdown(result), encoding="utf-8")
    try:
        save_plot(result, folder / FILES[2])
    except MissingPlots as error:
        say(f"no plot: {error}")


def _facts(
    model: nn.Module,
    modulator: Modulator,
    windows: Windows,
    config: EvalConfig,
    model_name: str,
    modulator_name: str,
) -> dict[str, Any]:
    """Everything in a Result but its rows."""
    loaded: Any = model.config
    own = str(getattr(loaded, "_name_or_path", "") or "")
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
    settings = {
        "schema": SCHEMA,
        "config": {k: v for k, v in facts["config"].items() if k not in _NOT_IN_HASH},
        "model": [facts["model"]["shape"], facts["model"]["fingerprint"]],
        "modulator": [facts["modulator"]["effectors"], facts["modulator"]["fingerprint"]],
        "dial": modulator.info.dial,
        "data": windows.sha256,
    }
    facts["config_hash"] = with_code(settings, facts["versions"])
    # Through JSON, so that tuples are lists now, as they are when the record is read again.
    return dict(json.loads(json.dumps(facts)))


def _note(key: Key) -> str:
    method, subset, budget = key
    return f"{method} at {budget:g}" + ("" if subset == "all" else ", the oracle's windows")
