"""How a variant is judged: its texts' losses and what was executed, along its dial.

Every pass is executed: hard decisions, a Plan, and its price. Costs that lie between two dials are
interpolated, text by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vesicle.cost import Cost, price
from vesicle.plan import FloatArray, Method, Plan
from vesicle.reference.attach import attach
from vesicle.shapes import Overhead
from vesicle.studies.neuro.learning import text_losses

if TYPE_CHECKING:
    from torch import Tensor

    from vesicle.studies.neuro.run import Run
    from vesicle.studies.neuro.subject import Subject

_AT_ONCE = 8
_NEAR, _TRIES = 3e-3, 10

Point = dict[str, Any]
"""`dial`, `cost` (executed share of the dense FLOPs) and `losses` (by task, of each text)."""


@torch.no_grad()
def executed(
    subject: Subject, method: Method | Sequence[Method], ids: Tensor, scored: Tensor
) -> tuple[list[float], float, list[FloatArray]]:
    """Losses of texts (N, T) under a method, or one for each, what it costs, and the levels.

    Args:
        subject: The variant.
        method: Who decides.
        ids: Texts.
        scored: Which targets count.

    Returns:
        (N,) nats a target; the executed share of the dense FLOPs; released levels (T, L, 5) of each
        text.
    """
    _harden(subject)
    losses, total, levels = list[float](), Cost(), list[FloatArray]()
    saved = 0.0
    several = not isinstance(method, Method)
    step = 1 if several else _AT_ONCE
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        own = method if isinstance(method, Method) else method[start]
        with attach(subject.model, own) as run:
            logits = subject.model(ids[part], use_cache=False).logits
        losses += text_losses(logits, ids[part], scored[part]).tolist()
        total = total + run.cost
        saved += unread(subject, run.plans)
        levels += run.levels
    return losses, (total.flops_total - saved) / dense_flops(subject, *ids.shape), levels


def _harden(subject: Subject) -> None:
    subject.eval()
    if subject.tiles is not None:
        subject.tiles.temperature = 0.0


def unread(subject: Subject, plans: Sequence[Plan]) -> float:
    """FLOPs that patterns of attention saved on the texts of the last pass, of what Plans price.

    A Plan knows nothing of a pattern, and prices all entries for each token that runs attention.
    """
    if not subject.patterns:
        return 0.0
    each = 4.0 * subject.shape.query_width
    left = 0.0
    if subject.importance is not None:  # who says where tiles are small is paid for
        n_tokens = sum(plan.n_tokens for plan in plans)
        left -= subject.importance.flops * subject.shape.n_layers * n_tokens / each
    for plan in plans:
        dense = (plan.n_tokens + 1) / 2
        runs = plan.rows["attention"].sum(0)  # (L,) tokens
        left += float(((dense - subject.reads.detach().numpy()) * runs).sum())
    return each * left


def dense_flops(subject: Subject, n_texts: int, length: int) -> int:
    """FLOPs of the dense decoder on texts, logits at every position."""
    rest = Plan.rest(subject.shape, length)
    return n_texts * price(rest, subject.shape, Overhead()).flops_total


def curve(run: Run, subject: Subject) -> list[Point]:
    """A variant on the test texts: at rest, or as it is, and at each dial."""
    points = [_undivided(subject, list(run.judged("test")))]
    if subject.modulator is None:
        return points
    dials = sorted(run.size.dials, reverse=True)
    return points + [point(run, subject, dial, subject.served(dial)) for dial in dials]


def point(run: Run, subject: Subject, dial: float, method: Method) -> Point:
    """What a method loses and costs on the test texts."""
    losses, shares = dict[str, list[float]](), list[float]()
    for task, ids, scored in run.judged("test"):
        found, share, _ = executed(subject, method, ids, scored)
        losses[task] = _rounded(found)
        shares.append(share)
    return {"dial": dial, "cost": float(np.mean(shares)), "losses": losses}


@torch.no_grad()
def _undivided(subject: Subject, texts: Sequence[tuple[str, Tensor, Tensor]]) -> Point:
    """The model by itself; what a fixed pattern of attention leaves out is left out of its cost."""
    _harden(subject)
    losses, saved = dict[str, list[float]](), 0.0
    rest = Plan.rest(subject.shape, texts[0][1].shape[1])
    for task, ids, scored in texts:
        found = []
        for start in range(0, len(ids), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            logits = subject.model(ids[part], use_cache=False).logits
            found += text_losses(logits, ids[part], scored[part]).tolist()
            saved += unread(subject, [rest] * len(logits))
        losses[task] = _rounded(found)
    n_texts = sum(len(ids) for _, ids, _ in texts)
    cost = 1 - saved / dense_flops(subject, n_texts, rest.n_tokens)
    return {"dial": 1.0, "cost": float(cost), "losses": losses}


def at_cost(points: Sequence[Point], cost: float) -> dict[str, list[float]] | None:
    """Losses by task of each text at a cost, between the two points around it; None out of reach.

    Costs need not fall evenly along a dial: the points are taken in the order of their costs.
    """
    ordered = sorted(points, key=lambda p: float(p["cost"]))
    for low, high in pairwise(ordered):
        if low["cost"] <= cost <= high["cost"]:
            gap = high["cost"] - low["cost"]
            part = 0.0 if gap == 0 else (cost - low["cost"]) / gap
            return {
                task: [
                    a + part * (b - a) for a, b in zip(losses, high["losses"][task], strict=True)
                ]
                for task, losses in low["losses"].items()
            }
    return None


def dial_for(run: Run, subject: Subject, points: Sequence[Point], cost: float) -> float | None:
    """The dial at which the test texts execute a cost, to `_NEAR`; None out of reach.

    Out of reach is what lies inside a jump, too, by which cost falls where all tokens take a step
    together.

    Args:
        run: The decoder, and the texts.
        subject: The variant.
        points: Along its dial, between two of which is looked.
        cost: Executed share of the dense FLOPs.
    """
    ordered = sorted(points, key=lambda p: float(p["cost"]))
    pair = next(
        ((a, b) for a, b in pairwise(ordered) if a["cost"] <= cost <= b["cost"]),
        None,
    )
    if pair is None:
        return None
    (below, low), (above, high) = ((float(p["cost"]), float(p["dial"])) for p in pair)
    texts = list(run.judged("test"))
    for _ in range(_TRIES):
        part = 0.5 if above == below else (cost - below) / (above - below)
        dial = low + min(max(part, 0.1), 0.9) * (high - low)
        own = float(np.mean([executed(subject, subject.served(dial), *t[1:])[1] for t in texts]))
        if abs(own - cost) <= _NEAR:
            return dial
        if own < cost:
            below, low = own, dial
        else:
            above, high = own, dial
    return None


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(v), 5) for v in values]
