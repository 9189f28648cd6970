"""SQuAD v1.1's metrics: exact match and token F1, after the official normalisation.

    "The Eiffel Tower!" and "eiffel tower": exact match 1, F1 1
    "in the Eiffel Tower" and "Eiffel Tower": exact match 0, F1 0.8

An answer counts as its best match over the accepted ones. Rajpurkar et al. 2016,
https://arxiv.org/abs/1606.05250, section 6.1; the details are those of the official scorer for
version 1.1: only ASCII punctuation is removed, joining what it stood between, and only English
articles; two texts without words in common have F1 0, even if both are empty.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import MeanMetric, references_of

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, then no articles, single blanks."""
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def token_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of tokens; 0 without common ones."""
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


class ExactMatch(MeanMetric):
    """Answers that equal an accepted one after normalisation, in percent."""

    name = "exact_match"
    title = "EM"

    def score(self, item: Item, output: Output) -> float:
        """1 if the answer equals an accepted one after `normalise`, else 0."""
        predicted = normalise(output.text)
        return float(any(predicted == normalise(text) for text in references_of(item)))


class F1(MeanMetric):
    """Mean token F1 with the nearest accepted answer, in percent."""

    name = "f1"
    title = "F1"

    def score(self, item: Item, output: Output) -> float:
        """Token F1 with the accepted answer that is nearest, from 0 to 1."""
        predicted = normalise(output.text).split()
        return max(token_f1(predicted, normalise(text).split()) for text in references_of(item))
