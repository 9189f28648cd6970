"""The four systems together: transmitters, Duo-LLM, tiles (ATT), and a memory that forgets (NAMM).

Each set of the first three is a variant that was trained. Memory is added when it is judged: beside
each stands the same with a cache that keeps the first and the newest half of a text, forgotten for
good every 64 tokens, where a NAMM of a pretrained model would say what to keep (`eviction`). Tiles
take GABA's place, and know nothing of what is forgotten, so the two are not joined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.eviction import SinksAndRecent
from vesicle.plan import Dense
from vesicle.studies.neuro.judging import point
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.variants import variants

SETS = {
    "transmitters": ("transmitters",),
    "duo": ("duo",),
    "tiles": ("tiles",),
    "transmitters-duo": ("transmitters", "duo"),
    "transmitters-tiles": ("transmitters", "tiles"),
    "duo-tiles": ("duo", "tiles"),
    "transmitters-duo-tiles": ("transmitters", "duo", "tiles"),
}
"""Which systems each variant has."""

REMEMBERING = ("dense", *(name for name, systems in SETS.items() if "tiles" not in systems))
"""Variants that are judged with half of the cache as well."""

_INTERVAL = 64


def judge_memory(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    variant: str,
) -> dict[str, Any]:
    """A variant with half of its cache, along its dial; a job.

    Args:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        variant: One of `REMEMBERING`.
    """
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject, size = run.trained(variants()[variant]), run.size
    dials = sorted(size.dials, reverse=True) if subject.modulator is not None else []
    entries = max(_INTERVAL, size.length // 2)
    points = []
    for dial in [1.0, *dials]:
        inner = Dense() if subject.modulator is None else subject.served(dial)
        method = SinksAndRecent(entries, interval=_INTERVAL, inner=inner)
        points.append(point(run, subject, dial, method))
    return {"entries": entries, "points": points}
