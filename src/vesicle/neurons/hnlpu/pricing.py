"""What a Plan costs on hardwired chips: joules and seconds of a token, block by block.

    joules = P t [(1 - s) x work / work of gpt-oss  +  s x size / size of gpt-oss x pace]

for each block of the chip: P is its published power, t the published time between two tokens, s the
share of its power that flows at rest (assumed), and pace the time between two tokens over t. Work
of the array is multiply-adds, of the vector unit arithmetic of attention, of buffer and HBM numbers
of the cache read, of the link modules times width. Power outside of the dies is a share of theirs.

A dense token of gpt-oss 120B at the paper's context gives back the paper's numbers, by making. What
a Plan saves is arithmetic on these and on assumptions, and no measurement: no such chip was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vesicle.cost import Cost
from vesicle.neurons.hnlpu.chip import PUBLISHED, Chip
from vesicle.neurons.hnlpu.constants import (
    ARRAY,
    BUFFER,
    CHIPS,
    ELECTRICITY,
    GPT_OSS,
    GRID,
    LINK,
    MEMORY,
    OVERHEAD,
    PUE,
    THROUGHPUT,
    VECTOR,
    Block,
)
from vesicle.neurons.hnlpu.scenarios import MIDDLE, Estimate, Scenario
from vesicle.neurons.hnlpu.timing import modules, timing
from vesicle.neurons.hnlpu.work import Work, published_work
from vesicle.plan import Plan
from vesicle.shapes import ModelShape

_JOULES_OF_KWH = 3.6e6
_OUTSIDE = "outside"


@dataclass(frozen=True, kw_only=True)
class ChipPrice:
    """What a token costs on the chips of one model.

    Attributes:
        chip: The chips; what they cost to make depends on the model alone.
        n_tokens: How many tokens the means are of.
        joules: Of one token, the power outside of the dies included.
        token_s: Seconds from one token of a sequence to its next.
        between_s: Seconds between tokens of all sequences together, all slots full.
        blocks: Joules of one token by block, in the middle scenario; `outside` is what the dies do
            not take. They add up to the middle of `joules`.
    """

    chip: Chip
    n_tokens: int
    joules: Estimate
    token_s: Estimate
    between_s: Estimate
    blocks: Mapping[str, float]

    @property
    def tokens_per_joule(self) -> Estimate:
        """Its inverse."""
        return self.joules.inverse

    @property
    def tokens_per_s(self) -> Estimate:
        """Of all sequences together, all slots full."""
        return self.between_s.inverse

    @property
    def electricity_usd(self) -> Estimate:
        """Of a million tokens, at the paper's prices."""
        return self.joules * (1e6 / _JOULES_OF_KWH * PUE.value * ELECTRICITY.value)

    @property
    def carbon_kg(self) -> Estimate:
        """Of the electricity of a million tokens, as the paper reckons it."""
        return self.joules * (1e6 / _JOULES_OF_KWH * PUE.value * GRID.value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "joules": self.joules.to_dict(),
            "tokens_per_joule": self.tokens_per_joule.to_dict(),
            "token_s": self.token_s.to_dict(),
            "tokens_per_s": self.tokens_per_s.to_dict(),
            "blocks_joules": dict(self.blocks),
            "electricity_usd_per_million_tokens": self.electricity_usd.to_dict(),
            "carbon_kg_per_million_tokens": self.carbon_kg.to_dict(),
        }


def price_on_hnlpu(
    cost: Cost,
    shape: ModelShape,
    n_tokens: int,
    *,
    dense: Cost | None = None,
    plan: Plan | None = None,
    chip: Chip | None = None,
) -> ChipPrice:
    """Price what was executed on the hardwired chips of its model.

    Args:
        cost: Of a Plan, by `vesicle.cost.price` or as an engine counted it.
        shape: Of the model.
        n_tokens: How many tokens the cost is of.
        dense: The dense model's cost of the same tokens; `cost` itself if that was dense.
        plan: The Plan, which tells what modules were skipped; see `Work.of`.
        chip: The chips; by default those of `shape` at 4 bits.

    Raises:
        DataError: There are no tokens, or the dense cost is empty.
    """
    dense = cost if dense is None else dense
    chip = Chip.of(shape) if chip is None else chip
    own = Work.of(cost, dense, shape, n_tokens, plan=plan, cast_bits=chip.bits)
    return price_work(own, Work.of(dense, dense, shape, n_tokens), chip, n_tokens)


def price_work(work: Work, dense: Work, chip: Chip, n_tokens: int = 1) -> ChipPrice:
    """The same from work, that of a token and that of a token of the dense model."""
    blocks = _joules(work, dense, chip, MIDDLE)
    return ChipPrice(
        chip=chip,
        n_tokens=n_tokens,
        joules=Estimate.of(lambda scenario: sum(_joules(work, dense, chip, scenario).values())),
        token_s=Estimate.of(lambda scenario: timing(work, dense, chip, scenario).token_s),
        between_s=Estimate.of(lambda scenario: timing(work, dense, chip, scenario).between_s),
        blocks=blocks,
    )


def share_on_published_chip(work: Work, dense: Work) -> Estimate:
    """Joules of a token over the dense model's, if gpt-oss saved the same shares of its work.

    Nothing here depends on how the paper's chip is scaled to another model.
    """
    reference = published_work()
    own = price_work(reference.times(work.over(dense)), reference, PUBLISHED)
    return own.joules.over(price_work(reference, reference, PUBLISHED).joules)


def _joules(work: Work, dense: Work, chip: Chip, scenario: Scenario) -> dict[str, float]:
    """Of one token, by block."""
    own = _dies(work, dense, chip, scenario)
    whole = own if scenario.overhead_follows else _dies(dense, dense, chip, scenario)
    return {**own, _OUTSIDE: OVERHEAD.value * sum(whole.values())}


def _dies(work: Work, dense: Work, chip: Chip, scenario: Scenario) -> dict[str, float]:
    """Of one token, by block of the dies."""
    reference = published_work()
    pace = timing(work, dense, chip, scenario).between_s * THROUGHPUT.value
    cache = work.cache_numbers / reference.cache_numbers
    bits = work.bits if scenario.bits_save else 1.0
    talk = modules(work, scenario) * chip.n_layers * chip.width
    talk *= chip.linked / (GPT_OSS.n_layers * GPT_OSS.width)
    others = chip.blocks(scenario) / CHIPS.value

    def joules(block: Block, activity: float, size: float) -> float:
        dynamic, static = (1 - scenario.static) * activity, scenario.static * size * pace
        return block.joules * (dynamic + static)

    return {
        ARRAY.name: joules(
            ARRAY,
            work.macs / reference.macs * bits * chip.bits / 4,
            chip.cells / PUBLISHED.cells,
        ),
        VECTOR.name: joules(VECTOR, work.vector_flops / reference.vector_flops, others),
        BUFFER.name: joules(BUFFER, cache, others),
        LINK.name: joules(LINK, talk, others * chip.linked),
        MEMORY.name: joules(MEMORY, cache, others),
    }
