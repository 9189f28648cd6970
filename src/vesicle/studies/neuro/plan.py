"""All jobs of the study, in the order of the proposal's steps, and the report at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vesicle.studies.corpora import TASKS, fingerprint
from vesicle.studies.jobs import Job, Stage, run_stages
from vesicle.studies.neuro.hybrids import REMEMBERING
from vesicle.studies.neuro.scale import SCALES
from vesicle.studies.neuro.tables import WHOLE
from vesicle.studies.neuro.variants import Variant, variants

_HERE = "vesicle.studies.neuro"
_INSIDE = {
    "controls": "controls:judge_controls",
    "levels": "analysis:tell_levels",
    "doses": "analysis:clamp_doses",
    "lesions": "analysis:lesion",
    "paths": "analysis:draw_paths",
    "pollution": "pollution:judge_pollution",
    "pruned": "pruning:judge_pruned",
}
SIZED = ("dense", WHOLE, "uniform")
"""Variants of the scaling study."""


def stages(scale: str, data: str | None, text: str | None, workers: int) -> list[Stage]:
    """Jobs in stages: what each is called, how many processes it may take, and its jobs.

    Args:
        scale: One of `SCALES`.
        data: As `load_corpus` has it.
        text: More text to train on.
        workers: Processes for what may run side by side.
    """
    size = SCALES[scale]
    texts = "+".join(fingerprint(task, data, text) for task in TASKS)

    def job(name: str, call: str, seed: int, **more: Any) -> Job:
        return Job(
            name=f"{name}/{seed}",
            call=f"{_HERE}.{call}",
            facts={"scale": scale, "seed": seed, "texts": texts, **more},
            where={"data": data, "text": text},
        )

    def variant(one: Variant, seed: int, sized: tuple[int, int] | None = None) -> Job:
        more: dict[str, Any] = {} if sized is None else {"sized": list(sized)}
        name = one.name if sized is None else f"{one.name}-{sized[0]}x{sized[1]}"
        return job(
            f"variant/{name}",
            "training:train_variant",
            seed,
            variant=one.name,
            what=one.facts,
            **more,
        )

    def base(seed: int, sized: tuple[int, int] | None = None) -> Job:
        more: dict[str, Any] = {} if sized is None else {"sized": list(sized)}
        name = "base" if sized is None else f"base-{sized[0]}x{sized[1]}"
        return job(name, "training:train_base", seed, **more)

    seeds, size_seeds = range(size.seeds), range(size.size_seeds)
    known = variants()
    return [
        ("decoders", workers, [base(seed) for seed in seeds]),
        ("variants", workers, [variant(v, seed) for v in known.values() for seed in seeds]),
        (
            "looking inside",
            workers,
            [job(name, call, seed) for name, call in _INSIDE.items() for seed in seeds]
            + [
                job(f"memory/{name}", "hybrids:judge_memory", seed, variant=name)
                for name in REMEMBERING
                for seed in seeds
            ],
        ),
        (
            "decoders of other sizes",
            workers,
            [base(seed, sized) for sized in size.sizes for seed in size_seeds],
        ),
        (
            "sizes",
            workers,
            [
                variant(known[name], seed, sized)
                for sized in size.sizes
                for name in SIZED
                for seed in size_seeds
            ],
        ),
        (
            "speed",
            1,
            [
                job("speed/trained", "speed:time_trained", 0),
                *(
                    Job(
                        name=f"speed/{shape}",
                        call=f"{_HERE}.speed:time_shape",
                        facts={"scale": scale, "shape": shape},
                    )
                    for shape in size.timed
                ),
                *([] if scale == "debug" else [Job(name="case", call=f"{_HERE}.case:answer")]),
            ],
        ),
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
    from vesicle.models.resolve import resolve_model
    from vesicle.studies.neuro.report import write_report

    if scale != "debug":
        resolve_model(None)  # for the passage at the end: missing, it is told before hours of work
    plan = stages(scale, data, text, workers)
    return run_stages(plan, out, partial(write_report, out, scale), show)
