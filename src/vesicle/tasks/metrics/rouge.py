"""ROUGE: overlap of a summary with reference summaries, by the rouge-score package.

F-measure after Porter stemming, averaged over items; of several references the best counts (Lin
2004, https://aclanthology.org/W04-1013). The package keeps ASCII letters and digits only, so the
numbers mean nothing for most languages but English.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import MeanMetric, library, references_of, version_of


@cache
def _scorer(name: str) -> Any:
    return library("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)


class _Rouge(MeanMetric):
    """Named as the package names its own types."""

    def score(self, item: Item, output: Output) -> float:
        """F-measure, from 0 to 1."""
        best = _scorer(self.name).score_multi(references_of(item), output.text)
        return float(best[self.name].fmeasure)

    @property
    def signature(self) -> str:
        """The package's version and its settings."""
        return f"stemmer:yes|refs:best|rouge-score:{version_of('rouge-score')}"


class Rouge1(_Rouge):
    """Common words, each counted as often as both texts have it."""

    name = "rouge1"
    title = "ROUGE-1"


class Rouge2(_Rouge):
    """Common pairs of neighbouring words."""

    name = "rouge2"
    title = "ROUGE-2"


class RougeL(_Rouge):
    """The longest common subsequence of words, of the text as a whole."""

    name = "rougeL"
    title = "ROUGE-L"


class RougeLsum(_Rouge):
    """The union of longest common subsequences of sentences, one a line.

    This is what papers about CNN/DailyMail call ROUGE-L. Sentences are what stands between line
    breaks: a summary in one line is one sentence.
    """

    name = "rougeLsum"
    title = "ROUGE-Lsum"
