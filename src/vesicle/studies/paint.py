"""What the report draws: lines, bars, and a field of shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Paint = Callable[["Axes"], None]


def lines(rows: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> Paint:
    """Lines through points, by name."""

    def paint(axes: Axes) -> None:
        for name, points in rows.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize=6, ncols=2)

    return paint


def bars(rows: Mapping[str, float], across: str) -> Paint:
    """A bar for each name, the first on top."""

    def paint(axes: Axes) -> None:
        axes.barh(list(rows)[::-1], list(rows.values())[::-1], color="#266ebe")
        axes.set_xlabel(across)

    return paint


def heat(rows: Sequence[Sequence[float]], across: str, up: str) -> Paint:
    """Shares from 0 to 1, the first row at the bottom."""

    def paint(axes: Axes) -> None:
        shown = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="Blues", origin="lower")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.figure.colorbar(shown, ax=axes)

    return paint
