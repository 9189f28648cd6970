"""One report of what was executed: on hardwired chips, on two other machines, and over the years.

`report` makes it, `tables` shows it, `to_dict` gives it as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, log10
from typing import Any

from rich.table import Table

from vesicle.cost import Cost
from vesicle.neurons.hnlpu.chip import Chip
from vesicle.neurons.hnlpu.deployment import Deployment, DeploymentPrice, price_deployment
from vesicle.neurons.hnlpu.machines import GPU, WAFER, MachinePrice, price_on_machine
from vesicle.neurons.hnlpu.pricing import ChipPrice, price_on_hnlpu, share_on_published_chip
from vesicle.neurons.hnlpu.scenarios import Estimate
from vesicle.neurons.hnlpu.work import Work
from vesicle.plan import Plan
from vesicle.shapes import ModelShape

CAUTION = "arithmetic on published constants and on assumptions, not a measurement"


@dataclass(frozen=True, kw_only=True)
class ChipReport:
    """What was executed, priced on hardwired chips and beside them.

    Attributes:
        executed: The Plan's price.
        dense: The dense model's, of the same tokens on the same chips.
        flops: Executed share of the dense FLOPs.
        published_chip: Joules of the dense joules, had gpt-oss 120B saved the same shares.
        machines: An H100 and a WSE-3.
        deployment: Of the chips, serving what was executed.
        dense_deployment: The same, serving the dense model.
    """

    executed: ChipPrice
    dense: ChipPrice
    flops: float
    published_chip: Estimate
    machines: tuple[MachinePrice, ...]
    deployment: DeploymentPrice
    dense_deployment: DeploymentPrice

    @property
    def joules_share(self) -> Estimate:
        """Joules of a token over the dense model's."""
        return self.executed.joules.over(self.dense.joules)

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        chip = self.executed.chip
        return {
            "what": CAUTION,
            "n_tokens": self.executed.n_tokens,
            "chip": {
                "parameters": chip.parameters,
                "cast_bits": chip.bits,
                "n_chips": chip.n_chips,
                "area_mm2": chip.area_mm2.to_dict(),
                "nre_usd": chip.nre_usd.to_dict(),
                "masks_usd": chip.masks_usd.to_dict(),
                "made_usd": chip.made_usd.to_dict(),
            },
            "executed": self.executed.to_dict(),
            "dense": self.dense.to_dict(),
            "share": {
                "flops": self.flops,
                "joules": self.joules_share.to_dict(),
                "token_s": self.executed.token_s.over(self.dense.token_s).to_dict(),
                "between_s": self.executed.between_s.over(self.dense.between_s).to_dict(),
                "joules_on_published_chip": self.published_chip.to_dict(),
            },
            "machines": [machine.to_dict() for machine in self.machines],
            "deployment": self.deployment.to_dict(),
            "dense_deployment": self.dense_deployment.to_dict(),
        }


def report(
    executed: Cost,
    dense: Cost,
    shape: ModelShape,
    n_tokens: int,
    *,
    plan: Plan | None = None,
    chip: Chip | None = None,
    deployment: Deployment | None = None,
) -> ChipReport:
    """Price what was executed.

    Args:
        executed: What a Plan cost.
        dense: The dense model's cost of the same tokens.
        shape: Of the model.
        n_tokens: How many tokens.
        plan: The Plan, where it is known.
        chip: The chips; by default those of `shape` at 4 bits.
        deployment: How the chips are used; one system for three years by default.

    Raises:
        DataError: There are no tokens, the dense cost is empty, or the Plan has other tokens.
    """
    chip = Chip.of(shape) if chip is None else chip
    own = price_on_hnlpu(executed, shape, n_tokens, dense=dense, plan=plan, chip=chip)
    whole = price_on_hnlpu(dense, shape, n_tokens, chip=chip)
    work = Work.of(executed, dense, shape, n_tokens, plan=plan, cast_bits=chip.bits)
    return ChipReport(
        executed=own,
        dense=whole,
        flops=executed.ratio(dense)["flops"],
        published_chip=share_on_published_chip(work, Work.of(dense, dense, shape, n_tokens)),
        machines=tuple(
            price_on_machine(machine, whole, executed, dense) for machine in (GPU, WAFER)
        ),
        deployment=price_deployment(own, deployment),
        dense_deployment=price_deployment(whole, deployment),
    )


def tables(found: ChipReport) -> list[Table]:
    """The report for a terminal: the middle scenario, and in brackets the range of all three."""
    return [_priced(found), _blocks(found), _facts(found)]


def figure(value: float) -> str:
    """A number of three digits or more: `0.00102`, `27.6`, `13,233`."""
    digits = 2 - floor(log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def shown(value: Estimate, write: Callable[[float], str] = figure) -> str:
    """The middle, and the range where there is one: `27.6 (25.1 to 27.6)`."""
    middle, low, high = write(value.middle), write(value.low), write(value.high)
    return middle if low == high else f"{middle} ({low} to {high})"


def headed(title: str, *columns: str) -> Table:
    """An empty table of a text and of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def share(value: float) -> str:
    """A share of the dense model."""
    return f"{value:.3f}"


def _priced(found: ChipReport) -> Table:
    table = headed("a token on hardwired chips", "executed", "dense", "share")
    quantities: list[tuple[str, float, Callable[[ChipPrice], Estimate]]] = [
        ("energy, mJ", 1e3, lambda price: price.joules),
        ("to its sequence's next, us", 1e6, lambda price: price.token_s),
        ("to the next of any sequence, us", 1e6, lambda price: price.between_s),
        ("electricity of a billion, USD", 1e3, lambda price: price.electricity_usd),
    ]
    for name, scale, of in quantities:
        own, whole = of(found.executed) * scale, of(found.dense) * scale
        table.add_row(name, shown(own), shown(whole), shown(own.over(whole), share))
    for machine in found.machines:
        own, whole = machine.joules * 1e3, machine.dense_joules * 1e3
        name = f"energy on {machine.name} by ratio, mJ"
        table.add_row(name, shown(own), shown(whole), shown(machine.share, share))
    table.add_row("energy on gpt-oss's chips", "", "", shown(found.published_chip, share))
    table.add_row("FLOPs of the ledger", "", "", share(found.flops))
    return table


def _blocks(found: ChipReport) -> Table:
    table = headed("energy by block, mJ", "executed", "dense", "of all dense")
    for name, joules in found.executed.blocks.items():
        whole = found.dense.blocks[name]
        part = whole / found.dense.joules.middle
        table.add_row(name, figure(1e3 * joules), figure(1e3 * whole), share(part))
    return table


def _facts(found: ChipReport) -> Table:
    chip, total = found.executed.chip, found.deployment.per_million_tokens
    millions = f"{figure(chip.parameters / 1e6)} million parameters of {chip.bits} bits"
    once, again = chip.nre_usd * 1e-6, chip.masks_usd * 1e-6
    table = Table.grid(padding=(0, 2))
    table.add_row("chips", f"{chip.n_chips}, {millions}, {shown(chip.area_mm2)} mm2")
    table.add_row("paid once", f"{shown(once)} million USD; for new weights {shown(again)}")
    table.add_row("in service", f"{shown(total)} USD for a million tokens, with all of that")
    table.add_row("a Plan", "changes energy and time alone: the metal is there and paid for")
    table.add_row("this is", CAUTION)
    return table
