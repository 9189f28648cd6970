"""Loss against executed cost on a text: a modulator beside every control, hard reference.

    config = EvalConfig(data="test.jsonl.gz")
    result = evaluate(model, Text.from_folder(folder), modulator, config, "out")

For each budget the learnt modulator's dial is tuned until it executes that share of the dense
FLOPs, and each control is scaled to the same executed share (`controls`, `oracle`). The output
folder holds

    rows.jsonl             one line a finished row; rows of the same settings are kept
    result.json            the whole `TaskResult`
    table.md               the same as tables
    loss_against_cost.png  a plot, if matplotlib is installed
    levels/                released levels of learnt rows, where a control needs them

The oracle is affordable on few, short windows only. On these the learnt modulator and the static
controls are tuned and scored once more (task `text-oracle`), so that regret is taken at equal cost
on the same text.

Rows are run as those of any task are (`part_run`, `oracle_run`). What differs: the text is any, the
dial is turned on all of it, and the loss itself is what methods are compared by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vesicle.errors import VesicleError
from vesicle.evaluation.execution.items import window
from vesicle.evaluation.execution.language_modelling import Windows, load_windows, model_shape
from vesicle.evaluation.execution.prompts import Codec
from vesicle.evaluation.execution.transformers_executor import TransformersExecutor
from vesicle.evaluation.methods.names import check_trained
from vesicle.evaluation.report.plots import save_plots
from vesicle.evaluation.report.results import TEXT, TaskResult
from vesicle.evaluation.report.table import markdown
from vesicle.evaluation.run.notices import Say, to_standard_error
from vesicle.evaluation.run.oracle_run import OracleRun
from vesicle.evaluation.run.part import Part, oracle_part
from vesicle.evaluation.run.part_run import PartRun
from vesicle.evaluation.run.provenance import fingerprint
from vesicle.evaluation.run.session import run_all
from vesicle.evaluation.run.store import RowStore
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.text_config import DTYPES, EvalConfig
from vesicle.families import find_family
from vesicle.figures import MissingPlots
from vesicle.files import atomic_path
from vesicle.folders import locked
from vesicle.modulator import Modulator
from vesicle.tasks.metrics.likelihood import BitsPerByte, Loss
from vesicle.tasks.sources import Loaded
from vesicle.tasks.wikitext import WikiText2

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
) -> TaskResult:
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
        VesicleError: The folder cannot be written or another process writes to it, or nothing could
            be scored.
        KeyboardInterrupt: After Ctrl-C; finished rows are on disk.
    """
    with locked(out):
        check_trained(modulator, model_shape(model))
        windows = _windows(model, codec, config)
        subject = Subject(
            executor=TransformersExecutor(model, attached=False, batch=config.batch),
            codec=codec,
            ends=frozenset(),
            modulator=modulator,
            model=_model_facts(model, model_name, config),
            modulator_name=modulator_name or "a modulator",
        )
        runs = _runs(subject, windows, config)
        store = RowStore(Path(out), restart)
        result = run_all(runs, subject, config, store, FILES, progress, say)
        with atomic_path(Path(out) / FILES[1]) as part:
            part.write_text(markdown(result), encoding="utf-8")
        try:
            save_plots(result, Path(out), FILES[2], rise=True)
        except MissingPlots as error:
            say(f"no plot: {error}")
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


def _runs(subject: Subject, windows: Windows, config: EvalConfig) -> list[PartRun]:
    """Of all windows, and of those on which the oracle searches."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_IN_HASH}
    ids = windows.ids.tolist()
    keys = config.keys()
    part = Part(
        name=TEXT,
        title="All windows",
        task=_Text(),
        loaded=Loaded(
            items=(),
            available=len(ids),
            split=config.split,
            origin="local",
            description=windows.description,
            sha256=windows.sha256,
        ),
        items=[window(f"window {i}", row, subject.codec) for i, row in enumerate(ids)],
        keys=[key for key in keys if key[0] == TEXT],
        exact=True,
        selection_length=config.selection_length,
        settings=settings,
    )
    few = [key for key in keys if key[0] != TEXT]
    runs = [PartRun(part, subject, config.rules())]
    if few:
        n, length = config.oracle_windows, config.oracle_length
        small = oracle_part(part, few, n, length, subject.codec)
        runs.append(OracleRun(small, subject, config.rules(), config.oracle))
    return runs


class _Text(WikiText2):
    """Any text, as WikiText is run; its loss is what methods are compared by."""

    name = TEXT
    metrics = (Loss(), BitsPerByte())


def _model_facts(model: nn.Module, name: str, config: EvalConfig) -> dict[str, Any]:
    loaded: Any = model.config
    own = str(getattr(loaded, "_name_or_path", "") or "")
    return {
        "name": name or Path(own).name or type(model).__name__,
        "fingerprint": fingerprint(model),
        "through": "reference",
        "weights": config.dtype,
        "kv": config.dtype,
    }
