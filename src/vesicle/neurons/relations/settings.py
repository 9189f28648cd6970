"""How relation neurons are found and judged."""

from __future__ import annotations

from dataclasses import dataclass

from vesicle.errors import DataError

READINGS = ("mean", "last")
TIMES = (0.25, 0.5, 1.0, 2.0, 4.0)
MOST_RELATIONS = 8
_LARGEST = 0.1


@dataclass(frozen=True, kw_only=True)
class RelationSettings:
    """How relation neurons are found and judged.

    Attributes:
        neurons: A relation's neurons, as a share of the model's.
        facts: Known facts of a relation, at most; half of them find neurons.
        seeds: Splits of the facts.
        reading: `mean` over the prompt's tokens, or `last`.
        times: Sizes of lesions, as multiples of the chosen number of neurons.
        relations: Relations at most, where none are named.
    """

    neurons: float = 0.005
    facts: int = 40
    seeds: int = 3
    reading: str = "mean"
    times: tuple[float, ...] = TIMES
    relations: int = MOST_RELATIONS

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            DataError: Naming the setting and what is allowed.
        """
        if not 0 < self.neurons <= _LARGEST:
            raise DataError(f"--neurons is {self.neurons:g}; allowed: above 0, up to {_LARGEST:g}")
        if self.facts < 8:
            raise DataError(f"--facts is {self.facts}; allowed: 8 and above")
        if self.seeds < 1:
            raise DataError(f"--seeds is {self.seeds}; allowed: 1 and above")
        if self.reading not in READINGS:
            raise DataError(f"--reading is {self.reading!r}; allowed: {', '.join(READINGS)}")
        if 1.0 not in self.times or min(self.times) <= 0:
            raise DataError(f"sizes are {self.times}; allowed: numbers above 0, 1 among them")
