"""Tables of what the ledger rests on: constants, what it gives back, what one decision saves."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vesicle.neurons.hnlpu.check import Decision, Row
from vesicle.neurons.hnlpu.constants import Constant
from vesicle.neurons.hnlpu.report import figure, headed, share, shown


def check_tables(rows: Sequence[Row], decisions: Sequence[Decision]) -> list[Table]:
    """What was published beside what the ledger gives, and what single decisions save."""
    given = headed("published", "published", "the ledger's", "agrees", "unit")
    for row in rows:
        scale, unit = (1e-6, "million USD") if row.unit == "USD" else (1.0, row.unit)
        given.add_row(
            row.quantity,
            _ends(*(scale * end for end in row.published)),
            _ends(scale * row.low, scale * row.high),
            "by making" if row.by_making else ("yes" if row.agrees else "no"),
            unit,
        )
    saved = headed(
        "one decision alone, gpt-oss 120B", "FLOPs", "energy", "time of a token", "tokens/s"
    )
    for decision in decisions:
        saved.add_row(
            decision.name,
            share(decision.flops),
            shown(decision.joules, share),
            shown(decision.token_s, share),
            shown(decision.tokens_per_s, share),
        )
    return [given, saved]


def constants_table(found: Sequence[Constant]) -> Table:
    """Every constant, its kind and where it is from."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("constant", "value", "kind", "source"):
        table.add_column(column, overflow="fold")
    for constant in found:
        value = figure(constant.value)
        if constant.low is not None and constant.high is not None:
            value = _ends(constant.low, constant.high)
        table.add_row(
            constant.name, f"{value} {constant.unit}".strip(), constant.kind, constant.source
        )
    return table


def _ends(low: float, high: float) -> str:
    return figure(low) if figure(low) == figure(high) else f"{figure(low)} to {figure(high)}"
