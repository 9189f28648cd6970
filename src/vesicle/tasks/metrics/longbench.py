"""LongBench's own metrics, one for each of its 21 data sets, and their mean.

Bai et al. 2024, https://aclanthology.org/2024.acl-long.172, and the scorer that comes with it. An
item counts as its best match over the references. The mean is over items within a data set, then
over data sets, so that a large one weighs no more than a small one.

Where the original's number depends on the machine:

- Code is compared by difflib, as fuzzywuzzy does without its C extension (with it, numbers differ).
- A text so long that the `rouge` package overflows Python's recursion limit scores 0 there,
  depending on how deep the caller's stack is; here the limit is raised.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from vesicle.errors import DataError
from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import Metric, library, references_of, version_of
from vesicle.tasks.metrics.squad import normalise, token_f1

Scorer = Callable[[str, str, Sequence[str]], float]
"""From prediction, reference and the data set's classes to a number from 0 to 1."""

# Where the original's list has gaps (《 and ． are kept), so has this one.
CHINESE_PUNCTUATION = re.compile(
    f"[{re.escape(string.punctuation)}"
    "\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030"
    "\u303e\u303f\ufe4f\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)


@cache
def _jieba() -> Any:
    """Cuts Chinese into words; reading its dictionary takes a second or two, once."""
    jieba = library("jieba")
    jieba.setLogLevel(logging.WARNING)  # its progress would stand between our lines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jieba.initialize()
    return jieba


@cache
def _rouge() -> Any:
    return library("rouge").Rouge(metrics=["rouge-l"], stats=["f"])


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Token F1 after SQuAD's normalisation."""
    return token_f1(normalise(prediction).split(), normalise(reference).split())


def qa_f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words, without punctuation."""

    def words(text: str) -> list[str]:
        cut = (CHINESE_PUNCTUATION.sub("", word.lower()) for word in _jieba().lcut(text))
        return [bare for word in cut if (bare := "".join(word.split()))]

    return token_f1(words(prediction), words(reference))


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the `rouge` package: sentences end at full stops, words count once, no stems."""
    limit = sys.getrecursionlimit()
    deepest = len(prediction.split()) + len(reference.split())  # it goes one word a call
    sys.setrecursionlimit(limit + deepest)
    try:
        return float(_rouge().get_scores([prediction], [reference])[0]["rouge-l"]["f"])
    except ValueError:  # one of them is empty
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def rouge_l_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words."""
    return rouge_l(" ".join(_jieba().cut(prediction)), " ".join(_jieba().cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """One over the number of classes that the prediction names, if the right one is among them.

    Classes whose name is part of the right one's are not counted, but for a second in succession:
    the original's loop deletes from the list that it walks, and so steps over the next.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        if named[position] in reference and named[position] != reference:
            del named[position]
        position += 1
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the prediction's numbers that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same for the number of a paragraph, in English or Chinese.

    Raises:
        DataError: The reference names no paragraph.
    """
    found = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    if found is None:
        raise DataError(f"the reference {reference!r} names no paragraph, such as 'Paragraph 7'")
    return count(prediction, found[1])


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Likeness in hundredths of the first line that is no comment and no fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


SCORERS: Mapping[str, Scorer] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_l_zh,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_zh,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "lsht": classification,
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "passage_retrieval_zh": retrieval,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
DATA_SETS = tuple(SCORERS)
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
"""Few-shot data sets, where a model goes on with more examples after its answer."""


class LongBenchScore(Metric):
    """The mean over data sets of the mean over items, in percent.

    An item's data set is `facts["dataset"]`, its classes, if any, `facts["all_classes"]`.
    """

    name = "longbench"
    title = "LongBench"

    def score(self, item: Item, output: Output) -> float:
        """An item's number by its data set's metric, from 0 to 1.

        Raises:
            DataError: The data set is unknown, there is no reference, or a library is missing.
        """
        name = _data_set(item)
        text = output.text.lstrip("\n").split("\n")[0] if name in FIRST_LINE else output.text
        classes = item.facts.get("all_classes") or ()
        return max(SCORERS[name](text, reference, classes) for reference in references_of(item))

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """A sum and a count for each of `DATA_SETS` (42,); all 0 but the item's own."""
        sums = np.zeros((len(DATA_SETS), 2))
        sums[DATA_SETS.index(_data_set(item))] = (self.score(item, output), 1)
        return tuple(sums.ravel().tolist())

    def value(self, sums: FloatArray) -> float:
        """100 times the mean over the data sets that have items."""
        totals, counts = np.asarray(sums).reshape(-1, 2).T
        present = counts > 0
        return float(100 * (totals[present] / counts[present]).mean())

    @property
    def signature(self) -> str:
        """Versions of the libraries that some of the data sets need."""
        return f"rouge:{version_of('rouge')}|jieba:{version_of('jieba')}"


def _data_set(item: Item) -> str:
    name = item.facts.get("dataset")
    if name not in SCORERS:
        raise DataError(
            f"item {item.id!r} is of the LongBench data set {name!r}; known are "
            f"{', '.join(DATA_SETS)}"
        )
    return str(name)
