"""A comparison of experts as one HTML file: no scripts, nothing that is fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from vesicle.neurons.experts.summary import METRICS, NUMBERS

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8884; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
small { color: #888; }
.bar { display: block; position: relative; width: 16rem; height: .9rem; background: #8882; }
.bar i { position: absolute; inset: 0 auto 0 0; width: calc(var(--k) * 100%); background: #4a86c8; }
.bar b { position: absolute; top: .35rem; height: .2rem; background: currentColor;
  left: calc(var(--a) * 100%); width: calc((var(--b) - var(--a)) * 100%); min-width: 2px; }
"""
_LABELS = {
    "features": "features",
    "active": "active",
    "alive": "ever active",
    "published_coverage": "coverage, same items",
    "load": "experts in use",
    "agreement": "scores and sparsity",
    "variance_missed": "variance missed",
}


def page(report: dict[str, Any]) -> str:
    """The whole file.

    Args:
        report: As `summary.summarise` gives it.
    """
    settings, readers = report["settings"], report["readers"]
    title = f"Experts on {settings['task']}"
    intro = (
        f"<p>{report['seeds']} seeds; layer {settings['layer']} of {settings['n_layers']}, width "
        f"{settings['width']}; {settings['ffn']} hidden units run for a token in all decoders but "
        f"the wide one; {settings['n_experts']} experts, {settings['n_active']} of them run. "
        f"{report['properties']} properties of {report['tokens_judged']:,} tokens, half of which "
        "choose classifiers. Intervals: 95 %, by bootstrap over games or texts.</p>"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            intro,
            *(_bars(metric, readers) for metric in METRICS),
            "<h2>Numbers</h2>",
            _numbers(readers),
            "<h2>Claims and controls</h2>",
            _claims(report["claims"]),
            "<h2>The conversion alone, before it is trained on</h2>",
            "<p>Loss of the wide decoder when a token runs a part of its units, by who chooses "
            "them.</p>",
            _table(
                ["who chooses", "loss"], ((n, told(r)) for n, r in report["conversion"].items())
            ),
            "<h2>What single neurons know best</h2>",
            _best(readers),
            "</body>\n</html>\n",
        ]
    )


def told(row: dict[str, Any]) -> str:
    """An estimate in figures."""
    return f"{row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f})"


def _bars(metric: str, readers: dict[str, Any]) -> str:
    rows = {name: row[metric] for name, row in readers.items() if metric in row}
    if not rows:
        return ""
    most = max(1.0, *(row["high"] for row in rows.values()))
    lines = []
    for name, row in rows.items():
        k, a, b = (max(0.0, row[key]) / most for key in ("mean", "low", "high"))
        bar = f'<span class="bar"><i style="--k:{k:.4f}"></i><b style="--a:{a:.4f};--b:{b:.4f}">'
        lines.append((name, _Raw(bar + "</b></span>"), told(row), _seeds(row)))
    heading = metric.replace("_", " ")
    return f"<h2>{heading[0].upper()}{heading[1:]}</h2><p>{escape(METRICS[metric])}</p>" + _table(
        ["", "", metric.replace("_", " "), "by seed"], lines
    )


def _numbers(readers: dict[str, Any]) -> str:
    rows = []
    for name, row in readers.items():
        rows.append((name, *(f"{row[n]:,g}" if n in row else "" for n in NUMBERS)))
    return _table(["", *(_LABELS[n] for n in NUMBERS)], rows)


def _claims(claims: list[dict[str, Any]]) -> str:
    rows = (
        (
            row["claim"],
            f"{row['metric'].replace('_', ' ')}: {row['left']} less {row['right']}",
            f"{row['difference']['mean']:+.4f} ({row['difference']['low']:+.4f} to "
            f"{row['difference']['high']:+.4f})",
            row["verdict"],
        )
        for row in claims
    )
    return _table(["claim", "difference", "", "verdict"], rows)


def _best(readers: dict[str, Any]) -> str:
    parts = []
    for name in ("sparsity", "dense"):
        rows = (
            (row["property"], str(row["feature"]), f"{row['f1']:.3f}", f"{row['always']:.3f}")
            for row in readers[name]["best"]
        )
        parts.append(f"<h3>{name}, first seed</h3>")
        parts.append(_table(["property", "neuron", "F1", "F1 of always"], rows))
    return "\n".join(parts)


class _Raw(str):
    """Markup of our own."""


def _table(heads: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    for row in rows:
        cells = (cell if isinstance(cell, _Raw) else escape(cell) for cell in row)
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _seeds(row: dict[str, Any]) -> str:
    return ", ".join(f"{value:.4f}" for value in row["by_seed"])
