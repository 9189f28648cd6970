"""What hardwired chips cost over the years that they serve, and how little of it a Plan can save.

    total = masks and design + systems x (making + data centre) + updates x (metal masks + making)
            + electricity + spare systems

as tables 3 and 5 and appendix B of Liu et al. 2026 reckon it; the prices are theirs, and their
totals come back to within 0.1 %. A Plan moves the electricity and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from vesicle.errors import DataError
from vesicle.neurons.hnlpu.constants import ELECTRICITY, FACILITY, NETWORK, PUE
from vesicle.neurons.hnlpu.pricing import ChipPrice
from vesicle.neurons.hnlpu.scenarios import Estimate

_HOURS_A_YEAR = 8_760
_SYSTEMS_A_SPARE = 10
"""The paper keeps 1 spare for 1 system and 5 for 50."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How chips are used.

    Attributes:
        systems: Copies of the whole set of chips.
        years: Of service.
        updates: Times that the weights change, each with new metal masks and new chips.
        used: Share of the time in which all slots are full.
    """

    systems: int = 1
    years: float = 3
    updates: int = 2
    used: float = 1.0

    def __post_init__(self) -> None:
        if self.systems < 1:
            raise DataError(f"systems is {self.systems}; allowed: 1 and above")
        if not self.years > 0:
            raise DataError(f"years is {self.years:g}; allowed: above 0")
        if self.updates < 0:
            raise DataError(f"updates is {self.updates}; allowed: 0 and above")
        if not 0 < self.used <= 1:
            raise DataError(f"used is {self.used:g}; allowed: above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class DeploymentPrice:
    """USD of a deployment, all its years together.

    Attributes:
        made: Masks, design, making the systems and the data centre.
        updates: New masks and chips whenever the weights change.
        electricity: All that a Plan moves.
        spares: Kept beside.
        tokens: That are served in the middle scenario.
    """

    made: Estimate
    updates: Estimate
    electricity: Estimate
    spares: Estimate
    tokens: float

    @property
    def total(self) -> Estimate:
        """All four together."""
        return self.made + self.updates + self.electricity + self.spares

    @property
    def per_million_tokens(self) -> Estimate:
        """USD."""
        return self.total * (1e6 / self.tokens)

    @property
    def electricity_share(self) -> float:
        """Of the total, in the middle scenario: the most that any Plan can save of it."""
        return self.electricity.middle / self.total.middle

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "made_usd": self.made.to_dict(),
            "updates_usd": self.updates.to_dict(),
            "electricity_usd": self.electricity.to_dict(),
            "spares_usd": self.spares.to_dict(),
            "total_usd": self.total.to_dict(),
            "tokens": self.tokens,
            "usd_per_million_tokens": self.per_million_tokens.to_dict(),
            "electricity_share": self.electricity_share,
        }


def price_deployment(price: ChipPrice, deployment: Deployment | None = None) -> DeploymentPrice:
    """What it costs to serve with the chips of a price.

    Args:
        price: Of a token, by `price_on_hnlpu`.
        deployment: One system for three years with two updates by default, always full.
    """
    chosen = deployment or Deployment()
    chip = price.chip
    pace = price.tokens_per_s.middle
    seconds = chosen.years * _HOURS_A_YEAR * 3600
    tokens = pace * chosen.used * seconds * chosen.systems
    power_mw = price.joules.middle * pace * PUE.value / 1e6
    centre = FACILITY.value * power_mw + NETWORK.value * chip.n_chips
    making = chip.made_usd * chosen.systems
    respin = (chip.masks_usd + making) * chosen.updates
    # Chips that wait are taken to draw nothing, which is for the Plan: less is left to save.
    price_of_joule = PUE.value * ELECTRICITY.value / 3.6e6
    return DeploymentPrice(
        made=chip.nre_usd + making + Estimate.same(centre * chosen.systems),
        updates=respin,
        electricity=price.joules * (tokens * price_of_joule),
        spares=chip.made_usd * ceil(chosen.systems / _SYSTEMS_A_SPARE),
        tokens=tokens,
    )
