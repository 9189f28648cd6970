"""How well descriptions tell where neurons fire, neuron by neuron and over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from vesicle.intervals import interval
from vesicle.plan import FloatArray
from vesicle.records import Record

DETECTORS = ("model", "lexical")
CONTROLS = {
    "shuffled": "other neurons' descriptions",
    "random": "another candidate of the neuron",
    "token": "the token at which it fires most often",
}
_FEWEST = 5
"""Neurons below which an interval would mislead."""
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Report(Record):
    """What was found.

    Attributes:
        settings: What it was made with.
        neurons: A row each: its description and its AUCs.
        summary: Over all neurons, by detector.
    """

    what: ClassVar[str] = "report"
    version: ClassVar[str] = "vesicle-descriptions-1"

    settings: dict[str, Any]
    neurons: list[dict[str, Any]]
    summary: dict[str, Any]


def judged(scores: dict[str, list[Tensor]], n_own: int) -> dict[str, Any]:
    """A neuron's AUCs under one detector.

    Args:
        scores: (M,) of each description, by what it is: `own` alone, and `CONTROLS`.
        n_own: How many of the M contexts, the first ones, are the neuron's own.

    Returns:
        The AUC of each, of several the mean; of `own` the interval of 95 % over contexts; and
        whether all of it is above 0.5 and above `shuffled`: whether the neuron is `described`.
    """
    wins = {name: [_wins(each, n_own) for each in given] for name, given in scores.items()}
    found: dict[str, Any] = {
        name: _round(np.mean([each.mean() for each in given])) for name, given in wins.items()
    }
    (own,) = wins["own"]
    # Contexts of the neuron and random ones are drawn by themselves, each as many as there are.
    rng = np.random.default_rng(0)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), _DRAWS) / n for n in own.shape)
    low, high = np.quantile(((rows @ own) * columns).sum(1), (0.025, 0.975))
    found |= {"low": _round(low), "high": _round(high)}
    found["described"] = found["low"] > max(0.5, found["shuffled"])
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over neurons with intervals of 95 %, which there are none of for fewer than five.

    Args:
        rows: Of neurons, as `Report.neurons` has them.
    """
    found: dict[str, Any] = {"neurons": len(rows)}
    for detector in DETECTORS:
        own = [row["detection"][detector] for row in rows]
        values = {name: np.array([each[name] for each in own]) for name in ("own", *CONTROLS)}
        told: dict[str, Any] = {name: _estimate(each) for name, each in values.items()}
        told |= {f"above_{name}": _estimate(values["own"] - values[name]) for name in CONTROLS}
        told["not_described"] = sum(not each["described"] for each in own)
        found[detector] = told
    neither = [
        not any(row["detection"][detector]["described"] for detector in DETECTORS) for row in rows
    ]
    found["not_described_by_either"] = sum(neither)
    found["kinds"] = dict(Counter(row["kind"] for row in rows).most_common())
    return found


def _wins(scores: Tensor, n_own: int) -> FloatArray:
    """(P, N) whether each of the neuron's contexts stands above each other; the mean is the AUC."""
    own, others = scores[:n_own, None].double().numpy(), scores[n_own:].double().numpy()
    return (own > others) + (own == others) / 2


def _estimate(values: np.ndarray) -> dict[str, float | None]:
    low, high = interval(values) if len(values) >= _FEWEST else (None, None)
    return {"mean": _round(values.mean()), "low": _round(low), "high": _round(high)}


def _round(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)
