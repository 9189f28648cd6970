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

from pathlib import Path

from vesicle.errors import VesicleError
from vesicle.evaluation.methods.names import NAMES, check_trained
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.run.notices import Say, to_standard_error
from vesicle.evaluation.run.oracle_run import OracleRun
from vesicle.evaluation.run.part import oracle_part, part_of
from vesicle.evaluation.run.part_run import PartRun
from vesicle.evaluation.run.session import run_all
from vesicle.evaluation.run.store import ItemStore
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.folders import locked

FILES = ("result.json", "table.md", "quality_against_cost.png")
"""The record, and what is made from it."""


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
        _check_subject(subject, config)
        if config.dial == "shipped" and subject.modulator is not None:
            for budget in config.budgets:
                if line := subject.modulator.below_reach(budget, config.acts):
                    say(line)
        runs = _runs(subject, config)
        for run in runs:
            run.part.tell_missing(say)
        store = ItemStore(Path(out), restart)
        return run_all(runs, subject, config, store, FILES, show_progress, say)


def _runs(subject: Subject, config: TaskConfig) -> list[PartRun]:
    """Of each task, and of the windows of a text on which the oracle searches."""
    runs: list[PartRun] = []
    for name in config.tasks:
        part = part_of(name, subject, config)
        runs.append(PartRun(part, subject, config))
        keys = config.oracle_keys(name)
        if keys:
            n, length = config.oracle_windows, config.oracle_length
            few = oracle_part(part, keys, n, length, subject.codec)
            runs.append(OracleRun(few, subject, config))
    return runs


def _check_subject(subject: Subject, config: TaskConfig) -> None:
    ours = [m for m in config.methods if m in NAMES and m != "dense"]
    modulator = subject.modulator
    if ours and min(config.budgets) < 1:
        if modulator is None:
            raise VesicleError(f"{ours[0]} needs a modulator; name one with --modulator")
        check_trained(modulator, subject.executor.shape)
