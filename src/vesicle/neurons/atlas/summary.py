"""What `vesicle neurons report` tells as JSON."""

from __future__ import annotations

from typing import Any

from vesicle.models import Text
from vesicle.neurons.atlas.overview import RARE, Overview, overview
from vesicle.neurons.cards import Cards

_LISTED = 20
"""Neurons that are listed of each projection and transmitter."""


def summary(cards: Cards, text: Text) -> dict[str, Any]:
    """The most specialised neurons, those that drive transmitters most, and figures by layer.

    Args:
        cards: A model's.
        text: Its tokens.

    Returns:
        As JSON: no number is NaN or infinite if no score or activation is.

    Raises:
        DataError: The tokens are another model's.
    """
    cards.check_text(text)
    found = overview(cards)
    n_layers, width = cards.shape
    return {
        "model": cards.model,
        "neurons": n_layers * width,
        "n_layers": n_layers,
        "width": width,
        "kinds": list(cards.decoded.kinds),
        "tokens_read": cards.contexts.n_tokens,
        "dial": cards.drives.facts["dial"],
        "specialised": {
            kind: [
                {
                    "neuron": f"{layer}.{index}",
                    "way": "+" if way > 0 else "-",
                    "score": round(score, 3),
                    "tokens": text.pieces(ids),
                }
                for layer, index, way, score, ids in cards.decoded.specialised(kind, _LISTED)
            ]
            for kind in cards.decoded.kinds
        },
        "scores": {
            kind: {
                "high": own.high,
                "mixtures_high": own.mixed_high,
                "share_above_mixtures_high": dict(
                    zip(("mean", "low", "high"), own.above_mixed, strict=True)
                ),
            }
            for kind, own in found.scores.items()
        },
        "rare_below": RARE,
        "by_layer": [_layer(found, layer) for layer in range(n_layers)],
        "transmitters": {
            name: {"neurons": _driving(cards, name), "by_layer": found.drive[name].tolist()}
            for name in cards.drives.size
        },
    }


def _layer(found: Overview, layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "scores": {
            kind: {
                "mean": float(own.mean[layer]),
                "mixtures_mean": float(own.mixed_mean[layer]),
                "share_high": float(own.share_high[layer]),
                "share_above_mixtures_high": float(own.share_above_mixed[layer]),
            }
            for kind, own in found.scores.items()
        },
        "share_rare": float(found.rare[layer]),
    }


def _driving(cards: Cards, name: str) -> list[dict[str, Any]]:
    drive, size = cards.drives.drive[name], cards.drives.size[name]
    found = []
    for flat in size.flatten().argsort(descending=True, stable=True)[:_LISTED].tolist():
        layer, index = divmod(flat, size.shape[1])
        found.append(
            {
                "neuron": f"{layer}.{index}",
                "drive": float(drive[layer, index]),
                "size": float(size[layer, index]),
            }
        )
    return found
