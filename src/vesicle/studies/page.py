"""A report as one HTML file: tables and drawings, no scripts, nothing that is fetched.

All that comes from data is escaped.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from vesicle.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --paper: #ffffff;
  --line: #d5dae0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4af; --paper: #15181c;
  --line: #353c45; } }
body { margin: 2.5rem auto; padding: 0 1.25rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; } h3 { font-size: 1rem; }
p, figcaption { color: var(--dim); margin: .4rem 0 .8rem; max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
th { text-align: left; color: var(--dim); font-weight: normal; font-size: .9rem; }
th, td { padding: .15rem 1.1rem .15rem 0; border-bottom: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; } .wide { overflow-x: auto; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: 6px; padding: 1rem; font: 14px/1.7 ui-monospace, monospace; }
pre span { border-left: 1px solid transparent; }
pre span.s1 { background: rgba(38, 110, 190, .45); }
pre span.s4 { background: rgba(38, 110, 190, .25); }
pre span.s16 { background: rgba(38, 110, 190, .1); }
pre span.e { border-left-color: var(--dim); }
"""


class Page:
    """A page that is written from top to bottom."""

    def __init__(self, title: str) -> None:
        """Begin.

        Args:
            title: Its first heading.
        """
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of a level from 2 on."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def say(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> None:
        """A table; all columns but the first ones are of numbers.

        Args:
            head: Titles of its columns.
            rows: Cells.
            words: How many columns, from the first on, are of words.
        """
        lines = [_row("th", head, words), *(_row("td", row, words) for row in rows)]
        self._parts.append('<div class="wide"><table>' + "\n".join(lines) + "</table></div>")

    def draw(self, caption: str, paint: Callable[[Axes], None], width: float = 7.5) -> None:
        """A drawing of matplotlib's.

        Args:
            caption: What is seen.
            paint: Paints it.
            width: In inches; the height is three fifths of it.
        """
        figure = new_figure(width, 0.6 * width)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        # No date, and names that do not change: the same records give the same page.
        import matplotlib as mpl

        with mpl.rc_context({"svg.hashsalt": "vesicle", "svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        self._parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def text(self, pieces: Sequence[str], classes: Sequence[str]) -> None:
        """A text whose pieces have classes of the page's style."""
        spans = [
            f'<span class="{escape(name)}">{escape(piece)}</span>'
            for piece, name in zip(pieces, classes, strict=True)
        ]
        self._parts.append("<pre>" + "".join(spans) + "</pre>")

    def html(self) -> str:
        """The file."""
        return "\n".join(
            [
                '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta http-equiv="Content-Security-Policy" '
                "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
                f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
                *self._parts,
                "</body>\n</html>\n",
            ]
        )


def _row(kind: str, cells: Sequence[str], words: int) -> str:
    told = "".join(
        f"<{kind}>{escape(cell)}</{kind}>"
        if number < words
        else f'<{kind} class="n">{escape(cell)}</{kind}>'
        for number, cell in enumerate(cells)
    )
    return f"<tr>{told}</tr>"
