"""Small drawings by layer, as SVG in the page's own colours; a click on a layer filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 300, 132, 40, 8, 18
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - 4, _HEIGHT - _TOP - _BOTTOM
_LABELS = 6
"""Layers that are labelled, at most."""


def spreads(title: str, quantiles: Tensor, control: Tensor, bound: float) -> str:
    """Boxes of a distribution: 5th to 95th percentile, quartiles, median.

    Args:
        title: What is seen.
        quantiles: (L, 5).
        control: (L,) means of the control, drawn as a line of dashes.
        bound: 95th percentile of the control, drawn across.
    """
    most = max(float(quantiles.max()), bound)
    scale = _Scale(len(quantiles), most, least=0.9 * float(quantiles.min()))
    marks = [scale.line(bound)]
    for layer, (low, first, middle, third, high) in enumerate(quantiles.tolist()):
        left, width = scale.x(layer) + 0.2 * scale.step, 0.6 * scale.step
        centre = scale.x(layer) + scale.step / 2
        marks += [
            f'<path class="stem" d="M{centre:.1f} {scale.y(low):.1f}V{scale.y(high):.1f}"/>',
            scale.box(left, width, first, third),
            f'<path class="middle" d="M{left:.1f} {scale.y(middle):.1f}h{width:.1f}"/>',
        ]
    points = " ".join(
        f"{scale.x(layer) + scale.step / 2:.1f},{scale.y(value):.1f}"
        for layer, value in enumerate(control.tolist())
    )
    marks.append(f'<polyline class="control" points="{points}"/>')
    told = [
        f"median {row[2]:.1f}, mixtures {value:.1f}"
        for row, value in zip(quantiles.tolist(), control.tolist(), strict=True)
    ]
    return _figure(title, scale, marks, told)


def bars(title: str, shares: Tensor) -> str:
    """A bar for each layer.

    Args:
        title: What is seen.
        shares: (L,) in [0, 1].
    """
    scale = _Scale(len(shares), float(shares.max()), percent=True)
    marks = [
        scale.box(scale.x(layer) + 0.15 * scale.step, 0.7 * scale.step, 0.0, value)
        for layer, value in enumerate(shares.tolist())
    ]
    return _figure(title, scale, marks, [f"{100 * value:.1f} %" for value in shares.tolist()])


class _Scale:
    """Where layers and values are drawn."""

    def __init__(
        self, n_layers: int, most: float, *, least: float = 0.0, percent: bool = False
    ) -> None:
        self.n_layers, self.percent, self.least = n_layers, percent, least
        span = most - least if most > least else 1.0
        self.tick, self.most = _round(span / 2), least + 1.04 * span
        self.step = _PLOT_WIDTH / n_layers

    def x(self, layer: int) -> float:
        return _LEFT + layer * self.step

    def y(self, value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (self.most - value) / (self.most - self.least)

    def box(self, left: float, width: float, low: float, high: float) -> str:
        top = self.y(high)
        return (
            f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(self.y(low) - top, 0.5):.1f}"/>'
        )

    def line(self, value: float) -> str:
        return f'<path class="control" d="M{_LEFT} {self.y(value):.1f}H{_WIDTH - 4}"/>'

    def axes(self) -> list[str]:
        parts = []
        first, last = math.ceil(self.least / self.tick), math.floor(self.most / self.tick)
        for value in (n * self.tick for n in range(first, last + 1)):
            label = f"{100 * value:.3g} %" if self.percent else f"{value:.3g}"
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - 4}"/>')
            parts.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        every = -(-self.n_layers // _LABELS)
        for layer in range(0, self.n_layers, every):
            middle = self.x(layer) + self.step / 2
            parts.append(
                f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{layer}</text>'
            )
        return parts


def _figure(title: str, scale: _Scale, marks: Sequence[str], told: Sequence[str]) -> str:
    # With the keyboard a layer is chosen in the form: so many links would stand before it.
    hits = [
        f'<a href="#layer={layer}" data-layer="{layer}" tabindex="-1">'
        f"<title>layer {layer}: {note}</title>"
        f'<rect class="hit" x="{scale.x(layer):.1f}" y="{_TOP}" width="{scale.step:.1f}" '
        f'height="{_PLOT_HEIGHT + _BOTTOM}"/></a>'
        for layer, note in enumerate(map(escape, told))
    ]
    return "".join(
        [
            f"<figure><figcaption>{escape(title)}</figcaption>",
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
            *scale.axes(),
            *marks,
            *hits,
            "</svg></figure>",
        ]
    )


def _round(value: float) -> float:
    """The next lower number of the form 1, 2 or 5 times a power of ten, of one above 0."""
    digits = f"{value:e}"
    power = float("1e" + digits.partition("e")[2])
    return next(n for n in (5, 2, 1) if n * power <= value * (1 + 1e-9)) * power
