"""Tables of a Report, for the terminal and for Markdown, from the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vesicle.bench.contenders import REST
from vesicle.bench.results import Cell, Report, Row, Spread

if TYPE_CHECKING:
    from rich.table import Table

SPEED, RATIOS, READING = "Speed", "Times as fast", "What it reads, holds and says"
TITLES = (SPEED, RATIOS, READING)
"""One table each, so that they fit a terminal."""

_PHASES = ("decode", "prefill", "request")


def head(report: Report) -> list[str]:
    """What was measured on what, one line each."""
    hardware, text = report.hardware, report.text
    flags = ", ".join(hardware["flags"]) or "none of note"
    settings = report.config
    lines = [
        f"{hardware['cpu']}, {hardware['usable_cores']} cores, {settings['threads']} threads, "
        f"{hardware['system']}; {flags}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        f"{settings['rounds']} rounds, {settings['new_tokens']} decode steps each; "
        f"{text['description']}, tokens {text['sha256'][:12]}",
        f"{report.date}: {report.command}",
    ]
    seen = [
        f"{report.bandwidth[when]['read_gb_per_s']:.1f} GB/s {label}"
        for when, label in (("begin", "before"), ("end", "after"))
        if when in report.bandwidth
    ]
    if seen:
        small = report.bandwidth["begin"]["small_read_gb_per_s"]
        lines.insert(
            1, f"memory read at {', '.join(seen)} ({small:.1f} over 128 MiB again and again)"
        )
    return lines


def columns(report: Report, title: str) -> list[str]:
    """Names of a table's columns; the first is on the left, the others are numbers."""
    if title == SPEED:
        return [
            "contender",
            "prefill tokens/s",
            "first token ms",
            "decode ms/step",
            "quartiles",
            "decode tokens/s",
            "/ batch 1",
            "request s",
        ]
    if title == RATIOS:
        return [
            "contender",
            *(f"{p} / {name}" for p in _PHASES for name in _references(report)),
        ]
    return [
        "contender",
        "MB read/token",
        "/ rest",
        "of bandwidth",
        "FLOPs / dense",
        "peak MB",
        "own MB",
        "J/request",
        "tokens as rest",
        "text's own",
        "valid",
    ]


def cells(report: Report, row: Row, title: str) -> list[str]:
    """One row as text, in the order of `columns`."""
    if title == SPEED:
        step = row.decode_ms_per_step
        return [
            row.contender,
            f"{row.prefill_tokens_per_s.median:.0f}",
            f"{row.first_token_ms.median:.0f}",
            f"{step.median:.2f}",
            f"{step.low:.2f} to {step.high:.2f}",
            f"{row.decode_tokens_per_s.median:.1f}",
            _optional(row.tokens_per_s_over_batch.get("1"), ".2f"),
            "" if row.request_s is None else f"{row.request_s.median:.2f}",
        ]
    if title == RATIOS:
        ratios = [
            _times(row.speed_over[name][phase]) if phase in row.speed_over.get(name, {}) else ""
            for phase in _PHASES
            for name in _references(report)
        ]
        return [row.contender, *ratios]
    return [
        row.contender,
        f"{row.bytes_per_token / 1e6:.1f}",
        _optional(row.bytes_over_rest, ".2f"),
        _optional(row.bandwidth_share, ".0%"),
        _optional(row.executed_share, ".2f"),
        _megabytes(row.peak_memory_bytes),
        _megabytes(row.own_memory_bytes),
        "" if row.energy_j is None else f"{row.energy_j.median:.1f}",
        _optional(row.agreement, ".0%"),
        _optional(row.text_hits, ".0%"),
        "yes" if row.valid else "NO",
    ]


def rich_table(report: Report, cell: Cell, title: str) -> Table:
    """One table of one prompt length and batch size, for the terminal."""
    from rich.table import Table

    table = Table(title=f"{_name(cell)}: {title.lower()}", title_justify="left")
    for i, name in enumerate(columns(report, title)):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in _rows(report, cell):
        table.add_row(*cells(report, row, title), style=None if row.valid else "red")
    return table


def notes(report: Report) -> list[str]:
    """What is wrong: with the run, with rows, and rows that are missing."""
    lines = [f"NOT VALID: {reason}" for reason in report.reasons]
    if not report.finished:
        lines.append("NOT VALID: the run was cut short")
    who: dict[tuple[Cell, str], list[str]] = {}
    for row in report.rows:
        for reason in row.reasons:
            who.setdefault((row.cell, reason), []).append(row.contender)
    for (cell, reason), names in who.items():
        lines.append(f"NOT VALID: {', '.join(names)} at {_name(cell)}: {reason}")
    for name, about in report.contenders.items():
        if "note" in about.get("facts", {}):
            lines.append(f"note: {name}: {about['facts']['note']}")
    lines += [
        f"missing: {m['contender']} at {m['prompt_tokens']} tokens x {m['batch']}: {m['reason']}"
        for m in report.missing
    ]
    return lines


def step_lines(report: Report, cell: Cell) -> list[str]:
    """Where a decode step at rest spends its time, one line a phase; none where it is not known."""
    row = report.find(REST, cell)
    if row is None or not row.phases:
        return []
    limit = max(seen["read_gb_per_s"] for seen in report.bandwidth.values())
    lines = [f"A step of {REST}, the wait for the other threads and small work included:"]
    for name, phase in row.phases.items():
        line = f"{name}: {phase['ms']:.2f} ms"
        if phase["bytes"]:
            share = phase["gb_per_s"] / limit
            line += f", {phase['bytes'] / 1e6:.1f} MB, {phase['gb_per_s']:.1f} GB/s, {share:.0%}"
        lines.append(line)
    return lines


def markdown(report: Report) -> str:
    """A page with everything but the single rounds."""
    lines = ["# Speed side by side", ""]
    for line in head(report):
        lines += [line, ""]
    for cell in report.cells:
        lines += [f"## {_name(cell)}", ""]
        for title in TITLES:
            names = columns(report, title)
            lines += [_line(names), "|" + " --- |" * len(names)]
            lines += [_line(cells(report, row, title)) for row in _rows(report, cell)]
            lines.append("")
        if step := step_lines(report, cell):
            lines += [step[0], "", *(f"- {line}" for line in step[1:]), ""]
    lines += [f"- {note}" for note in notes(report)]
    return "\n".join(lines).rstrip() + "\n"


def _references(report: Report) -> list[str]:
    """Whom speeds are compared with: `rest` and the rivals."""
    compared = {name for row in report.rows for name in row.speed_over}
    return [name for name in report.contenders if name in compared | {REST}]


def _rows(report: Report, cell: Cell) -> list[Row]:
    return [row for row in report.rows if row.cell == cell]


def _name(cell: Cell) -> str:
    return f"{cell.prompt_tokens} tokens x {cell.batch}"


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"
