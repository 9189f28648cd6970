"""Chooses the next token from logits: greedy, temperature, nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.errors import VesicleError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy, which is also the limit for ever smaller ones; up to 100.
        top_p: Draw from the smallest set of tokens with at least this much probability (Holtzman et
            al. 2020).
        seed: Of the generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.temperature <= 100:
            raise VesicleError(f"temperature is {self.temperature}; allowed: 0 to 100")
        if not 0 < self.top_p <= 1:
            raise VesicleError(f"top-p is {self.top_p}; allowed: above 0, up to 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def generator(self) -> torch.Generator:
        """A new random generator, seeded with `seed`: one for each text."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from logits (V,).

        Raises:
            VesicleError: A logit is not a number, or all are minus infinity.
        """
        likeliest = int(logits.argmax())
        most = logits[likeliest]  # argmax takes NaN for the largest
        if most.isnan() or most == -torch.inf:
            raise VesicleError(
                f"the model's logits are no numbers to choose a token by: the largest is {most:g}"
            )
        if self.greedy:
            return likeliest
        return int(torch.multinomial(self.chances(logits), 1, generator=generator))

    def chances(self, logits: Tensor) -> Tensor:
        """(V,) what `draw` chooses by: at least the likeliest token has a chance.

        Args:
            logits: (V,) without NaN, and not all minus infinity.
        """
        # With the largest at 0 no temperature is too small to divide by: what is less likely goes
        # to minus infinity, which is the limit. The largest is not subtracted from itself, because
        # it may be infinite.
        wide = logits.double()
        below = torch.where(wide == wide.max(), 0.0, wide - wide.max())
        chances = (below / self.temperature).softmax(-1)
        if self.top_p < 1:
            tokens = wide.sort(descending=True).indices  # where chances round to the same
            ordered = chances[tokens]
            kept = ordered.cumsum(-1) - ordered < self.top_p
            kept[0] = True
            chances = torch.zeros_like(chances).scatter(0, tokens[kept], ordered[kept])
        return chances.float()


def not_finite(position: int) -> VesicleError:
    """What is wrong where logits are NaN or infinite.

    Args:
        position: Of the token that they were computed for.
    """
    return VesicleError(
        f"logits are not finite at position {position}: the weights or the cache are damaged"
    )


def likeliest_of(logits: Tensor, position: int) -> int | VesicleError:
    """The place of the largest of logits (V,), or an error if one of them is not finite."""
    return int(logits.argmax()) if bool(logits.isfinite().all()) else not_finite(position)
