"""Plots of a Result: the rise in loss against the executed cost, one line a method.

The left panel has all windows, the right one the oracle's, where there are any. Bands are 95 %
bootstrap intervals over windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.evaluation.plots import STYLES, cost_axis, new_figure, save
from vesicle.evaluation.text_results import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"all": "All windows", "oracle": "The oracle's windows"}
_LOG_BEYOND = 15.0


def plot(result: Result) -> Figure:
    """Draw a result.

    Raises:
        MissingPlots: If matplotlib is not installed.
    """
    drawn = {row.subset for row in result.rows if row.budget < 1} | {"all"}
    panels = [subset for subset in TITLES if subset in drawn]
    figure = new_figure(figsize=(1.2 + 5.2 * len(panels), 4.4), dpi=160)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    seen: dict[str, Any] = {}
    for ax, subset in zip(axes, panels, strict=True):
        seen |= _panel(ax, result, subset)
    order = [method for method in STYLES if method in seen]
    figure.legend(
        [seen[m] for m in order],
        [_label(result, m) for m in order],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(f"{result.model['name']} under {result.modulator['name']}", fontsize=11)
    return figure


def save_plot(result: Result, path: Path | str) -> None:
    """Draw a result into a PNG file, all or nothing.

    Raises:
        MissingPlots: If matplotlib is not installed.
        VesicleError: The file cannot be written.
    """
    save(plot(result), path)


def _panel(ax: Axes, result: Result, subset: str) -> dict[str, Any]:
    """Draw one set of windows; returns the line of each method."""
    lines: dict[str, Any] = {}
    rows = [r for r in result.rows if r.subset == subset and r.method in STYLES and r.budget < 1]
    rises = [row.delta_nats for row in rows]
    logarithmic = bool(rises) and min(rises) > 0 and max(rises) > _LOG_BEYOND * min(rises)
    for method, (colour, marker) in STYLES.items():
        own = sorted((r for r in rows if r.method == method), key=lambda r: r.cost_share)
        if not own:
            continue
        x, y = [r.cost_share for r in own], [r.delta_nats for r in own]
        low, high = [_end(r, "low") for r in own], [_end(r, "high") for r in own]
        if not logarithmic:
            # On a logarithmic axis the dense model, at a rise of 0, has no place.
            x, y, low, high = [*x, 1.0], [*y, 0.0], [*low, 0.0], [*high, 0.0]
        first = method == "learnt"
        if own[0].delta_low_nats is not None:
            floor = min(rises) / 3 if logarithmic else -float("inf")
            ax.fill_between(
                x, [max(v, floor) for v in low], high, color=colour, alpha=0.12, linewidth=0
            )
        (lines[method],) = ax.plot(
            x,
            y,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if first else 1.4,
            linestyle="--" if method == "oracle" else "-",
            zorder=4 if first else 3,
        )
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    if rows:
        ax.set_xticks(sorted({r.budget for r in rows} | (set() if logarithmic else {1.0})))
    some = next((r for r in result.rows if r.subset == subset), None)
    sizes = f": {some.n_windows} × {some.n_tokens // some.n_windows + 1} tokens" if some else ""
    ax.set_title(TITLES[subset] + sizes, fontsize=10)
    cost_axis(ax, "executed FLOPs, share of dense", "both" if logarithmic else "major")
    ax.set_ylabel("rise in loss over dense (nats per token)")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return lines


def _end(row: Row, end: str) -> float:
    value = getattr(row, f"delta_{end}_nats")
    return row.delta_nats if value is None else float(value)


def _label(result: Result, method: str) -> str:
    if method != "best-of-n":
        return method
    return f"best of {result.config['best_of']} random"
