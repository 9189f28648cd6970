"""Stage 3: routers, each trained on a frozen decoder and judged as it is executed.

A router leans towards big or small until validation texts spend what is asked for; on test texts
it may spend a little more or less, and its share is told. Beside it are its own choices, given to
other tokens of the same text: they spend as much in each layer, and differ in nothing but when.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.duo import (
    Budgeted,
    Choices,
    DialRouter,
    ReadOutRouter,
    Router,
    budget_loss,
    oracle_loss,
    routed,
    share_matched,
)
from vesicle.duo.router_training import Loss
from vesicle.plan import FFN_BIG
from vesicle.scratch import Recipe, fit
from vesicle.studies.duo.controls import DRAWS
from vesicle.studies.duo.executed import point, shuffled
from vesicle.studies.duo.oracles import rounded
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import searched

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

KINDS = {
    "read-out": "the paper's: a linear read-out, trained by the loss and one budget",
    "oracle": "the same read-out, trained to choose as the oracle that reads the label",
    "oracle without labels": "the same, after the oracle that is nearest to the all-big output",
    "dial": "an MLP that is told the budget: one router for all of them",
}
_RATE = 1e-2


def train_router(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    kind: str,
    budget: int | None,
) -> dict[str, Any]:
    """One router, trained and judged on the test texts; a job.

    Args:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder, and of the router's batches.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        kind: One of `KINDS`.
        budget: Number of big FFNs that it is trained for; None where it is told.
    """
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    model, choices = run.trained()
    router = new_router(run, kind)
    folder = run.folder(f"{kind.replace(' ', '-')}-{budget or 'all'}")
    steps = run.size.router_steps
    facts = {**run.facts, "kind": kind, "budget": budget}
    loss_at = _loss(run, model, choices, router, kind, budget)
    losses = fit(router, loss_at, Recipe(steps=steps, learning_rate=_RATE), folder, facts=facts)
    budgets = run.size.budgets if budget is None else (budget,)
    return {
        "kind": kind,
        "losses": losses,
        "parameters": sum(p.numel() for p in router.parameters()),
        "rows": [_judged(run, model, choices, router.eval(), n_big) for n_big in budgets],
    }


def new_router(run: Run, kind: str) -> Router:
    """A router before its training."""
    sizes = run.size.n_layers, run.size.decoder.width
    return DialRouter(*sizes, seed=run.seed) if kind == "dial" else ReadOutRouter(*sizes)


def _loss(
    run: Run,
    model: LlamaForCausalLM,
    choices: Choices,
    router: Router,
    kind: str,
    budget: int | None,
) -> Loss:
    size = run.size
    batch = max(1, size.batch_tokens // size.length)
    if kind in ("read-out", "dial"):
        shares = [n / size.n_layers for n in (size.budgets if budget is None else [budget])]
        budgets = (shares[0],) if budget is not None else (0.8 * min(shares), 1.0)
        how = Budgeted(steps=size.router_steps, budgets=budgets)
        train = run.split("train")
        return budget_loss(model, choices, router, train, how, batch=batch, seed=run.seed)
    assert budget is not None
    found = searched(run, "labels")
    return oracle_loss(
        model,
        choices,
        router,
        run.split("labels")[:, :-1],
        found.patterns("labelled" if kind == "oracle" else "unlabelled", budget),
        dial=budget / size.n_layers,
        batch=batch,
        seed=run.seed,
    )


def _judged(
    run: Run, model: LlamaForCausalLM, choices: Choices, router: Router, n_big: int
) -> dict[str, Any]:
    share, test = n_big / run.size.n_layers, run.split("test")
    lean = share_matched(model, choices, router, run.split("valid")[:, :-1], share)
    _, taken = routed(model, choices, router, test[:, :-1], share, lean)
    rng = torch.Generator().manual_seed(run.seed)
    moved = [shuffled(taken, rng) for _ in range(DRAWS)]
    found = searched(run, "test")
    return {
        "budget": n_big,
        "lean": round(lean, 4),
        **point(model, choices, test, [taken]),
        "shuffled": point(model, choices, test, moved),
        "agreement": {
            name: rounded(_agreement(taken, moved, found.patterns(oracle, n_big)))
            for name, oracle in (("oracle", "labelled"), ("oracle without labels", "unlabelled"))
        },
        "layers": rounded(taken.eq(FFN_BIG).float().mean((0, 1))),
        "numbers": _numbers(taken),
    }


def _agreement(taken: Tensor, moved: list[Tensor], patterns: Tensor) -> Tensor:
    """(2,) shares of choices that are the oracle's: of the router, and of its shuffled choices."""
    return torch.stack([(torch.stack(own) == patterns).float().mean() for own in ([taken], moved)])


def _numbers(taken: Tensor) -> list[float]:
    """(L + 1,) shares of tokens with 0, 1, … L big FFNs."""
    counts = taken.eq(FFN_BIG).sum(-1).flatten().bincount(minlength=taken.shape[-1] + 1)
    return rounded(counts / counts.sum())
