"""A plot of a Report: prefill and decode speed, one group of bars a prompt length.

One row of panels for each batch size. Whiskers are quartiles; bars of rows that are not valid are
hatched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.bench.results import Cell, Report, Row, Spread
from vesicle.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072B2", "#009E73", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#7F7F7F")
"""Of Okabe and Ito, in the order of contenders."""

PANELS = {"decode": "decode, tokens/s of all sequences", "prefill": "prefill, tokens/s"}


def plot(report: Report) -> Figure:
    """Draw a report.

    Raises:
        MissingPlots: If matplotlib is not installed.
    """
    batches = sorted({cell.batch for cell in report.cells})
    figure = new_figure(11, 1 + 3.2 * max(len(batches), 1))
    from matplotlib.patches import Patch

    axes = figure.subplots(max(len(batches), 1), len(PANELS), squeeze=False)
    for line, batch in zip(axes, batches, strict=False):
        for ax, (phase, title) in zip(line, PANELS.items(), strict=True):
            _bars(ax, report, batch, phase)
            ax.set_title(f"{title}, batch {batch}", fontsize=10)
    handles = [Patch(color=_colour(report, name), label=name) for name in report.names]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    valid = "" if report.valid else " - NOT VALID"
    figure.suptitle(
        f"{report.hardware['cpu']}, {report.config['threads']} threads{valid}", fontsize=11
    )
    return figure


def save_plot(report: Report, path: Path | str) -> None:
    """Draw a report into a PNG file, all or nothing.

    Raises:
        MissingPlots: If matplotlib is not installed.
        VesicleError: The file cannot be written.
    """
    save_figure(plot(report), path)


def _bars(ax: Axes, report: Report, batch: int, phase: str) -> None:
    prompts = [cell.prompt_tokens for cell in report.cells if cell.batch == batch]
    width = 0.8 / len(report.names)
    for place, name in enumerate(report.names):
        for group, prompt in enumerate(prompts):
            row = report.find(name, Cell(prompt_tokens=prompt, batch=batch))
            if row is None:
                continue
            spread = _speed(row, phase)
            ax.bar(
                group + (place - (len(report.names) - 1) / 2) * width,
                spread.median,
                width,
                yerr=[[spread.median - spread.low], [spread.high - spread.median]],
                error_kw={"linewidth": 0.8},
                color=_colour(report, name),
                hatch=None if row.valid else "//",
                edgecolor="white",
                linewidth=0.5,
            )
    ax.set_xticks(range(len(prompts)), [f"{prompt}" for prompt in prompts])
    ax.set_xlabel("prompt tokens")
    ax.grid(True, axis="y", color="#E5E5E5", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _speed(row: Row, phase: str) -> Spread:
    return row.decode_tokens_per_s if phase == "decode" else row.prefill_tokens_per_s


def _colour(report: Report, name: str) -> str:
    return COLOURS[list(report.contenders).index(name) % len(COLOURS)]
