"""Tables of a TaskResult, for the terminal and for Markdown, from one list of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vesicle.evaluation.report.results import ORACLE_PART, Score, TaskResult, TaskRow
from vesicle.phases import GENERATED
from vesicle.tasks.items import Missing

if TYPE_CHECKING:
    from rich.table import Table


_RATIOS = ("weight_bytes", "kv_bytes_read", "kv_bytes_held")
_NAMED = 10
"""Missing items of a kind that a page names; the record has them all."""
_LEFT_OUT = ("FLOPs", "weights read", "KV read", "KV held", "prefill s", "decode s")


def columns(task: dict[str, Any]) -> list[str]:
    """Headings of a task's table."""
    main, *others = (m["title"] for m in task["metrics"])
    return [
        "method",
        "budget",
        "FLOPs",
        "FLOPs, generated",
        "weights read",
        "KV read",
        "KV held",
        f"{main} [95 %]",
        "less dense [95 %]",
        "learnt less this [95 %]",
        *others,
        "prefill s",
        "decode s",
    ]


def cells(task: dict[str, Any], row: TaskRow) -> list[str]:
    """One row as text, in the order of `columns`."""
    main, *others = task["metrics"]
    score = row.scores[main["name"]]
    digits = _digits(main)
    dense = row.method == "dense"
    seconds = row.measured["seconds"]
    return [
        row.method,
        f"{row.budget:g}",
        f"{row.ratio['flops']:.3f}",
        # Without phases all tokens were governed alike.
        f"{row.shares.get(GENERATED, row.ratio['flops']):.3f}",
        *(f"{row.ratio[name]:.3f}" if name in row.ratio else "" for name in _RATIOS),
        _interval(score.value, score.low, score.high, digits) + _fewer(task, row),
        "" if dense else _signed(score.delta, score.delta_low, score.delta_high, digits),
        _gain(score, digits),
        *(f"{row.scores[m['name']].value:.{_digits(m)}f}" for m in others),
        f"{seconds['prefill']:.0f}",
        f"{seconds['decode']:.0f}",
    ]


def rich_tables(result: TaskResult) -> list[Table]:
    """One table a task, for the terminal: the columns that fit; `markdown` has them all."""
    from rich.markup import escape
    from rich.table import Table

    tables = []
    for task in result.tasks:
        table = Table(
            title=escape(f"{_title(task)}, {task['n_items']} items"),
            title_justify="left",
            caption=escape("\n".join(missing(result, task["name"]))) or None,
            caption_justify="left",
        )
        names = columns(task)
        shown = [i for i, name in enumerate(names) if name not in _LEFT_OUT]
        for i in shown:
            table.add_column(escape(names[i]), justify="left" if i == 0 else "right")
        before: TaskRow | None = None
        for row in result.of_task(task["name"]):
            if before is not None and before.budget != row.budget:
                table.add_section()
            found = cells(task, row)
            table.add_row(*(escape(found[i]) for i in shown))
            before = row
        tables.append(table)
    return tables


def markdown(result: TaskResult) -> str:
    """A page with what was measured on what, one table a task, and what is missing."""
    n = sum(not task["name"].endswith(ORACLE_PART) for task in result.tasks)
    model, under = result.model, result.decider
    lines = [
        f"# {model['name']} on {n} task{'s' if n > 1 else ''}",
        "",
        f"Executed by {model['through']}, weights {model['weights']}, cache {model['kv']}; "
        f"modulator: {under}. Seed {result.seed}; " + made_with(result.versions, result.hardware),
        "",
        "FLOPs, weights read, KV read and KV held are executed shares of the dense model's on the "
        "same tokens, prompts included; of the FLOPs, that of generated and scored tokens alone "
        "too, which is what a budget counts unless all tokens are governed. Intervals are 95 % "
        "bootstrap intervals over items; differences are paired.",
    ]
    for task in result.tasks:
        shortened = f"; {task['shortened']} shortened" if task["shortened"] else ""
        left_out = len(task.get("missing", ()))
        shortened += f"; {left_out} left out, see below" if left_out else ""
        lines += [
            "",
            f"## {_title(task)}",
            "",
            f"{task['data']}; {task['n_items']} items, {task['prompt_tokens']:,} prompt "
            f"tokens{shortened}; SHA-256 {task['sha256'][:12]}.",
        ]
        for metric in task["metrics"]:
            if metric["signature"]:
                lines.append(f"{metric['title']}: `{metric['signature']}`.")
        rows = [cells(task, row) for row in result.of_task(task["name"])]
        names = columns(task)
        lines += ["", _line(names), "|" + " --- |" * len(names), *map(_line, rows)]
    gone = [line for task in result.tasks for line in missing(result, task["name"])]
    if gone:
        lines += ["", "## Missing", "", *(f"- {line}" for line in gone)]
    return "\n".join(lines) + "\n"


def missing(result: TaskResult, task: str) -> list[str]:
    """What of a task could not be asked, run or had, each in a line: items first, then rows."""
    facts = next(t for t in result.tasks if t["name"] == task)
    lines = _named(task, facts.get("missing", ()))
    for row in result.of_task(task):
        lines += _named(
            f"{task}, {row.method} at {row.budget:g}", row.items.get("missing", ()), ", item "
        )
    return lines + [
        f"{m['task']}, {m['method']} at {m['budget']:g}: {m['reason']}"
        for m in result.missing
        if m["task"] == task
    ]


def _named(where: str, items: Sequence[Mapping[str, str]], kind: str = ", ") -> list[str]:
    lines = [f"{where}{kind}{Missing(**one)}" for one in items[:_NAMED]]
    more = len(items) - _NAMED
    return [*lines, f"{where}: and {more} more, which result.json lists"] if more > 0 else lines


def _fewer(task: dict[str, Any], row: TaskRow) -> str:
    """How many items a row has, if not all that could be asked."""
    return "" if row.n_items == task["n_items"] else f", n={row.n_items}"


def _title(task: dict[str, Any]) -> str:
    better = "higher" if task["metrics"][0]["higher_is_better"] else "lower"
    return f"{task['title']} ({better} is better)"


def _gain(score: Score, digits: int) -> str:
    if score.learnt is None:
        return ""
    return _signed(score.learnt, score.learnt_low, score.learnt_high, digits)


def _interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    """A number, with its interval if it has one."""
    text = f"{value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _signed(value: float, low: float | None, high: float | None, digits: int) -> str:
    """The same of a difference, signed."""
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def made_with(versions: dict[str, str], hardware: dict[str, Any]) -> str:
    """What numbers were made with, as pages have it."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{named}; {hardware['cpu']}, {hardware['cores']} cores."


def _digits(metric: dict[str, Any]) -> int:
    """Behind the point; old records do not say."""
    return int(metric.get("digits", 1 if metric["percent"] else 3))


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
