"""Running all rows of an evaluation, or what is left of them, to its record."""

from __future__ import annotations

from collections.abc import Sequence

from vesicle.errors import VesicleError
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.run.earlier import keep_earlier
from vesicle.evaluation.run.notices import Say
from vesicle.evaluation.run.part import tell_items
from vesicle.evaluation.run.part_run import PartRun
from vesicle.evaluation.run.progress import progress_bar
from vesicle.evaluation.run.provenance import digest, hardware, versions
from vesicle.evaluation.run.store import ItemStore
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.evaluation.run.text_config import EvalConfig


def run_all(
    runs: Sequence[PartRun],
    subject: Subject,
    config: TaskConfig | EvalConfig,
    store: ItemStore,
    files: Sequence[str],
    show_progress: bool,
    say: Say,
) -> TaskResult:
    """Run rows that are not done, and write the record.

    Args:
        runs: What is run, in order.
        subject: What is evaluated.
        config: What was asked for.
        store: Holds what is done.
        files: The record, and what is made from it: an earlier run's are kept apart.
        show_progress: Show a progress bar on the terminal.
        say: Is told what is kept, what is missing, and how to go on after Ctrl-C.

    Raises:
        VesicleError: A file cannot be written, or nothing could be scored.
        KeyboardInterrupt: After Ctrl-C; what is finished is on disk.
    """
    _run(runs, store, show_progress, say)
    found = [run.rows(store) for run in runs]
    missing = [one for _, absent in found for one in absent]
    result = TaskResult(
        config=config.to_dict(),
        config_hash=digest([run.hash for run in runs]),
        seed=config.seed,
        versions=versions(),
        hardware=hardware(),
        model={**subject.model, "shape": subject.executor.shape.fingerprint()},
        modulator=subject.modulator_facts(),
        tasks=[run.part.facts() for run in runs],
        rows=[row for rows, _ in found for row in rows],
        missing=missing,
    )
    keep_earlier(result, store.folder, files, say)
    result.save(store.folder / files[0])
    if not result.rows:
        raise VesicleError(f"nothing could be scored: {missing[0]['reason']}")
    return result


def _run(runs: Sequence[PartRun], store: ItemStore, show_progress: bool, say: Say) -> None:
    keys = [(run, key) for run in runs for key in run.part.keys]
    places = [(run.hash, key) for run, key in keys]
    what, kept, by_other_code = store.tally(places)
    if kept:
        say(f"{kept} {what} were done before and are kept")
    if by_other_code:
        say(
            f"{by_other_code} {what} were done by other code than this and are run again; "
            f"their lines stay in {store.folder / store.file}"
        )
    try:
        with progress_bar([run.size(key, store) for run, key in keys], show_progress) as bar:
            for run, key in keys:
                name = f"{key[0]}: {key[1]} at {key[2]:g}"
                with bar(name) as tick:
                    run.finish(key, store, tick)
                tell_items(say, f"{name}, item", run.gone(key, store))
    except KeyboardInterrupt:
        done = store.progress(places)
        say(f"interrupted; {done}: run the same command again to go on")
        raise
