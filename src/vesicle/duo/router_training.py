"""How routers are trained, the model frozen.

- `budget_loss`: outputs are mixed by the router's probabilities, whose temperature falls; the loss
  of the text, and how far the mean probability of big, over tokens and layers together, is from the
  budget (Duo-LLM, Alizadeh et al. 2024: one global budget rather than one for each layer).
- `oracle_loss`: the router is to choose what an oracle chose, by focal loss (Dr.LLM, Heakl et al.
  2025; Lin et al. 2017): -(1 - p)^γ log p, p the probability of the oracle's choice.

Of Dr.LLM its search, its windows of pooled tokens and its balance of classes are not reproduced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vesicle.duo.module import Choices, table
from vesicle.duo.random_routing import token_losses
from vesicle.duo.routers import Router
from vesicle.plan import FFN_BIG
from vesicle.scratch import draw

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Loss = Callable[[int], Tensor]
"""What `scratch.fit` trains by: the loss of a step."""


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """How soft routing is trained.

    Attributes:
        steps: Over which the temperature falls, in equal ratios.
        hottest: Temperature of the first step.
        coldest: Of the last.
        weight: Of the budget's part of the loss.
        budgets: Shares of big FFNs from which each text of a step draws its own, evenly between
            the least and the most; one number for a router of one budget.
    """

    steps: int
    budgets: tuple[float, ...]
    hottest: float = 2.0
    coldest: float = 0.2
    weight: float = 10.0

    def __post_init__(self) -> None:
        """Check budgets and temperatures.

        Raises:
            ValueError: Naming what is out of range.
        """
        if not self.budgets or not all(0 < share <= 1 for share in self.budgets):
            raise ValueError(f"budgets are {self.budgets}; allowed: above 0, up to 1")
        if not 0 < self.coldest <= self.hottest:
            raise ValueError(
                f"temperatures are {self.hottest} to {self.coldest}; allowed: above 0, falling"
            )

    def temperature(self, step: int) -> float:
        """Of a step, from 0 on."""
        place = min(1.0, step / max(1, self.steps - 1))
        return float(self.hottest * (self.coldest / self.hottest) ** place)

    def dials(self, n: int, step: int, seed: int) -> Tensor:
        """(n,) shares, a function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        drawn = rng.uniform(min(self.budgets), max(self.budgets), n)
        return torch.from_numpy(drawn.astype(np.float32))


def budget_loss(
    model: LlamaForCausalLM,
    choices: Choices,
    router: Router,
    texts: Tensor,
    how: Budgeted,
    *,
    batch: int,
    seed: int = 0,
) -> Loss:
    """Loss of the text and of the budget, by soft routing.

    Args:
        model: With small FFNs; it is frozen.
        choices: Of that model.
        router: To train.
        texts: (N, T + 1) tokens.
        how: Temperatures and budgets.
        batch: Texts of a step.
        seed: Of batches and budgets.
    """
    model.requires_grad_(False)

    def loss_at(step: int) -> Tensor:
        chosen = texts[draw(len(texts), batch, step, seed)]
        dial = how.dials(len(chosen), step, seed)
        with choices.by(router.soft(dial, how.temperature(step))) as taken:
            logits = model(chosen[:, :-1]).logits
            big = torch.stack([p[..., FFN_BIG] for p in taken.values()]).mean((0, 2))  # (B,)
        over = (big - dial).square().mean()
        return token_losses(logits, chosen[:, 1:]).mean() + how.weight * over

    return loss_at


def focal(probabilities: Tensor, right: Tensor, gamma: float) -> Tensor:
    """(...) focal loss of probabilities (..., 3) where `right` (...) is the choice.

    At γ = 0 it is the cross-entropy; the higher γ, the less a choice counts that is right already.
    """
    p = probabilities.gather(-1, right[..., None])[..., 0].clamp_min(1e-9)
    return -((1 - p) ** gamma) * p.log()


def oracle_loss(
    model: LlamaForCausalLM,
    choices: Choices,
    router: Router,
    texts: Tensor,
    patterns: Tensor,
    *,
    dial: float,
    batch: int,
    gamma: float = 2.0,
    seed: int = 0,
) -> Loss:
    """Loss of what the router would have chosen, while the oracle's choices are executed.

    The oracle chose for each token in a base context; here all tokens take their choices at once,
    as they will when the router chooses.

    Args:
        model: With small FFNs; it is frozen.
        choices: Of that model.
        router: To train.
        texts: (N, T) tokens.
        patterns: (N, T, L) what the oracle chose for them.
        dial: Share of big FFNs of these patterns.
        batch: Texts of a step.
        gamma: γ of the focal loss.
        seed: Of batches.
    """
    model.requires_grad_(False)
    n_layers = patterns.shape[-1]

    def loss_at(step: int) -> Tensor:
        which = draw(len(texts), batch, step, seed)
        inputs = _inputs(model, choices, texts[which], patterns[which])
        dials = torch.full((len(which),), dial)
        losses = [
            focal(router.probabilities(layer, x, dials, 1.0), patterns[which][..., layer], gamma)
            for layer, x in enumerate(inputs)
        ]
        return torch.stack(losses).sum() / (n_layers * losses[0].numel())

    return loss_at


@torch.no_grad()
def _inputs(
    model: LlamaForCausalLM, choices: Choices, texts: Tensor, patterns: Tensor
) -> list[Tensor]:
    """L times (B, T, D) what enters the FFNs while patterns (B, T, L) are executed."""
    seen: list[Tensor] = []
    says = table(patterns)

    def watch(layer: int, x: Tensor) -> Tensor:
        seen.append(x)
        return says(layer, x)

    with choices.by(watch):
        model.model(texts)
    return seen
