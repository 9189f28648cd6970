"""Stored predictions, and metrics over lists of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import Metric

STORED = json.loads(Path(__file__).with_name("predictions.json").read_text(encoding="utf-8"))


def answer(text: str, /, *references: str, **facts: Any) -> tuple[Item, Output]:
    return Item(id="one", context="", references=references, facts=facts), Output(text=text)


def stored(section: str) -> list[tuple[dict[str, Any], Item, Output]]:
    """Rows of a section of `predictions.json`, with the item and output that they stand for."""
    return [(row, *answer(row["text"], *row["references"], **row)) for row in STORED[section]]


def table(metric: Metric, pairs: list[tuple[Item, Output]]) -> FloatArray:
    """(N, S) statistics."""
    return np.array([metric.statistics(item, output) for item, output in pairs])


def value(metric: Metric, pairs: list[tuple[Item, Output]]) -> float:
    return metric.value(table(metric, pairs).sum(0))
