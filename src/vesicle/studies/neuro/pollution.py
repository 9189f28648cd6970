"""Pollution: what approximate steps do to a dense stretch that comes after them; a job.

The first half of each text is served below rest, the second is dense, and what the second loses
over an all-dense pass is what its keys, values and states inherited. Beside it stands what the
first half lost itself. Each transmitter acts alone, held at a level, and all as they were learnt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vesicle.studies.neuro.analysis import replayed, served, stacked, token_losses
from vesicle.studies.neuro.run import Run
from vesicle.transmitters import index

_HELD = 0.5


def judge_pollution(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """What both halves of the test texts lose, nats a token; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject, dial, cost = served(run)
    assert subject.modulator is not None
    names = subject.modulator.predictor.config.transmitters
    rows = []
    for task, ids, scored in run.judged("test"):
        half = ids.shape[1] // 2
        dense = token_losses(subject, None, ids)
        learnt = stacked(subject, subject.method(dial), ids, scored)
        released = learnt[..., [index(name) for name in names]]
        tried = {"as learnt": released}
        for a, name in enumerate(names):
            tried[name] = np.ones_like(released)
            tried[name][..., a] = _HELD
        for name, levels in tried.items():
            levels[:, half:] = 1.0
            more = token_losses(subject, replayed(subject, levels), ids) - dense
            counts = scored[:, 1:].to(more.dtype)
            # The first dense token is predicted by the last approximate one.
            parts = {"approximate": slice(0, half - 1), "dense_after": slice(half, None)}
            rows.append(
                {"task": task, "what": name}
                | {
                    key: [
                        round(v, 5)
                        for v in (
                            (more * counts)[:, part].sum(1) / counts[:, part].sum(1).clamp_min(1)
                        ).tolist()
                    ]
                    for key, part in parts.items()
                }
            )
    return {"cost": round(cost, 4), "held": _HELD, "rows": rows}
