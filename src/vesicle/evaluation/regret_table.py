"""Tables of a Result, for the terminal and for Markdown, from one list of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vesicle.evaluation.regret_results import Result, Row

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
        _difference(row.delta_nats, row.delta_low_nats, row.delta_high_nats),
        f"{row.bits_per_byte:.4f}",
        "" if against is None else _difference(against.mean, against.low, against.high),
        f"{row.seconds:.0f}",
    ]


def rich_table(result: Result, subset: str = "all") -> Table:
    """A table for the terminal."""
    from rich.table import Table

    table = Table(title=SUBSETS[subset], title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right")
    before: Row | None = None
    for row in _rows(result, subset):
        if before is not None and before.budget != row.budget:
            table.add_section()
        table.add_row(*cells(result, row))
        before = row
    return table


def markdown(result: Result) -> str:
    """A page with what was measured on what, one table per set of windows, and what is missing."""
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    lines = [
        f"# {result.model['name']} under {result.modulator['name']}",
        "",
        f"Text: {result.data['description']}. {result.data['n_tokens']:,} tokens scored, "
        f"{result.data['n_bytes']:,} bytes, SHA-256 {result.data['sha256'][:12]}.",
        "",
        f"Seed {result.seed}; {result.config['dtype']}; {versions}; {result.hardware['cpu']}, "
        f"{result.hardware['cores']} cores.",
        "",
        "Cost is the share of the dense model's FLOPs that was executed, everything counted. "
        "Intervals are 95 % bootstrap intervals over windows, paired.",
    ]
    for subset, title in SUBSETS.items():
        rows = _rows(result, subset)
        if not rows:
            continue
        lines += ["", f"## {title}", "", _line(COLUMNS), "|" + " --- |" * len(COLUMNS)]
        lines += [_line(cells(result, row)) for row in rows]
    if result.missing:
        lines += ["", "## Missing", ""]
        lines += [
            f"- {m['method']} at {m['budget']:g} ({m['subset']}): {m['reason']}"
            for m in result.missing
        ]
    return "\n".join(lines) + "\n"


def _rows(result: Result, subset: str) -> list[Row]:
    return [row for row in result.rows if row.subset == subset]


def _line(values: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(values) + " |"


def _difference(mean: float, low: float | None, high: float | None) -> str:
    text = f"{mean:+.4f}"
    return text if low is None or high is None else f"{text} [{low:+.4f}, {high:+.4f}]"
