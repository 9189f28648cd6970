"""Plots of a TaskResult: each task's main metric against the executed cost, one line a method.

Bands are 95 % bootstrap intervals over items. Colours are those of Okabe and Ito, told apart by
people with the common kinds of colour blindness; markers differ too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.evaluation.methods.names import saves_memory
from vesicle.evaluation.report.results import TaskResult, TaskRow
from vesicle.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: dict[str, tuple[str, str]] = {
    "learnt": ("#000000", "o"),
    "uniform": ("#E69F00", "s"),
    "uniform-mix": ("#56B4E9", "D"),
    "per-layer": ("#009E73", "^"),
    "random": ("#CC79A7", "v"),
    "shuffled": ("#D55E00", "P"),
    "best-of-n": ("#0072B2", "X"),
    "static-shape": ("#8C6D31", "<"),
    "oracle": ("#7F7F7F", "*"),
}
"""Colour and marker of each method."""

_LOG_BEYOND, _LOG_BEYOND_RISE = 3.0, 15.0


def save_plots(
    result: TaskResult, folder: Path, name: str = "quality_against_cost.png", *, rise: bool = False
) -> Path:
    """Draw all tasks side by side.

    Args:
        result: What is drawn.
        folder: To write to.
        name: Of the PNG file.
        rise: Whether to draw differences to the dense model, which are paired.

    Returns:
        The file's path.

    Raises:
        MissingPlots: matplotlib is not installed.
    """
    n = len(result.tasks)
    columns = min(n, 3)
    rows = -(-n // columns)
    figure = new_figure(5.2 * columns, 3.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[n:]:
        panel.set_axis_off()
    styles = _styles(result)
    seen: dict[str, Any] = {}
    for panel, task in zip(panels, result.tasks, strict=False):
        _draw(panel, task, result.of_task(task["name"]), styles, rise)
        handles, labels = panel.get_legend_handles_labels()
        seen |= dict(zip(labels, handles, strict=True))
    if seen:
        figure.legend(
            list(seen.values()), list(seen), loc="outside lower center", ncols=6, frameon=False
        )
    target = folder / name
    save_figure(figure, target)
    return target


def _styles(result: TaskResult) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in all panels."""
    spare = iter([("#0072B2", "h"), ("#E69F00", "<"), ("#009E73", ">"), ("#D55E00", "p")] * 9)
    methods = dict.fromkeys(row.method for row in result.rows if row.method != "dense")
    styles = {m: STYLES.get(m) or next(spare) for m in methods}
    return {**styles, "dense": ("#7F7F7F", "*")}


def _draw(
    axes: Axes,
    task: dict[str, Any],
    rows: list[TaskRow],
    styles: dict[str, tuple[str, str]],
    rise: bool,
) -> None:
    metric = task["metrics"][0]
    dense = next((row for row in rows if row.method == "dense"), None)
    if dense is None:  # none of its items could be run, so that there are no other rows
        axes.set_axis_off()
        return
    others = [row for row in rows if row.method != "dense" and (row.budget < 1 or not rise)]

    def point(row: TaskRow) -> tuple[float, float | None, float | None]:
        s = row.scores[metric["name"]]
        return (s.delta, s.delta_low, s.delta_high) if rise else (s.value, s.low, s.high)

    values = [point(row)[0] for row in (others if rise else rows)]
    beyond = _LOG_BEYOND_RISE if rise else _LOG_BEYOND
    least = min(values, default=0.0)
    logarithmic = not metric["percent"] and max(values, default=0.0) > beyond * least > 0
    # On a logarithmic axis a rise of 0 has no place.
    start = [] if rise and logarithmic else [dense]
    memory = bool(others) and all(saves_memory(row.method) for row in others)
    cost = "kv_bytes_held" if memory else "flops"
    for method in dict.fromkeys(row.method for row in others) or ["dense"]:
        own = [*start, *(row for row in others if row.method == method)]
        colour, marker = styles[method]
        x, points = [row.ratio[cost] for row in own], [point(row) for row in own]
        axes.plot(x, [value for value, *_ in points], color=colour, marker=marker, label=method)
        floor = least / 3 if rise and logarithmic else -math.inf
        bounds = [
            (max(low, floor), high)
            for _, low, high in points
            if low is not None and high is not None
        ]
        if x and len(bounds) == len(x):
            low, high = zip(*bounds, strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_title(f"{task['title']}, {task['n_items']} items", fontsize=10)
    share = "KV memory held" if memory else "executed FLOPs"
    axes.set_xlabel(f"{share}, share of dense")
    axes.invert_xaxis()
    axes.grid(visible=True, color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    unit = ", %" if metric["percent"] else ""
    axes.set_ylabel(metric["title"] + unit + (", less dense" if rise else ""))
