"""What the plots of all evaluations have in common: colours, axes, and how they are saved.

Colours are those of Okabe and Ito, told apart by people with the common kinds of colour blindness;
markers differ too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vesicle.errors import VesicleError
from vesicle.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, tuple[str, str]] = {
    "learnt": ("#000000", "o"),
    "uniform": ("#E69F00", "s"),
    "uniform-mix": ("#56B4E9", "D"),
    "per-layer": ("#009E73", "^"),
    "random": ("#CC79A7", "v"),
    "shuffled": ("#D55E00", "P"),
    "best-of-n": ("#0072B2", "X"),
    "oracle": ("#7F7F7F", "*"),
}
"""Colour and marker of each method."""


class MissingPlots(VesicleError):
    """Matplotlib is not installed."""


def new_figure(**settings: Any) -> Figure:
    """An empty figure.

    Raises:
        MissingPlots: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPlots("plots need matplotlib: pip install 'vesicle[plot]'") from error
    return Figure(layout="constrained", **settings)


def cost_axis(axes: Axes, label: str, which: Literal["major", "both"] = "major") -> None:
    """Cheaper to the right, on a faint grid of `major` lines or of `both`."""
    axes.invert_xaxis()
    axes.set_xlabel(label)
    axes.grid(visible=True, color="#E5E5E5", linewidth=0.7, which=which)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path | str) -> None:
    """Write a PNG file, all or nothing.

    Raises:
        VesicleError: The file cannot be written.
    """
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
