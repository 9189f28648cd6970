"""The atlas as one HTML file: works from disk, fetches nothing, light and dark.

What is read from data is escaped, in base64, or JSON without `<`; the scripts show it by
`textContent` alone.
"""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any

from vesicle.models import Text
from vesicle.neurons.atlas.arrays import Held, held, packed
from vesicle.neurons.atlas.overview import RARE, Overview, overview
from vesicle.neurons.atlas.plots import bars, spreads
from vesicle.neurons.cards import AROUND, Cards
from vesicle.terminal import one_line

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(cards: Cards, text: Text) -> str:
    """The whole file.

    Args:
        cards: A model's.
        text: Its tokens.

    Raises:
        DataError: The tokens are another model's.
    """
    cards.check_text(text)
    own = held(cards, text)
    title = escape(f"Neurons of {one_line(cards.model)}")
    # Data and scripts come last, so that the page is seen before they are read.
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{title}</title>\n<style>\n{_file('style.css')}</style>\n</head>\n<body>",
            f"<h1>{title}</h1>",
            _headline(cards),
            f"<p>{_WHAT}</p>",
            _drawings(overview(cards)),
            _form(cards),
            "<main>",
            '<p id="status" role="status" tabindex="-1">Reading.</p>',
            '<div id="cards"></div>',
            '<nav id="pages" aria-label="Pages"></nav>',
            "</main>",
            "<noscript><p>Searching needs JavaScript; nothing is fetched.</p></noscript>",
            _data(cards, own),
            f"<script>\n{_file('search.js')}</script>",
            f"<script>\n{_file('view.js')}</script>",
            "</body>\n</html>\n",
        ]
    )


_WHAT = (
    "A card says what was seen of a neuron, and not what it is for: tokens that its weights decode "
    "to through the LM head, places in one text where it fires most, and how it bears on the "
    "levels of transmitters at first order. Clamps and lesions tell whether any of it is so: "
    "<code>vesicle neurons clamp</code> and <code>vesicle neurons probe</code>."
)


def _headline(cards: Cards) -> str:
    n_layers, width = cards.shape
    facts = {
        "neurons": f"{n_layers * width:,}",
        "layers, and neurons of each": f"{n_layers} × {width:,}",
        "tokens of text that count": f"{cards.contexts.n_tokens:,}",
        "transmitters": escape(", ".join(cards.drives.size)) or "none",
    }
    if cards.drives.facts["dial"] is not None:
        facts["dial"] = f"{cards.drives.facts['dial']:.3g}"
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _drawings(found: Overview) -> str:
    figures = [
        spreads(f"{kind}: score", own.quantiles, own.mixed_mean, own.mixed_high)
        for kind, own in found.scores.items()
    ]
    figures.append(bars("rare neurons", found.rare))
    figures += [bars(f"{name}: share of drive", share) for name, share in found.drive.items()]
    above = ", ".join(
        "{} {:.1f} % ({:.1f} to {:.1f} %)".format(kind, *(100 * x for x in own.above_mixed))
        for kind, own in found.scores.items()
    )
    return "\n".join(
        [
            '<details id="layers" open><summary><h2>By layer</h2></summary>',
            f'<div class="plots">{"".join(figures)}</div>',
            "<p><em>Score</em>: how far the likeliest token stands above the mean of all, in "
            "standard deviations. Boxes are quartiles, lines go from the 5th to the 95th "
            "percentile of neurons. Dashes are random mixtures of the same layer's neurons: their "
            "mean by layer, and straight across their 95th percentile in all layers. Above that "
            f"are, with 95 % intervals over layers: {above}; of mixtures 5 %. <em>Rare</em>: above "
            f"half of its maximum at less than {100 * RARE:g} % of tokens. <em>Drive</em>: the "
            "layer's share of the magnitudes of all contributions to levels. A neuron of an early "
            "layer bears on more levels than one of a late layer, and one of the last on none."
            "</p>",
            "</details>",
        ]
    )


def _form(cards: Cards) -> str:
    n_layers, width = cards.shape
    kinds, transmitters = cards.decoded.kinds, cards.drives.size
    sorts = {
        "match": "best match",
        "number": "number",
        **{f"score.{kind}": f"score of {kind}" for kind in kinds},
        **{f"drive.{name}": f"drive of {name}" for name in transmitters},
        "rare": "rarest",
        "maximum": "maximum",
    }
    by = {
        "token": "tokens it decodes to",
        "high": "the text where it is highest",
        "low": "the text where it is lowest",
    }
    layers = {"": "all", **{str(n): str(n) for n in range(n_layers)}}
    last = f"{n_layers - 1}.{width - 1}"
    return "\n".join(
        [
            '<form id="search" role="search" autocomplete="off">',
            '<label class="wide">Find <input type="search" name="q" '
            f'placeholder="a neuron (0.0 to {last}), or text"></label>',
            _select("by", "in", by),
            _select("kind", "of", {"": "any projection", **{kind: kind for kind in kinds}}),
            '<label><input type="checkbox" name="whole" value="1"> whole word</label>',
            _select("layer", "Layer", layers),
            _select("sort", "Sort by", sorts),
            "</form>",
        ]
    )


def _select(name: str, label: str, options: dict[str, str]) -> str:
    rows = "".join(
        f'<option value="{escape(value)}">{escape(told)}</option>'
        for value, told in options.items()
    )
    return f'<label>{label} <select name="{name}">{rows}</select></label>'


def _data(cards: Cards, own: Held) -> str:
    n_layers, width = cards.shape
    facts: dict[str, Any] = {
        "layers": n_layers,
        "width": width,
        "kinds": list(cards.decoded.kinds),
        "top": cards.decoded.ids.shape[-1],
        "contexts": cards.contexts.activations.shape[-1],
        "length": cards.contexts.tokens.shape[1],
        "around": AROUND,
        "transmitters": list(cards.drives.size),
        "tokens": own.tokens,
        "strings": own.strings,
    }
    # Inside a script element nothing but `<` could end it.
    told = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    parts = [f'<script type="application/json" id="facts">{told}</script>']
    for name, array in own.arrays.items():
        kind, numbers = packed(array)
        parts.append(
            f'<script type="text/plain" id="array-{name}" data-type="{kind}">{numbers}</script>'
        )
    return "\n".join(parts)


def _file(name: str) -> str:
    return (resources.files("vesicle.neurons.atlas") / name).read_text(encoding="utf-8")
