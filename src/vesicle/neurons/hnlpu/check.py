"""Does the ledger give back what was published, also what it was not made from?

The system's throughput, energy, area and price come back by making: a wrong unit would show, and
nothing else. Three things are checks in earnest, because no constant was taken from them: where the
time goes at five contexts (figure 14, of which two numbers at 2K and one of attention are used),
the cost of three years (table 3), and the one-off prices of four other models (table 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vesicle.cost import price, price_dense
from vesicle.neurons.hnlpu.chip import PUBLISHED, Chip
from vesicle.neurons.hnlpu.constants import (
    ACTIVE,
    CHIP_PRICES,
    CHIPS,
    CONTEXT,
    DENSITY,
    DEPLOYED,
    GPT_OSS,
    GPU_TOKENS_PER_S,
    MASK_SAVING,
    MASK_SET,
    NAIVE_MASKS,
    NRE_FIRST,
    NRE_SECOND,
    SHARED_MASKS,
    SYSTEM_AREA,
    SYSTEM_POWER,
    THROUGHPUT,
    TIME_BY_CONTEXT,
    TOKENS_PER_KJ,
    WAFER_TOKENS_PER_S,
)
from vesicle.neurons.hnlpu.deployment import Deployment, price_deployment
from vesicle.neurons.hnlpu.machines import GPU, WAFER, price_on_machine
from vesicle.neurons.hnlpu.pricing import ChipPrice, price_on_hnlpu
from vesicle.neurons.hnlpu.scenarios import Estimate
from vesicle.neurons.hnlpu.timing import context_shares
from vesicle.neurons.hnlpu.work import published_work
from vesicle.plan import FFN_BIG, FFN_SKIP, Plan

_OTHERS = {
    "Kimi-K2": (1000e9, 8),
    "DeepSeek-V3": (671e9, 8),
    "QwQ": (32e9, 16),
    "Llama-3": (8e9, 16),
}
"""Parameters as table 4 has them, and bits of the weights that their makers publish; the table does
not say for how many bits its metal is cast."""
_SLACK = 0.01
"""Published numbers are rounded to three or four digits."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity, as it was published and as the ledger has it.

    Attributes:
        quantity: What it is.
        published: The least and the most, or twice the same.
        low: The least that the ledger gives.
        high: The most.
        unit: Of all four.
        by_making: Whether the ledger was made from it.
    """

    quantity: str
    published: tuple[float, float]
    low: float
    high: float
    unit: str
    by_making: bool

    @property
    def agrees(self) -> bool:
        """Whether the ledger's range meets the published one, to a percent."""
        slack = 1 + _SLACK
        return self.low <= self.published[1] * slack and self.published[0] <= self.high * slack

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {**asdict(self), "published": list(self.published), "agrees": self.agrees}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one kind of decision alone saves on the paper's chips.

    Attributes:
        name: Of it.
        flops: Executed of the dense FLOPs.
        bytes_read: Executed of the dense bytes.
        joules: Of the dense joules.
        token_s: Of the dense time from a token to the next of its sequence.
        tokens_per_s: Times the dense throughput.
    """

    name: str
    flops: float
    bytes_read: float
    joules: Estimate
    token_s: Estimate
    tokens_per_s: Estimate

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return {
            "name": self.name,
            "flops": self.flops,
            "bytes_read": self.bytes_read,
            "joules": self.joules.to_dict(),
            "token_s": self.token_s.to_dict(),
            "tokens_per_s": self.tokens_per_s.to_dict(),
        }


def given_back() -> list[Row]:
    """Every published quantity that the ledger can give, those it was made from first."""
    price = published_price()
    dense = price_dense(GPT_OSS, 1, first_position=int(CONTEXT.value) - 1)
    gpu, wafer = (price_on_machine(machine, price, dense, dense) for machine in (GPU, WAFER))
    capital = price_deployment(price).made
    rows = [
        _row("throughput", THROUGHPUT.value, price.tokens_per_s, "tokens/s"),
        _row("energy efficiency", TOKENS_PER_KJ.value / 1e3, price.tokens_per_joule, "tokens/J"),
        _row("area of all dies", SYSTEM_AREA.value, price.chip.area_mm2, "mm2"),
        _row("power", SYSTEM_POWER.value, price.joules * price.tokens_per_s.middle, "W"),
        _row(
            "parameters that a token meets",
            ACTIVE.value,
            Estimate.same(published_work().macs),
            "",
            made=False,
        ),
        _row("throughput of an H100", GPU_TOKENS_PER_S.value, gpu.tokens_per_s, "tokens/s"),
        _row("throughput of a WSE-3", WAFER_TOKENS_PER_S.value, wafer.tokens_per_s, "tokens/s"),
        _row("capital of one system", (NRE_SECOND.low, NRE_SECOND.high), capital, "USD"),
        _row("the same, in its first version", NRE_FIRST.value, capital, "USD", made=False),
    ]
    return [*rows, *_mask_rows(), *_deployment_rows(price), *_price_rows(), *_time_rows()]


def published_price() -> ChipPrice:
    """Of the token that table 2 is about, on the paper's chips."""
    dense = price_dense(GPT_OSS, 1, first_position=int(CONTEXT.value) - 1)
    return price_on_hnlpu(dense, GPT_OSS, 1, chip=PUBLISHED)


def single_decisions() -> list[Decision]:
    """What one kind of decision alone saves of a token of gpt-oss at the paper's context."""
    first = int(CONTEXT.value) - 1
    shape = GPT_OSS
    rest = Plan.rest(shape, first + 1).tokens(first)
    dense = price(rest, shape, first_position=first)
    whole = price_on_hnlpu(dense, shape, 1, plan=rest, chip=PUBLISHED)
    every_second = np.arange(shape.n_layers) % 2 == 1
    plans = {
        "all at rest": rest,
        "half of the channels": rest.with_fields(channels=rest.channels // 2),
        "half of the weight bits": rest.with_fields(
            bits=np.full_like(rest.bits, PUBLISHED.bits // 2)
        ),
        "every second FFN skipped": rest.with_fields(
            ffn=np.where(every_second, FFN_SKIP, FFN_BIG)[None].astype(np.int32)
        ),
        "every second attention skipped": rest.with_fields(
            attention=np.where(every_second, 0, 1)[None].astype(np.int32)
        ),
        "a quarter of the cached blocks": rest.with_fields(kv_blocks=rest.kv_blocks // 4),
    }
    found = []
    for name, plan in plans.items():
        cost = price(plan, shape, first_position=first)
        own = price_on_hnlpu(cost, shape, 1, dense=dense, plan=plan, chip=PUBLISHED)
        ratio = cost.ratio(dense)
        found.append(
            Decision(
                name=name,
                flops=ratio["flops"],
                bytes_read=ratio["bytes_read"],
                joules=own.joules.over(whole.joules),
                token_s=own.token_s.over(whole.token_s),
                tokens_per_s=own.tokens_per_s.over(whole.tokens_per_s),
            )
        )
    return found


def _mask_rows() -> Iterator[Row]:
    full, shared = MASK_SET.high, SHARED_MASKS.high
    assert full is not None
    assert shared is not None
    masks = shared + PUBLISHED.masks_usd.high
    saved = Estimate.same(DENSITY.value * CHIPS.value * full / masks)
    yield _row("masks saved, by density and sharing", MASK_SAVING.value, saved, "", made=False)
    saved = Estimate.same(NAIVE_MASKS.value / masks)
    yield _row("masks saved, 6 billion over ours", MASK_SAVING.value, saved, "", made=False)


def _deployment_rows(price: ChipPrice) -> Iterator[Row]:
    for systems, published in DEPLOYED.items():
        total = price_deployment(price, Deployment(systems=systems)).total
        name = f"three years of {systems} system{'s' if systems > 1 else ''}"
        yield _row(name, published, total, "USD", made=False)


def _price_rows() -> Iterator[Row]:
    for name, published in CHIP_PRICES.items():
        parameters, own = _OTHERS[name]
        for bits in (4, own):
            chip = Chip(parameters=int(parameters), bits=bits, n_layers=1, width=1)
            what = f"one-off, {name} at {bits} bits"
            yield _row(what, published, chip.nre_usd, "USD", made=False)


def _time_rows() -> Iterator[Row]:
    for context, shares in TIME_BY_CONTEXT.items():
        found = context_shares(context)
        for part, share in shares.items():
            if part in found:
                name = f"time of {part} at {context // 1024}K"
                used = context == CONTEXT.value or (context, part) == (128 * 1024, "attention")
                # The ledger knows no stalls: shares are of the time without them.
                busy = share / (1 - shares.get("stall", 0.0))
                yield _row(name, busy, Estimate.same(found[part]), "", made=used)


def _row(
    quantity: str,
    published: float | tuple[float | None, float | None],
    given: Estimate,
    unit: str,
    *,
    made: bool = True,
) -> Row:
    low, high = published if isinstance(published, tuple) else (published, published)
    assert low is not None
    assert high is not None
    return Row(
        quantity=quantity,
        published=(low, high),
        low=given.low,
        high=given.high,
        unit=unit,
        by_making=made,
    )
