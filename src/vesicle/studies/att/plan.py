"""All jobs of the study, in the order of its proposal's ten steps, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vesicle.studies.att.scale import SCALES
from vesicle.studies.att.variants import ABLATIONS, COMPARED, IN_TASKS, SELECTED
from vesicle.studies.corpora import TASKS, fingerprint
from vesicle.studies.jobs import Job, Stage, run_stages

_HERE = "vesicle.studies.att"


def stages(scale: str, data: str | None, text: str | None, workers: int) -> list[Stage]:
    """Jobs in stages: what each is called, how many processes it may take, and its jobs.

    Args:
        scale: One of `SCALES`.
        data: As `load_corpus` has it.
        text: More text to train on.
        workers: Processes for what may run side by side.
    """
    size = SCALES[scale]
    where = {"data": data, "text": text}
    texts = {task: fingerprint(task, data, text) for task in TASKS}

    def common(task: str, seed: int) -> dict[str, Any]:
        return {"task": task, "scale": scale, "seed": seed, "texts": texts[task]}

    bases = [
        Job(
            name=f"{task}/base/{seed}",
            call=f"{_HERE}.runs:train_base",
            facts=common(task, seed),
            where=where,
        )
        for task in TASKS
        for seed in range(size.seeds[task])
    ]
    trained = []
    for task in TASKS:
        chosen = [(v, size.seeds[task]) for v in COMPARED if task == "lm" or v.name in IN_TASKS]
        if task == "lm":
            chosen += [(v, size.ablation_seeds) for v in ABLATIONS]
        for variant, n_seeds in chosen:
            # Of other tasks than language modelling, the larger share alone.
            shares = size.shares if task == "lm" else size.shares[:1]
            for share in shares if variant.per_share else [None]:
                name = variant.name if share is None else f"{variant.name}-{share}"
                trained += [
                    Job(
                        name=f"{task}/{name.replace(' ', '-')}/{seed}",
                        call=f"{_HERE}.runs:train_variant",
                        facts={**common(task, seed), "variant": variant.name, "share": share},
                        where=where,
                    )
                    for seed in range(n_seeds)
                ]
    chosen_pages = [
        Job(
            name=f"lm/{rule}/{seed}",
            call=f"{_HERE}.runs:judge_selected",
            facts={**common("lm", seed), "rule": rule},
            where=where,
        )
        for rule in SELECTED
        for seed in range(size.seeds["lm"])
    ]
    drawn = [
        Job(
            name="tilings",
            call=f"{_HERE}.drawing:draw_tilings",
            facts={"scale": scale, "texts": texts["lm"]},
            where=where,
        )
    ]
    if scale != "debug":  # which does without a model
        drawn.append(Job(name="case", call=f"{_HERE}.case:answer_case"))
    timed = [
        Job(
            name="speed/attention",
            call=f"{_HERE}.speed:time_attention",
            facts={"lengths": list(size.speed_lengths)},
        ),
        Job(
            name="speed/decoders",
            call=f"{_HERE}.speed:time_decoders",
            facts={"sizes": [list(s) for s in size.sizes], "length": max(size.speed_lengths) // 4},
        ),
    ]
    return [
        ("decoders", workers, bases),
        ("variants", workers, trained),
        ("chosen pages", workers, chosen_pages),
        ("tilings", 1, drawn),
        ("speed", 1, timed),
    ]


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
    from vesicle.studies.att.report import write_report

    plan = stages(scale, data, text, workers)
    return run_stages(plan, out, partial(write_report, out, scale), show)
