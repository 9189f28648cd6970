"""What the exhaustive oracle costs, by four ways of computing it, on one text of this machine.

- `tree`: each prefix of a pattern once (`vesicle.duo.exhaustive`).
- `each pattern`: the same context, pattern by pattern (`Context.evaluate`).
- `whole passes`: a forward pass of the text for each pattern, which all tokens take at once. It
  answers another question, for every token has the same earlier choices as itself.
- `by definition`: a forward pass for each token and pattern (`vesicle.duo.naive`).

The last two are timed on some patterns and positions, and multiplied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vesicle.bench.machine import hardware
from vesicle.duo import TWO, Context, all_patterns, exhaustive
from vesicle.duo.naive import measure
from vesicle.studies.duo.executed import executed
from vesicle.studies.duo.run import Run, spread

_Result = TypeVar("_Result")


def time_oracles(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Seconds for all patterns of one test text, and how far the ways are apart; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    model, choices = run.trained()
    size, tokens = run.size, run.split("test")[0]
    context, patterns = Context(model, tokens), all_patterns(TWO, size.n_layers)
    some = patterns[spread(len(patterns), size.timed_patterns)]
    # Evenly spread, since a pass of the definition is as long as the text up to its token.
    at = spread(context.n_tokens, 2 * size.timed_positions + 1)[1::2]
    context.evaluate(some[:2])  # the first pass is slower
    tree, tree_s = _timed(lambda: _grown(context))
    each, each_s = _timed(lambda: context.evaluate(patterns))
    _, whole_s = _timed(lambda: [executed(model, choices, tokens[None], p) for p in some])
    plain, plain_s = _timed(lambda: measure(model, choices, tokens, some, positions=at))
    places = spread(len(patterns), size.timed_patterns)
    return {
        "rows": [
            _row("tree", tree_s, 1.0),
            _row("each pattern", each_s, 1.0),
            _row("whole passes", whole_s, len(patterns) / len(some)),
            _row(
                "by definition",
                plain_s,
                len(patterns) / len(some) * context.n_tokens / len(at),
            ),
        ],
        "apart": {
            "each pattern": _apart(tree, each.loss),
            "by definition": _apart(tree[places][:, at], plain.loss),
        },
        "patterns": len(patterns),
        "tokens": context.n_tokens,
        "machine": str(hardware()["cpu"]),
        "threads": torch.get_num_threads(),
    }


def _grown(context: Context) -> Tensor:
    return torch.cat([measured.loss for _, measured in exhaustive(context, TWO)], dim=1)


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.perf_counter()
    found = call()
    return found, time.perf_counter() - started


def _row(name: str, seconds: float, times: float) -> dict[str, Any]:
    return {
        "way": name,
        "measured_s": round(seconds, 4),
        "whole_s": round(seconds * times, 4),
        "extrapolated": times > 1,
    }


def _apart(left: Tensor, right: Tensor) -> float:
    """Largest difference, in nats."""
    return float((left - right).abs().max())
