"""Figures of matplotlib, which is an extra and imported late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import VesicleError
from vesicle.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MissingPlots(VesicleError):
    """Matplotlib is not installed."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches.

    Raises:
        MissingPlots: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPlots("plots need matplotlib: pip install 'vesicle[plot]'") from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def save_figure(figure: Figure, path: Path | str) -> None:
    """Write a PNG file, all or nothing.

    Raises:
        VesicleError: It cannot be written.
    """
    with atomic_path(path) as part:
        figure.savefig(part, format="png")
