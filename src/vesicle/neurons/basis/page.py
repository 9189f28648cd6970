"""The report as one HTML file: no scripts, nothing that is fetched, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from vesicle.neurons.basis.comparison import (
    CONTROLS,
    LIB,
    PCA,
    RANDOM,
    SCALED,
    BasisReport,
    Compared,
    Estimate,
    verdict,
)
from vesicle.neurons.basis.drawing import Graph, svg
from vesicle.terminal import one_line

NAMES = {LIB: "LIB", PCA: "PCA", SCALED: "PCA, scaled", RANDOM: "random"}
MEASURES = {
    "edges_95": "edges with 95 % of interactions",
    "edges_99": "edges with 99 % of interactions",
    "inputs_95": "inputs with 95 % of a feature's",
    "spread": "L1 against L2",
    "gini": "Gini coefficient",
    "edges_needed": "edges needed",
    "features_needed": "features needed",
}

ORDER = (LIB, *CONTROLS)

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --paper: #fff; --line: #d5dae0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4af; --paper: #15181c;
  --line: #353c45; } }
body { margin: 2.5rem auto; padding: 0 1.25rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--dim); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; color: var(--dim); font-weight: normal; }
th, td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
"""


def page(report: BasisReport, graphs: Mapping[str, Graph]) -> str:
    """The whole file.

    Args:
        report: What was found.
        graphs: Of the first seed, or of all windows together, by basis.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>Local Interaction Basis</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>Local Interaction Basis: {escape(one_line(report.subject))}</h1>",
        f"<p>Means over {_units(report)}, with bootstrap intervals of 95 %. LIB is the Local "
        "Interaction Basis, beside principal components, those scaled by importance for the next "
        "layer, and a random rotation; all have as many features. Edges and inputs are shares. The "
        "first four measures and what is needed (for the accuracy less 0.001) are lower where "
        "interactions are sparser, the Gini coefficient is higher. LIB is called sparser or denser "
        "where all of the interval of the paired difference says so.</p>",
    ]
    if "held_out_accuracy" in report.facts:
        told = ", ".join(f"{value:.4f}" for value in report.facts["held_out_accuracy"])
        parts.append(f"<p>Accuracy on pairs that were not trained on: {told}.</p>")
    for pair in report.compared:
        parts.append(
            f"<h2>{escape(pair.source)} to {escape(pair.target)}</h2>\n<p>{pair.n_source} and "
            f"{pair.n_target} features in each basis.</p>\n{_table(measure_rows(pair))}"
        )
    if "losses" in report.facts:
        parts.append(
            "<h2>Loss with the first features alone</h2>\n<p>Rise in nats a token where all "
            "other features of the layer are at their means.</p>\n" + _table(loss_rows(report))
        )
    for kind, graph in graphs.items():
        parts.append(
            f'<h2>{title(kind)}</h2>\n<figure class="wide">{svg(graph, title(kind))}'
            "<figcaption>The first features of each layer by importance, and the largest edges "
            "between them.</figcaption></figure>"
        )
    return "\n".join([*parts, "</body>\n</html>\n"])


def title(kind: str) -> str:
    """Of the graph in one kind of basis."""
    return f"Interaction graph, {NAMES[kind]}"


def figures(found: Estimate) -> str:
    """An estimate for people."""
    mean, low, high = map(number, (found.mean, found.low, found.high))
    return mean if low == high else f"{mean} ({low} to {high})"


def number(value: float) -> str:
    """A number for people, with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def measure_rows(pair: Compared) -> list[list[str]]:
    """A table of what was measured between two layers, its head first."""
    rows = [["", *(NAMES[k] for k in ORDER), *(f"beside {NAMES[k]}" for k in CONTROLS)]]
    for measure, name in MEASURES.items():
        if measure in pair.bases[LIB]:
            cells = [figures(pair.bases[kind][measure]) for kind in ORDER]
            verdicts = [verdict(measure, pair.less[kind][measure]) for kind in CONTROLS]
            rows.append([name, *cells, *verdicts])
    return rows


def loss_rows(report: BasisReport) -> list[list[str]]:
    """A table of losses with few features, its head first."""
    told = report.facts["losses"]
    rows = [["features", *(NAMES[kind] for kind in ORDER), "LIB less PCA"]]
    for number, count in enumerate(told["counts"]):
        cells = [figures(Estimate(**told["rise"][kind][number])) for kind in ORDER]
        rows.append([str(count), *cells, figures(Estimate(**told["lib_less"][PCA][number]))])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"
        for kind, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def _units(report: BasisReport) -> str:
    pair = report.compared[0]
    count = len(next(iter(pair.bases[LIB].values())).values)
    return f"{count} {report.unit}s"
