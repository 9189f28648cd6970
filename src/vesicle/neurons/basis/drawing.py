"""The interaction graph as SVG: a column of features a layer, the most important on top.

Circles grow with importance, lines with edges, each against the largest of its layer or pair of
layers. Only the first features are drawn, and the largest edges between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Self

from torch import Tensor

_FEATURES, _LINES = 24, 60
_ROW, _COLUMN, _TOP, _SIDE, _RADIUS = 22, 260, 46, 70, 9.0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What is drawn.

    Attributes:
        layers: Their names, L.
        importance: Of each layer's first features.
        edges: For each pair of adjacent layers, by feature of the later one and of the earlier one.
    """

    layers: tuple[str, ...]
    importance: tuple[tuple[float, ...], ...]
    edges: tuple[tuple[tuple[float, ...], ...], ...]

    @classmethod
    def of(
        cls,
        layers: Sequence[str],
        importance: Sequence[Tensor],
        edges: Sequence[Tensor],
        most: int = _FEATURES,
    ) -> Self:
        """The first features of bases, and their edges.

        Args:
            layers: Names.
            importance: (k,) of each.
            edges: (k_target, k_source) of each pair.
            most: Features of a layer.
        """
        return cls(
            layers=tuple(layers),
            importance=tuple(tuple(_digits(one[:most])) for one in importance),
            edges=tuple(tuple(tuple(_digits(r[:most])) for r in one[:most]) for one in edges),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        return cls(
            layers=tuple(values["layers"]),
            importance=tuple(map(tuple, values["importance"])),
            edges=tuple(tuple(map(tuple, one)) for one in values["edges"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)


def svg(graph: Graph, title: str) -> str:
    """The graph as one SVG element, which is a file by itself, too.

    Args:
        graph: What to draw.
        title: Told to those who cannot see it.
    """
    width = 2 * _SIDE + _COLUMN * (len(graph.layers) - 1)
    height = _TOP + _ROW * max(map(len, graph.importance)) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" font-size="12" '
        f'fill="#59636e"><title>{escape(title)}</title>'
    ]
    for column, table in enumerate(graph.edges):
        parts += _lines(column, table)
    for column, (name, importance) in enumerate(zip(graph.layers, graph.importance, strict=True)):
        x = _SIDE + column * _COLUMN
        parts.append(f'<text x="{x}" y="20" text-anchor="middle">{escape(name)}</text>')
        largest = max(importance) or 1.0
        for row, value in enumerate(importance):
            # Areas, not radii, are in proportion.
            radius = 1.5 + _RADIUS * (value / largest) ** 0.5
            parts.append(
                f'<circle cx="{x}" cy="{_TOP + row * _ROW}" r="{radius:.1f}" fill="#266ebe">'
                f"<title>{escape(name)}, feature {row}: importance {value:.3g}</title></circle>"
            )
    return "\n".join([*parts, "</svg>"])


def _lines(column: int, table: Sequence[Sequence[float]]) -> list[str]:
    found = [(value, i, j) for i, row in enumerate(table) for j, value in enumerate(row) if value]
    found.sort(reverse=True)
    left = _SIDE + column * _COLUMN
    parts = []
    for value, i, j in found[:_LINES][::-1]:  # the largest last, on top of the others
        strength = (value / found[0][0]) ** 0.5
        parts.append(
            f'<line x1="{left}" y1="{_TOP + j * _ROW}" x2="{left + _COLUMN}" '
            f'y2="{_TOP + i * _ROW}" stroke="#c2571a" stroke-width="{0.4 + 4 * strength:.2f}" '
            f'stroke-opacity="{0.15 + 0.7 * strength:.2f}">'
            f"<title>feature {j} to feature {i}: {value:.3g}</title></line>"
        )
    return parts


def _digits(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
