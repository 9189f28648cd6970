"""Delays pruned to a few weights, as in the paper that they are from: does it hold? A job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.predictors import DelaysPredictor
from vesicle.predictors.delays import TAPS
from vesicle.studies.neuro.judging import curve
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.variants import variants

DELAYS = "predictor-delays"
KEPT = (TAPS, 4, 2, 1)


def judge_pruned(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """The variant with delays along its dial, each feature with its largest taps alone; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject = run.trained(variants()[DELAYS])
    assert subject.modulator is not None
    whole = subject.modulator.predictor
    assert isinstance(whole, DelaysPredictor)
    found = {}
    for keep in KEPT:
        subject.modulator = subject.modulator.with_levels(whole.pruned(keep))
        found[str(keep)] = curve(run, subject)
    return {"points": found}
