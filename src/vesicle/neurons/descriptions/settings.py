"""How neurons are described and judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from vesicle.errors import DataError
from vesicle.neurons.contexts import ContextSettings
from vesicle.neurons.descriptions.candidates import Limits


@dataclass(frozen=True, kw_only=True)
class DescribeSettings:
    """How neurons are described and judged.

    Attributes:
        contexts: A neuron's highest (or lowest) activations that are looked at, and as many held
            out.
        shown: Tokens of a context, the neuron's own the last.
        scored: Contexts, the strongest first, on which candidates are scored.
        random: Held-out contexts drawn at random, from which its own are to be told.
        weight: Of log p(d), see `mutual_information`.
        shuffled: Other neurons whose descriptions stand in for the neuron's own.
        skip: First tokens of a window that do not count.
        seed: Of all draws.
        limits: How many candidates there are.
    """

    contexts: int = 20
    shown: int = 24
    scored: int = 10
    random: int = 20
    weight: float = 0.6
    shuffled: int = 3
    skip: int = 8
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DataError: Naming the one that is out of range, and what is allowed.
        """
        least = {"contexts": 2, "shown": 1, "scored": 1, "random": 2, "shuffled": 1}
        least |= {"skip": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise DataError(f"{name} is {getattr(self, name)}; allowed: {low} and above")
        if not 0 <= self.weight <= 10:
            raise DataError(f"weight is {self.weight}; allowed: 0 to 10")

    def of_contexts(self, drawn: int) -> ContextSettings:
        """What is kept of a text, with places drawn at random."""
        return ContextSettings(k=self.contexts, skip=self.skip, drawn=drawn, seed=self.seed)
