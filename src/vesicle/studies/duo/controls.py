"""Stage 3, what routers are judged beside: chance, fixed patterns, oracles as executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.duo import TWO, Choices, all_patterns
from vesicle.plan import FFN_BIG, FFN_SMALL
from vesicle.studies.duo.executed import executed, point, random_patterns
from vesicle.studies.duo.oracles import DRAWN, best_fixed
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import searched

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DRAWS = 4
"""Random patterns, and orders, over which a control's loss is a mean."""


def judge_controls(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Losses on the test texts of all that learns nothing; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    model, choices = run.trained()
    test, n_layers = run.split("test"), run.size.n_layers
    shape = (len(test), test.shape[1] - 1, n_layers)
    rows = []
    for name, choice, n_big in (("all small", FFN_SMALL, 0), ("all big", FFN_BIG, n_layers)):
        found = point(model, choices, test, [torch.full(shape, choice)])
        rows.append({"name": name, "budget": n_big, **found})
    for n_big in sorted({1, *run.size.budgets}):
        for name, draws in _rivals(run, model, choices, shape, n_big).items():
            rows.append({"name": name, "budget": n_big, **point(model, choices, test, draws)})
    return {"rows": rows}


def _rivals(
    run: Run,
    model: LlamaForCausalLM,
    choices: Choices,
    shape: tuple[int, int, int],
    n_big: int,
) -> dict[str, list[Tensor]]:
    """Patterns (N, T, L), by name."""
    test, valid = (searched(run, split) for split in ("test", "valid"))
    rng = torch.Generator().manual_seed(run.seed)
    on_valid = torch.stack([o.pattern_loss for o in valid.oracles]).mean(0)
    patterns = all_patterns(TWO, run.size.n_layers)
    fixed = patterns[best_fixed(patterns, on_valid)[n_big]]
    drawn = best_executed(run, model, choices, n_big)
    return {
        "random": [random_patterns(shape, n_big, rng) for _ in range(DRAWS)],
        "fixed": [fixed.expand(shape)],
        f"fixed of {DRAWN}": [drawn.expand(shape)],
        "oracle": [test.patterns("labelled", n_big)],
        "oracle without labels": [test.patterns("unlabelled", n_big)],
    }


def best_executed(run: Run, model: LlamaForCausalLM, choices: Choices, n_big: int) -> Tensor:
    """(L,) of patterns drawn at random, the best for validation texts that all take it."""
    rng, valid = torch.Generator().manual_seed(run.seed), run.split("valid")
    drawn = random_patterns((1, DRAWN, run.size.n_layers), n_big, rng)[0].unique(dim=0)
    losses = [float(executed(model, choices, valid, pattern).mean()) for pattern in drawn]
    return drawn[losses.index(min(losses))]
