"""How a run of evolution went, and how much of the memory each KV head of its best NAMM gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vesicle.figures import new_figure, save_figure
from vesicle.namm import Namm

PLOT = "evolution.png"


def save_plot(lines: Sequence[dict[str, Any]], namm: Namm, folder: Path) -> Path:
    """Draw the losses of generations, and the profile by layer and KV head.

    Args:
        lines: One for each generation, the start's first; see `evolve`.
        namm: The best mean.
        folder: To write to.

    Returns:
        The file's path.

    Raises:
        MissingPlots: If matplotlib is not installed.
    """
    figure = new_figure(11, 4.2)
    losses, heads = figure.subplots(1, 2, width_ratios=(1, 1.6))
    tried = [line for line in lines if line["losses"]]
    at = [line["generation"] for line in tried]
    least, middle = ([f(line["losses"]) for line in tried] for f in (min, np.median))
    losses.plot(at, middle, color="#56B4E9", lw=1, label="median candidate")
    losses.plot(at, least, color="#0072B2", lw=1, label="best candidate")
    judged = [(line["generation"], line["held_out"]) for line in lines if "held_out" in line]
    losses.plot(*zip(*judged, strict=True), color="#000000", marker="o", ms=3, label="held out")
    losses.set_xlabel("generation")
    losses.set_ylabel("nats a token above the full cache's")
    losses.legend(frameon=False, fontsize=8)
    losses.spines[["top", "right"]].set_visible(False)
    if namm.profile.size:
        shown = namm.profile - namm.profile.max()
        image = heads.imshow(shown.T, cmap="cividis", aspect="auto", vmin=max(-8, shown.min()))
        heads.set_yticks(range(shown.shape[1]))
        bar = figure.colorbar(image, ax=heads, location="bottom", shrink=0.6)
        bar.set_label("part of the memory, logarithm, relative to the largest")
    heads.set_xlabel("layer")
    heads.set_ylabel("KV head")
    save_figure(figure, folder / PLOT)
    return folder / PLOT
