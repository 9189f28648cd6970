"""All jobs of the study, in the order of Duo-LLM's three stages, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vesicle.studies.corpora import fingerprint
from vesicle.studies.duo.routers import KINDS
from vesicle.studies.duo.scale import SCALES, Scale
from vesicle.studies.jobs import Job, Stage, run_stages

_HERE = "vesicle.studies.duo"


def stages(scale: str, data: str | None, text: str | None, workers: int) -> list[Stage]:
    """Jobs in stages: what each is called, how many processes it may take, and its jobs.

    Args:
        scale: One of `SCALES`.
        data: As `load_corpus` has it.
        text: More text to train on.
        workers: Processes for what may run side by side.
    """
    size, texts = SCALES[scale], fingerprint("lm", data, text)

    def job(name: str, call: str, seed: int, **more: Any) -> Job:
        return Job(
            name=f"{name}/{seed}",
            call=f"{_HERE}.{call}",
            facts={"scale": scale, "seed": seed, "texts": texts, **more},
            where={"data": data, "text": text},
        )

    seeds = range(size.seeds)
    return [
        ("decoders", workers, [job("decoder", "run:train_decoder", seed) for seed in seeds]),
        ("searches", workers, [j for seed in seeds for j in _searches(job, size, seed)]),
        ("judging", workers, [j for seed in seeds for j in _judged(job, size, seed)]),
        ("speed", 1, [job("speed", "speed:time_oracles", 0)]),
    ]


def _searches(job: Callable[..., Job], size: Scale, seed: int) -> list[Job]:
    """What the jobs after them read."""
    call = "searched:search_split"
    found = [
        job(f"search/{split}", call, seed, split=split, n_choices=2)
        for split in ("test", "drawn", "valid", "labels")
    ]
    if size.three:
        found += [
            job(f"search-three/{split}", call, seed, split=split, n_choices=3)
            for split in ("test", "drawn", "valid")
        ]
    return found


def _judged(job: Callable[..., Job], size: Scale, seed: int) -> list[Job]:
    """Those that take longest come first."""
    found = []
    for kind in KINDS:
        for budget in [None] if kind == "dial" else size.budgets:
            name = f"routers/{kind.replace(' ', '-')}-{budget or 'all'}"
            found.append(job(name, "routers:train_router", seed, kind=kind, budget=budget))
    found += [
        job(f"probes/{oracle}-{budget}", "probes:probe_choices", seed, oracle=oracle, budget=budget)
        for oracle in ("labelled", "unlabelled")
        for budget in size.budgets
    ]
    found += [
        job("controls", "controls:judge_controls", seed),
        job("compared", "searches:compare_searches", seed),
        job("difficulty", "difficulty:tell_difficulty", seed),
        job("oracle", "oracles:judge_oracles", seed, n_choices=2),
    ]
    if size.three:
        found.append(job("oracle-three", "oracles:judge_oracles", seed, n_choices=3))
    return found


def run_study(
    out: Path,
    scale: str,
    *,
    data: str | None,
    text: str | None = None,
    workers: int = 1,
    show: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run what is not done yet, and write the report.

    Args:
        out: Folder to write to; a study in it is gone on with.
        scale: One of `SCALES`.
        data: A local folder, `sample`, or None for the hub.
        text: More running text to train on.
        workers: Processes side by side.
        show: Told the name of a job that is done, how many are, and of how many.

    Returns:
        What `report.json` holds.

    Raises:
        VesicleError: A job failed, or another process writes to the folder.
    """
    from vesicle.studies.duo.report import write_report

    plan = stages(scale, data, text, workers)
    return run_stages(plan, out, partial(write_report, out, scale), show)
