"""What is kept of a text as one HTML file: no scripts, nothing that is fetched, light and dark.

All that comes from the text is escaped, and its control characters are spelt out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from vesicle.kept.analysis import Kept, by_class
from vesicle.terminal import one_line, visible

_CELL = 18
_MARGIN = 48
_PART = "·"
"""Stands for a token that has no character of its own: it shares one with the token before it."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --paper: #ffffff; --line: #d5dae0;
  --tint: 38, 110, 190; --most: .62; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4af; --paper: #15181c;
  --line: #353c45; --tint: 70, 150, 235; } }
body { margin: 2.5rem auto; padding: 0 1.25rem; max-width: 58rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--dim); margin: .4rem 0 .8rem; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1rem 0; }
dt { color: var(--dim); font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--dim); font-weight: normal; font-size: .9rem; }
th, td { padding: .15rem 1.1rem .15rem 0; border-bottom: 1px solid var(--line); }
.n { text-align: right; }
.bar { display: inline-block; width: 14rem; height: .7rem; }
.bar i { display: block; height: 100%; width: calc(var(--k) * 100%); min-width: 1px;
  background: rgba(var(--tint), .75); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: 6px; padding: 1rem; font: 15px/1.75 ui-monospace, monospace; }
pre span { background: rgba(var(--tint), calc(var(--k) * var(--most))); }
pre span.a { border-bottom: 1px dotted var(--dim); }
.wide { overflow-x: auto; } svg { font: 11px system-ui, sans-serif; } svg text { fill: var(--dim); }
svg rect { fill: rgb(var(--tint)); stroke: var(--line); }
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was read, and how.

    Attributes:
        text: All of it.
        spans: (T,) the characters of each token, as `Text.encode_spans` tells.
        classes: (T,) of its tokens.
        pieces: (T,) each token's own text.
        model: The model's name.
        method: The method's.
        memory: The share that was asked for.
        sees_entries: Whether the method looks at more than where tokens stand.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    classes: Sequence[str]
    pieces: Sequence[str]
    model: str
    method: str
    memory: float
    sees_entries: bool


def page(kept: Kept, subject: Subject) -> str:
    """The whole file.

    Args:
        kept: What is held.
        subject: Of what.
    """
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>What is kept of a text</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            "<h1>What is kept of a text</h1>",
            _headline(kept, subject),
            "<h2>The text</h2>",
            _text(kept, subject),
            "<h2>Layers and KV heads</h2>",
            _heat_map(kept),
            "<h2>Classes of tokens</h2>",
            _class_table(kept, subject),
            "<h2>By age</h2>",
            "<p>Tenths of the text, and the share of their entries that is held at its end.</p>",
            _bars("tokens", [(f"{a:,} to {b - 1:,}", share) for a, b, share in kept.by_age]),
            "<h2>Over time</h2>",
            "<p>Share of the entries of all tokens read so far that was held, each time after the "
            "method was asked. It may hold as much as is asked for of the whole text, from the "
            "beginning on, so that early all is held.</p>",
            _bars(
                "tokens read",
                [(f"{n:,}", s) for n, s in zip(kept.asked, kept.over_time, strict=True)],
            ),
            "</body>\n</html>\n",
        ]
    )


def shown(text: str) -> str:
    """Text for HTML: escaped, control characters spelt out, line ends marked."""
    lines = visible(text.replace("\r\n", "\n"))
    return escape(lines).replace("\n", "↵\n")


def own_text(
    text: str, spans: Sequence[tuple[int, int]], pieces: Sequence[str]
) -> tuple[list[str], str]:
    """(T,) what to show of each token, which joined is the text; and what is left of it.

    Args:
        text: All of it.
        spans: (T,) the characters of each token.
        pieces: (T,) each token's own text, shown where it has no characters.
    """
    found, told = list[str](), 0
    for (first, stop), piece in zip(spans, pieces, strict=True):
        if stop > told:
            found.append(text[told:stop])
            told = stop
        else:
            found.append(piece if first == stop else _PART)
    return found, text[told:]


def _headline(kept: Kept, subject: Subject) -> str:
    facts = {
        "tokens": f"{kept.n_tokens:,}",
        "held at the end": _percent(kept.share),
        f"held after {kept.asked[-1]:,} tokens, when asked last": _percent(kept.over_time[-1]),
        "asked for": _percent(subject.memory),
        "method": _line(subject.method),
        "model": _line(subject.model),
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    what = "" if subject.sees_entries else f"<p>{POSITIONS_ALONE}</p>"
    return f"<dl>{rows}</dl>{what}"


POSITIONS_ALONE = (
    "This method looks at nothing but where a token stands: of each KV head the first entries stay "
    "and the newest, as many as it may hold. Classes differ by where their tokens stand."
)


def _text(kept: Kept, subject: Subject) -> str:
    own, rest = own_text(subject.text, subject.spans, subject.pieces)
    shares, counted = kept.by_token, ~kept.always
    most = float(shares[counted].max()) if counted.any() else 1.0
    parts = [
        f"<p>The stronger a token's ground, the more KV heads hold its entry: from none to "
        f"{_percent(most)} and above. Dotted lines are under tokens whose entries stay in any "
        "case.</p>",
        '<pre dir="auto">',
    ]
    rows = zip(own, shares.tolist(), subject.classes, kept.always.tolist(), strict=True)
    for place, (part, share, name, always) in enumerate(rows):
        title = f"token {place:,}: {_percent(share)}, {name}"
        strength = min(1.0, share / most) if most else 0.0
        mark = ' class="a"' if always else ""
        parts.append(
            f'<span{mark} style="--k:{strength:.3g}" title="{escape(title)}">{shown(part)}</span>'
        )
    parts += [shown(rest), "</pre>"]
    return "".join(parts)


def _heat_map(kept: Kept) -> str:
    shares = kept.held.mean(2)  # (F, G)
    n_layers, n_heads = shares.shape
    width, height = _MARGIN + n_layers * _CELL, (n_heads + 1) * _CELL
    parts = [
        "<figure><figcaption>Share of the text that each KV head (downwards) of each layer "
        'holds at its end.</figcaption><div class="wide">',
        f'<svg width="{width}" height="{height}" role="img" '
        'aria-label="Share held by layer and KV head">',
    ]
    for head in range(n_heads):
        parts.append(f'<text x="0" y="{head * _CELL + 13}">head {head}</text>')
    for column, layer in enumerate(kept.layers):
        left = _MARGIN + column * _CELL
        for head in range(n_heads):
            share = float(shares[column, head])
            title = f"layer {layer}, KV head {head}: {_percent(share)}"
            parts.append(
                f'<rect x="{left}" y="{head * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
                f'fill-opacity="{share:.3f}"><title>{title}</title></rect>'
            )
        middle, below = left + _CELL // 2, n_heads * _CELL + 13
        parts.append(f'<text x="{middle}" y="{below}" text-anchor="middle">{layer}</text>')
    return "".join([*parts, "</svg></div></figure>"])


def _class_table(kept: Kept, subject: Subject) -> str:
    rows = by_class(kept, subject.classes)
    if not rows:
        return "<p>The entries of all tokens stay in any case.</p>"
    lines = [
        "<p>Without entries that stay in any case: those that the method always keeps, and those "
        "since it was asked last. <em>To the mean</em>: the share over that of all classes. "
        "<em>At the same age</em>: over that of tokens in the same tenths of the text.</p>",
        "<table>",
        _row("th", "class", "tokens", "share kept", "to the mean", "at the same age"),
    ]
    for row in rows:
        cells = (f"{row.tokens:,}", _percent(row.share), ratio(row.to_mean), ratio(row.to_age))
        lines.append(_row("td", escape(row.name), *cells))
    return "\n".join([*lines, "</table>"])


def _bars(heading: str, rows: Iterable[tuple[str, float]]) -> str:
    lines = ["<table>", _row("th", heading, "share", "")]
    for name, share in rows:
        bar = f'<span class="bar"><i style="--k:{share:.3f}"></i></span>'
        lines.append(_row("td", name, _percent(share), bar))
    return "\n".join([*lines, "</table>"])


def _row(kind: str, first: str, *numbers: str) -> str:
    cells = "".join(f'<{kind} class="n">{number}</{kind}>' for number in numbers)
    return f"<tr><{kind}>{first}</{kind}>{cells}</tr>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ratio(value: float | None) -> str:
    """A share over another, for people."""
    return "-" if value is None else f"{value:.2f}"


def _line(text: str) -> str:
    return escape(one_line(text))
