"""Training with random choices: stage 1 of Duo-LLM (Alizadeh et al. 2024, p = 0.5).

Every token of a step takes a module of its own in every layer, drawn independently, so that any
pattern of choices works afterwards. In some steps all is big: a model that never meets that pattern
(it has probability p^L) would be worse with all of its FFNs than with a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.duo.module import Choices, table
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.scratch import draw

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class RandomRouting:
    """How choices are drawn.

    Attributes:
        big: Probability of the big FFN.
        skip: Probability of none; the small one has the rest.
        all_big: Share of the steps in which every token takes the big FFN everywhere.
    """

    big: float = 0.5
    skip: float = 0.0
    all_big: float = 0.25

    def __post_init__(self) -> None:
        """Check that these are probabilities.

        Raises:
            ValueError: They are not.
        """
        for name, share in (*vars(self).items(), ("big + skip", self.big + self.skip)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; allowed: 0 to 1")

    def draw(self, shape: tuple[int, ...], step: int, seed: int) -> Tensor:
        """Choices of `shape`, a function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        if rng.random() < self.all_big:
            return torch.full(shape, FFN_BIG)
        drawn = rng.random(shape)
        chosen = np.where(drawn < self.big, FFN_BIG, FFN_SMALL)
        return torch.from_numpy(np.where(drawn >= 1 - self.skip, FFN_SKIP, chosen))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(...) nats by which logits (..., V) miss targets (...)."""
    flat = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def random_loss(
    model: LlamaForCausalLM,
    choices: Choices,
    texts: Tensor,
    routing: RandomRouting,
    *,
    batch: int,
    seed: int = 0,
) -> Callable[[int], Tensor]:
    """What `scratch.fit` trains a duo model by.

    Args:
        model: With small FFNs.
        choices: Of that model.
        texts: (N, T + 1) tokens.
        routing: How choices are drawn.
        batch: Texts of a step.
        seed: Of batches and choices.

    Returns:
        The mean loss of a step, in nats a token.
    """

    def loss_at(step: int) -> Tensor:
        chosen = texts[draw(len(texts), batch, step, seed)]
        inputs, targets = chosen[:, :-1], chosen[:, 1:]
        drawn = routing.draw((*inputs.shape, len(model.model.layers)), step, seed)
        with choices.by(table(drawn)):
            return token_losses(model(inputs).logits, targets).mean()

    return loss_at
