"""Tables of a Result, for the terminal and for Markdown, from one list of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vesicle.evaluation.cells import difference, made_with, markdown_table, terminal_table
from vesicle.evaluation.text_results import Result, Row

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "method",
    "budget",
    "cost",
    "loss (nats/token)",
    "rise over dense [95 %]",
    "bits/byte",
    "worse than learnt [95 %]",
    "seconds",
)
SUBSETS = {
    "all": "All windows",
    "oracle": "The oracle's windows (fewer and shorter; every row tuned to the cost on them)",
}


def cells(result: Result, row: Row) -> list[str]:
    """One row as text, in the order of `COLUMNS`."""
    against = result.against_learnt(row)
    name = f"best of {row.details['n']}" if row.method == "best-of-n" else row.method
    return [
        name,
        f"{row.budget:g}",
        f"{row.cost_share:.4f}",
        f"{row.loss_nats:.4f}",
        difference(row.delta_nats, row.delta_low_nats, row.delta_high_nats, 4),
        f"{row.bits_per_byte:.4f}",
        "" if against is None else difference(against.mean, against.low, against.high, 4),
        f"{row.seconds:.0f}",
    ]


def rich_table(result: Result, subset: str = "all") -> Table:
    """A table for the terminal."""
    rows = [(row.budget, cells(result, row)) for row in _rows(result, subset)]
    return terminal_table(COLUMNS, rows, title=SUBSETS[subset])


def markdown(result: Result) -> str:
    """A page with what was measured on what, one table per set of windows, and what is missing."""
    lines = [
        f"# {result.model['name']} under {result.modulator['name']}",
        "",
        f"Text: {result.data['description']}. {result.data['n_tokens']:,} tokens scored, "
        f"{result.data['n_bytes']:,} bytes, SHA-256 {result.data['sha256'][:12]}.",
        "",
        f"Seed {result.seed}; {result.config['dtype']}; "
        + made_with(result.versions, result.hardware),
        "",
        "Cost is the share of the dense model's FLOPs that was executed, everything counted. "
        "Intervals are 95 % bootstrap intervals over windows, paired.",
    ]
    for subset, title in SUBSETS.items():
        rows = _rows(result, subset)
        if not rows:
            continue
        lines += ["", f"## {title}", ""]
        lines += markdown_table(COLUMNS, [cells(result, row) for row in rows])
    if result.missing:
        lines += ["", "## Missing", ""]
        lines += [
            f"- {m['method']} at {m['budget']:g} ({m['subset']}): {m['reason']}"
            for m in result.missing
        ]
    return "\n".join(lines) + "\n"


def _rows(result: Result, subset: str) -> list[Row]:
    return [row for row in result.rows if row.subset == subset]
