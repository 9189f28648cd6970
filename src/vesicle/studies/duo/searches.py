"""Searches that try few patterns, beside the exhaustive one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesicle.duo import Context, beam, by_gains, greedy
from vesicle.duo.search import Evaluate, Found
from vesicle.studies.duo.oracles import rounded
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import searched

SEARCHES = ("greedy", "beam of 4", "by gains")


def compare_searches(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """How far above the exhaustive search each ends, in nats, by number of big FFNs; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    model, _ = run.trained()
    test, oracles = run.split("test"), searched(run, "test").oracles
    rows: dict[tuple[str, str], list[Tensor]] = {}
    evaluated = dict[str, int]()
    for tokens, oracle in list(zip(test, oracles, strict=True))[: run.size.compared_windows]:
        context = Context(model, tokens)
        for cost, best in (
            ("loss", oracle.labelled.loss),
            ("divergence", oracle.unlabelled.divergence),
        ):
            for name in SEARCHES:
                found = _found(name, _evaluate(context, cost), run.size.n_layers)
                rows.setdefault((name, cost), []).append((found.cost - best).mean(0))
                evaluated[name] = found.evaluated
    return {
        "rows": [
            {
                "search": name,
                "cost": cost,
                "evaluated": evaluated[name],
                "above": rounded(torch.stack(above)),
            }
            for (name, cost), above in rows.items()
        ],
        "patterns": 2**run.size.n_layers,
    }


def _evaluate(context: Context, cost: str) -> Evaluate:
    if cost == "loss":
        return lambda patterns: context.evaluate(patterns).loss
    return lambda patterns: context.evaluate(patterns).divergence


def _found(name: str, evaluate: Evaluate, n_layers: int) -> Found:
    if name == "greedy":
        return greedy(evaluate, n_layers)
    return (
        beam(evaluate, n_layers, width=4) if name == "beam of 4" else by_gains(evaluate, n_layers)
    )
