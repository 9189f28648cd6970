"""What a variant is trained by: the loss of a step.

    loss = loss of the output + price (share - budget)²

with the budget as the dial of what is learnt, drawn anew for each step from a golden-ratio
sequence; a budget of 1 or more is a dense step, so that rest stays good. The output is held to the
text, to the dense decoder (`training.divergence`), or to both. Decoder, maps and predictor learn
together unless the variant says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vesicle.predictors import Predictor
from vesicle.predictors.early_exit import EarlyExit
from vesicle.predictors.mixture_of_depths import MixtureOfDepths
from vesicle.reference.attach import Soft, attach
from vesicle.studies.neuro.needs import needs_loss
from vesicle.studies.neuro.policy import Perturbed
from vesicle.studies.neuro.subject import Subject
from vesicle.training.config import GOLDEN
from vesicle.training.early_exit import early_exit_loss
from vesicle.training.objectives import TemperatureSchedule, budget_penalty, divergence
from vesicle.training.trainer import READ_OUT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from vesicle.studies.neuro.run import Run

PRICE = 30.0
"""Nats per squared share off the budget."""

_EDGES = TemperatureSchedule(start=0.15, end=0.02)
_TILES_PRICE = 4.0
_HARDENING = TemperatureSchedule(start=0.5, end=0.05)


def faster(name: str) -> float:
    """How many times the decoder's learning rate a parameter of a subject has."""
    if not name.startswith("modulator."):
        return 1.0
    return 20.0 if name.rpartition(".")[2] in READ_OUT else 3.0


def text_losses(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """(B,) mean nats of each text's targets that count.

    Args:
        logits: (B, T, V).
        ids: (B, T).
        scored: (B, T) whether a position is such a target.
    """
    each = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    counts = scored[:, 1:].to(each.dtype)
    return (each * counts).sum(1) / counts.sum(1).clamp_min(1)


def dense_loss(model: nn.Module, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean over texts, nothing left out."""
    return text_losses(model(ids, use_cache=False).logits, ids, scored).mean()


def loss_of(run: Run, subject: Subject, steps: int) -> Callable[[int], Tensor]:
    """What `scratch.fit` trains a variant by.

    Args:
        run: The decoder, and the texts.
        subject: The variant, in training mode.
        steps: Of its training.
    """
    variant = subject.variant
    teacher = run.base().requires_grad_(False) if variant.labels != "text" else None

    def loss_at(step: int) -> Tensor:
        ids, scored = run.batch(run.size.base_steps + step)
        predictor = None if subject.modulator is None else subject.modulator.predictor
        place = step / max(1, steps - 1)
        if subject.tiles is not None:
            subject.tiles.temperature = _EDGES.at(place)
        if isinstance(predictor, EarlyExit):
            each = scored[:, 1:].sum(1, keepdim=True).clamp_min(1)
            return early_exit_loss(subject.model, predictor, ids, scored, 1 / each)
        low, high = variant.budgets
        budget = low + (high - low) * ((step + 1) * GOLDEN % 1)
        if predictor is None or (budget >= 1 and variant.tune == "all"):
            return dense_loss(subject.model, ids, scored) + _tiles_price(subject, ids)
        loss = _modulated(subject, teacher, ids, scored, min(budget, 0.99), place, step, run.seed)
        return loss + _tiles_price(subject, ids)

    return loss_at


def _tiles_price(subject: Subject, ids: Tensor) -> Tensor | float:
    """What it costs that tiles were read more or less than they should be, in the last pass."""
    if subject.tiles is None:
        return 0.0
    share = subject.reads.mean() / ((ids.shape[1] + 1) / 2)
    return _TILES_PRICE * (share - subject.variant.tiles).square()


def _modulated(
    subject: Subject,
    teacher: LlamaForCausalLM | None,
    ids: Tensor,
    scored: Tensor,
    budget: float,
    place: float,
    step: int,
    seed: int,
) -> Tensor:
    variant, modulator = subject.variant, subject.modulator
    assert modulator is not None
    assert isinstance(modulator.predictor, Predictor)
    predictor = modulator.predictor
    policy = None
    if variant.estimator == "policy":
        policy = Perturbed(predictor, seed, step)
        ids, scored = policy.grouped(ids), policy.grouped(scored)
    heat = _HARDENING.at(place) if variant.estimator == "soft" else 0.0
    with (
        _told_alone(predictor, bool(variant.supervised)),
        policy or _nothing(),
        attach(
            subject.model, subject.method(subject.dial(budget)), soft=Soft(temperature=heat)
        ) as attached,
    ):
        logits = subject.model(ids, use_cache=False).logits
    cost = attached.charged
    each = text_losses(logits, ids, scored)
    loss = logits.new_zeros(())
    if variant.labels != "distillation":
        loss = loss + each.mean()
    if teacher is not None:
        with torch.no_grad():
            dense = teacher(ids, use_cache=False).logits
        loss = loss + divergence(dense, logits)
    if policy is not None:
        shares = cost.executed.sum(1) / cost.dense.sum(1)
        reward = -each - PRICE * (shares - budget).square()
        return loss + policy.loss(reward.detach().float())
    if isinstance(predictor, MixtureOfDepths):  # its capacity is its share, whatever the price
        loss = loss + predictor.auxiliary()
    else:
        loss = loss + budget_penalty(cost.share, budget, PRICE)
    if variant.supervised:
        loss = loss + needs_loss(subject, ids, variant.supervised)
    return loss.float()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _told_alone(predictor: Predictor, told: bool) -> Iterator[None]:
    """Where read-outs are told what tokens need, the output has no say in them."""
    own = [p for n, p in predictor.named_parameters() if told and n not in READ_OUT]
    for parameter in own:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in own:
            parameter.requires_grad_(True)
