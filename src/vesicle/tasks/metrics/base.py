"""Metric: a number over many items, as a function of sums, so that intervals are cheap.

Each item contributes a fixed number of *statistics*. They are added up over items, and the metric
is a function of the sums: a mean is a ratio of two sums, perplexity the exponential of one, corpus
BLEU a function of n-gram counts. A bootstrap draws items with replacement, which only changes how
often each one's statistics count, so nothing is scored again (`vesicle.tasks.metrics.bootstrap`).
"""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from vesicle.errors import DataError
from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output


class Metric(ABC):
    """One number over the items of a task.

    Attributes:
        name: As in tables and JSON, such as `f1`.
        title: As a heading, such as `F1`.
        percent: Whether it runs from 0 to 100; then it is shown with one digit behind the point.
        digits: Shown behind the point otherwise.
        higher_is_better: False for perplexity.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    percent: ClassVar[bool] = True
    digits: ClassVar[int] = 3
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """The item's own contribution, of one length for all items; plain finite numbers."""

    @abstractmethod
    def value(self, sums: FloatArray) -> float:
        """The metric from the sums (S,) of statistics over items."""

    @property
    def signature(self) -> str:
        """What identifies the scorer beyond its name, such as sacrebleu's signature; "" if none."""
        return ""


class MeanMetric(Metric):
    """The mean over items of a number in [0, 1], in percent."""

    @abstractmethod
    def score(self, item: Item, output: Output) -> float:
        """The item's number, in [0, 1]."""

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """The number and a count of one."""
        return (float(self.score(item, output)), 1.0)

    def value(self, sums: FloatArray) -> float:
        """The mean in percent, from sums (2,) of scores and of items."""
        return float(100 * sums[0] / sums[1])


def references_of(item: Item) -> tuple[str, ...]:
    """What an answer is compared with.

    Raises:
        DataError: There is nothing.
    """
    if not item.references:
        raise DataError(f"item {item.id!r} has no reference to score against; one is needed")
    return item.references


def library(module: str) -> Any:
    """A scoring library, imported when it is first needed; its own warnings are not our user's.

    Args:
        module: Such as `rouge_score.rouge_scorer`.

    Raises:
        DataError: It is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        name = error.name or module
        raise DataError(
            f"scoring needs the library {name!r}, which is missing: pip install 'vesicle[eval]'"
        ) from error


def version_of(distribution: str) -> str:
    """The version of an installed distribution, such as `rouge-score`; `missing` if it is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"
