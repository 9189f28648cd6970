"""Three answers in place of one, where an assumption drives the result.

Nobody published how much of a hardwired chip's power flows at rest, or whether a pipeline closes up
where a token skips a layer. Each scenario answers all such questions, the `CAUTIOUS` one against
the Plan and the `HOPEFUL` one for it. An `Estimate` holds what each of them gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vesicle.neurons.hnlpu.constants import STATIC


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One set of assumptions.

    Attributes:
        name: Of it.
        static: Share of each block's power that flows whether it works or not.
        overhead_follows: Whether power outside of the dies falls with theirs.
        bits_save: Whether leading bits of a weight can be read alone. In the paper's neurons a
            weight is one wire, whatever its value, and they cannot.
        skipping_saves: Whether a module that is skipped takes no time and no talk between chips.
        closes_up: Whether other tokens get the time that is saved. A pipeline whose stages keep
            step leaves an empty place instead.
        by_width: Whether a narrower model's projections take less time, by its width.
        whole_blocks: Whether a chip whose array is partly filled has all other blocks whole.
    """

    name: str
    static: float
    overhead_follows: bool
    bits_save: bool
    skipping_saves: bool
    closes_up: bool
    by_width: bool
    whole_blocks: bool


_LEAST, _MIDDLE, _MOST = STATIC.low, STATIC.value, STATIC.high
assert _LEAST is not None
assert _MOST is not None

CAUTIOUS = Scenario(
    name="cautious",
    static=_MOST,
    overhead_follows=False,
    bits_save=False,
    skipping_saves=False,
    closes_up=False,
    by_width=False,
    whole_blocks=True,
)
MIDDLE = Scenario(
    name="middle",
    static=_MIDDLE,
    overhead_follows=True,
    bits_save=False,
    skipping_saves=True,
    closes_up=False,
    by_width=True,
    whole_blocks=True,
)
HOPEFUL = Scenario(
    name="hopeful",
    static=_LEAST,
    overhead_follows=True,
    bits_save=True,
    skipping_saves=True,
    closes_up=True,
    by_width=True,
    whole_blocks=False,
)
SCENARIOS = (CAUTIOUS, MIDDLE, HOPEFUL)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What each scenario gives for one quantity.

    Attributes:
        cautious: Under assumptions against the Plan; of prices, the pessimistic end.
        middle: Under those in between.
        hopeful: Under assumptions for the Plan; of prices, the optimistic end.
    """

    cautious: float
    middle: float
    hopeful: float

    @classmethod
    def of(cls, value: Callable[[Scenario], float]) -> Estimate:
        """From a function of the scenario."""
        cautious, middle, hopeful = (value(scenario) for scenario in SCENARIOS)
        return cls(cautious=cautious, middle=middle, hopeful=hopeful)

    @classmethod
    def same(cls, value: float) -> Estimate:
        """What no assumption moves."""
        return cls(cautious=value, middle=value, hopeful=value)

    @classmethod
    def between(cls, low: float, high: float) -> Estimate:
        """From the ends of a published range of prices; the middle is half-way."""
        return cls(cautious=high, middle=(low + high) / 2, hopeful=low)

    @property
    def low(self) -> float:
        """The least of the three."""
        return min(self.cautious, self.middle, self.hopeful)

    @property
    def high(self) -> float:
        """The most of the three."""
        return max(self.cautious, self.middle, self.hopeful)

    def __add__(self, other: Estimate) -> Estimate:
        """The sum, scenario by scenario."""
        return self._with(other, lambda a, b: a + b)

    def __mul__(self, factor: float) -> Estimate:
        """All three times a number."""
        return self.times(Estimate.same(factor))

    def times(self, other: Estimate) -> Estimate:
        """The product, scenario by scenario."""
        return self._with(other, lambda a, b: a * b)

    @property
    def inverse(self) -> Estimate:
        """One over each."""
        return Estimate.same(1.0).over(self)

    def over(self, other: Estimate) -> Estimate:
        """The ratio, scenario by scenario, so that what both assume cancels out."""
        return self._with(other, lambda a, b: a / b)

    def _with(self, other: Estimate, combine: Callable[[float, float], float]) -> Estimate:
        return Estimate(
            cautious=combine(self.cautious, other.cautious),
            middle=combine(self.middle, other.middle),
            hopeful=combine(self.hopeful, other.hopeful),
        )

    def to_dict(self) -> dict[str, float]:
        """As JSON writes it: the least, the middle scenario and the most."""
        return {"low": self.low, "middle": self.middle, "high": self.high}
