"""Training: the dense decoder, and each variant that goes on from it; jobs of the study."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vesicle.studies.neuro.judging import curve
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.variants import variants


def train_base(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    sized: list[int] | None = None,
) -> dict[str, Any]:
    """The dense decoder of a seed and a size; a job."""
    run = _run(out, scale, seed, texts, data, text, sized)
    model, size = run.fresh(), run.size
    started = time.monotonic()
    losses = run.fit_base(model)
    return {
        "losses": losses,
        "tokens": size.base_steps * size.batch * size.length,
        "training_tokens": {task: corpus.train.numel() for task, corpus in run.corpora.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
    }


def train_variant(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    variant: str,
    what: dict[str, Any],
    sized: list[int] | None = None,
) -> dict[str, Any]:
    """One variant, trained and judged along its dial; a job.

    Args:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder and of the order of its texts.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        variant: One of `variants()`.
        what: Its fields; with others its training is another.
        sized: Width and layers; those of the scale if not given.
    """
    run = _run(out, scale, seed, texts, data, text, sized)
    subject = run.untrained(variants()[variant])
    started, size = time.monotonic(), run.size
    losses = run.fit_variant(subject)
    trained_s = time.monotonic() - started
    return {
        "losses": losses,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "added": 0
        if subject.modulator is None
        else sum(p.numel() for p in subject.modulator.parameters()),
        "points": curve(run, subject),
        "tokens_per_s": round(size.steps * size.batch * size.length / max(trained_s, 1e-9)),
        "judged_s": round(time.monotonic() - started - trained_s, 1),
    }


def _run(
    out: Path,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    sized: list[int] | None,
) -> Run:
    return Run(
        out=out,
        scale=scale,
        seed=seed,
        texts=texts,
        data=data,
        text=text,
        sized=None if sized is None else (sized[0], sized[1]),
    )
