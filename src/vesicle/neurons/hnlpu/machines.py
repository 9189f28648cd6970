"""The same on machines that read their weights from memory, by the paper's ratios.

    joules = joules of the dense model on hardwired chips x 1,047 (H100) or 283 (WSE-3) x share

The ratios are of gpt-oss 120B on an H100 that gives 45 tokens/s, as for a single request (the paper
does not say), and are assumed to hold for other models, which nobody showed. With 50 requests at
once an H100 gives 24 times as many (appendix B of Liu et al. 2026), and the ratios are smaller.
`share` is what a Plan leaves: of bytes read (middle), the lesser of bytes and FLOPs (hopeful), or
all of it, where kernels skip nothing (cautious).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vesicle.cost import Cost
from vesicle.neurons.hnlpu.constants import (
    GPU_ENERGY,
    GPU_SPEED,
    WAFER_ENERGY,
    WAFER_SPEED,
    Constant,
)
from vesicle.neurons.hnlpu.pricing import ChipPrice
from vesicle.neurons.hnlpu.scenarios import Estimate


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Another machine, by the paper's ratios.

    Attributes:
        name: Of it.
        energy: Tokens/J of the hardwired chips over the machine's.
        speed: Tokens/s likewise.
    """

    name: str
    energy: Constant
    speed: Constant


GPU = Machine(name="H100", energy=GPU_ENERGY, speed=GPU_SPEED)
WAFER = Machine(name="WSE-3", energy=WAFER_ENERGY, speed=WAFER_SPEED)


@dataclass(frozen=True, kw_only=True)
class MachinePrice:
    """What a token costs on another machine.

    Attributes:
        name: The machine's.
        dense_joules: Of one token of the dense model.
        dense_between_s: Seconds between its tokens.
        share: Of both that what was executed takes.
    """

    name: str
    dense_joules: Estimate
    dense_between_s: Estimate
    share: Estimate

    @property
    def joules(self) -> Estimate:
        """Of one token."""
        return self.dense_joules.times(self.share)

    @property
    def tokens_per_s(self) -> Estimate:
        """Of the machine."""
        return self.dense_between_s.times(self.share).inverse

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "name": self.name,
            "joules": self.joules.to_dict(),
            "dense_joules": self.dense_joules.to_dict(),
            "tokens_per_s": self.tokens_per_s.to_dict(),
            "share": self.share.to_dict(),
        }


def price_on_machine(
    machine: Machine, dense_price: ChipPrice, cost: Cost, dense: Cost
) -> MachinePrice:
    """Price what was executed on another machine.

    Args:
        machine: Which.
        dense_price: Of the dense model on hardwired chips.
        cost: What was executed.
        dense: The dense model's cost of the same tokens.
    """
    ratio = cost.ratio(dense)
    share = Estimate(
        cautious=1.0,
        middle=ratio["bytes_read"],
        hopeful=min(ratio["bytes_read"], ratio["flops"]),
    )
    return MachinePrice(
        name=machine.name,
        dense_joules=dense_price.joules * machine.energy.value,
        dense_between_s=dense_price.between_s * machine.speed.value,
        share=share,
    )
