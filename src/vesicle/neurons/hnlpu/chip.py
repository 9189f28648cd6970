"""The chips that a model would be cast into: how many, how large, and what making them costs once.

    cells = parameters x bits / 4
    chips = cells / those of one chip of the paper, rounded up
    area  = cells x area of a cell + chips x area of all other blocks

All of it depends on the model and on nothing that a Plan decides: metal is there whether a token
uses it or not. A neuron of the paper has one accumulator for each of the 16 values of a weight of 4
bits. Weights of 8 and 16 bits are taken to be 2 and 4 such halves, which nobody published. Chips
whose array is partly filled have their other blocks whole, or by its filling, see `scenarios`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from vesicle.errors import DataError
from vesicle.neurons.hnlpu.constants import (
    ARRAY,
    BLOCKS,
    CAST,
    CHIP_MASKS,
    CHIPS,
    DESIGN,
    GPT_OSS,
    LINK,
    MADE,
    SHARED_MASKS,
    Constant,
)
from vesicle.neurons.hnlpu.scenarios import Estimate, Scenario
from vesicle.shapes import ModelShape

BITS = (4, 8, 16)
"""What metal may be cast for."""
CELLS = CAST.value / CHIPS.value
"""Of one chip of the paper: parameters of 4 bits."""
_ROUNDING = 1e-9


def check_bits(bits: int) -> None:
    """Refuse what metal is not cast for.

    Raises:
        DataError: Naming what it is cast for.
    """
    if bits not in BITS:
        raise DataError(f"metal of {bits} bits is not priced; allowed: {', '.join(map(str, BITS))}")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The chips of one model.

    Attributes:
        parameters: In metal: projections and the LM head. The input embedding lies in HBM.
        bits: Of each.
        n_layers: L.
        width: D.
    """

    parameters: int
    bits: int
    n_layers: int
    width: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.parameters < 1:
            raise DataError(f"{self.parameters} parameters are cast; allowed: 1 and above")

    @classmethod
    def of(cls, shape: ModelShape, *, parameters: int | None = None, bits: int = 4) -> Chip:
        """Those of a model.

        Args:
            shape: Of the model.
            parameters: Where the model has more than a token meets (experts); by default those of
                `shape`.
            bits: Of a weight in metal: 4, 8 or 16.

        Raises:
            DataError: If `bits` is another number, or there are no parameters.
        """
        return cls(
            parameters=cast_parameters(shape) if parameters is None else parameters,
            bits=bits,
            n_layers=shape.n_layers,
            width=shape.width,
        )

    @property
    def cells(self) -> float:
        """Parameters of 4 bits that take as much metal."""
        return self.parameters * self.bits / 4

    @property
    def n_chips(self) -> int:
        """How many chips there are."""
        return max(1, ceil(self.cells / CELLS - _ROUNDING))

    def blocks(self, scenario: Scenario) -> float:
        """Sets of the blocks beside the array that there are, one of the paper's chips being 1."""
        return self.n_chips if scenario.whole_blocks else self.cells / CELLS

    @property
    def area_mm2(self) -> Estimate:
        """Of all dies."""
        array = self.cells / CELLS * ARRAY.area.value
        others = [b.area.value for b in BLOCKS if b is not ARRAY and (b is not LINK or self.linked)]
        return Estimate.of(lambda scenario: array + self.blocks(scenario) * sum(others))

    @property
    def linked(self) -> bool:
        """Whether chips must talk to each other."""
        return self.n_chips > 1

    @property
    def nre_usd(self) -> Estimate:
        """Masks and design, paid once; the paper's optimistic and pessimistic prices."""
        return _sum(SHARED_MASKS, *DESIGN) + self.masks_usd

    @property
    def masks_usd(self) -> Estimate:
        """Masks of the metal that holds the weights, paid again whenever they change."""
        return _sum(CHIP_MASKS) * self.n_chips

    @property
    def made_usd(self) -> Estimate:
        """Dies, packages, HBM and assembly of one system."""
        return _sum(*MADE) * self.n_chips


PUBLISHED = Chip.of(GPT_OSS, parameters=int(CAST.value))
"""The paper's own: 16 chips of gpt-oss 120B."""


def cast_parameters(shape: ModelShape) -> int:
    """Weights of all projections and of the LM head, of a model without experts."""
    layer = sum(i * o for i, o in zip(shape.site_widths, shape.site_outputs, strict=True))
    return shape.n_layers * layer + shape.vocabulary * shape.width


def _sum(*prices: Constant) -> Estimate:
    """The ends of published ranges added up; what has no range counts alike in both."""
    low = sum(p.value if p.low is None else p.low for p in prices)
    high = sum(p.value if p.high is None else p.high for p in prices)
    return Estimate.between(low, high)
