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
        temperature: 0 is greedy.
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
        """A fresh generator."""
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from logits (V,)."""
        if self.greedy:
            return int(logits.argmax())
        chances = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, tokens = chances.sort(descending=True)
            kept = ordered.cumsum(-1) - ordered < self.top_p
            chances = torch.zeros_like(chances).scatter(0, tokens[kept], ordered[kept])
        return int(torch.multinomial(chances, 1, generator=generator))
