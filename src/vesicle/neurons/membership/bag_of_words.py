"""The control that must stay at 0.5: which words a document has, and no language model at all.

A classifier that can tell members from others by their words has found how the two sets were
collected, not what a model remembers: in most published sets members are older than others, and
words alone do as well as the attacks (Meeus et al. 2024, "SoK: Membership Inference Attacks on LLMs
are Rushing Nowhere"; the authors say so of their own books). Where halves are drawn at random there
is nothing to find.

The classifier is linear and weighs all words alike beforehand: it finds what is spread over many
words, as a time or a topic is, and may miss a single word that gives all members away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vesicle.neurons.membership.classifier import out_of_fold
from vesicle.plan import FloatArray

BAG_OF_WORDS = "bag-of-words"
"""Its name in records and reports."""
MOST_WORDS = 2000
FEWEST_DOCUMENTS = 3
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> Counter[str]:
    """Words in small letters, and how often each occurs."""
    return Counter(_WORD.findall(text.lower()))


def bag_of_words_scores(
    texts: Sequence[str], labels: NDArray[np.bool_], folds: NDArray[np.int64]
) -> FloatArray:
    """(..., N) log-odds that documents are members, by a classifier of the words that they have.

    Features are log(1 + count) of the `MOST_WORDS` words that most training documents have, and at
    least `FEWEST_DOCUMENTS` of them.

    Args:
        texts: N documents.
        labels: (..., N), true for members.
        folds: (N,) fold of each document; a document is judged by a classifier of other folds.
    """
    counted = [words_of(text) for text in texts]

    def make(training: NDArray[np.bool_]) -> FloatArray:
        having = Counter(
            word for words, there in zip(counted, training, strict=True) if there for word in words
        )
        # In alphabetical order where counts are equal, so that the same texts give the same words.
        ordered = sorted(having.items(), key=lambda item: (-item[1], item[0]))
        chosen = [word for word, n in ordered[:MOST_WORDS] if n >= FEWEST_DOCUMENTS]
        table = np.array([[words[word] for word in chosen] for words in counted], np.float64)
        return np.log1p(table.reshape(len(counted), len(chosen)))

    return out_of_fold(make, labels, folds)
