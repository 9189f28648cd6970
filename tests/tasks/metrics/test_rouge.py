"""ROUGE is the rouge-score package's number."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.metrics.helpers import answer, stored, value
from vesicle.errors import DataError
from vesicle.tasks.metrics import rouge
from vesicle.tasks.metrics.base import library
from vesicle.tasks.metrics.rouge import Rouge1, Rouge2, RougeL, RougeLsum

METRICS = (Rouge1(), Rouge2(), RougeL(), RougeLsum())
ROWS = stored("rouge")
WORDS = st.lists(st.sampled_from("sun moon running cats the of 42".split()), min_size=2, max_size=8)


@pytest.fixture(scope="module")
def scorer():
    names = [metric.name for metric in METRICS]
    return library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_equals_the_library_for_each_and_in_the_mean(metric, scorer):
    expected = []
    for row, item, output in ROWS:
        # (target, prediction), one reference at a time; the best is taken here.
        scores = [scorer.score(ref, row["text"])[metric.name].fmeasure for ref in row["references"]]
        expected.append(max(scores))
        assert metric.score(item, output) == max(scores)
    pairs = [(item, output) for _, item, output in ROWS]
    assert value(metric, pairs) == pytest.approx(100 * sum(expected) / len(expected), rel=1e-15)
    assert len(set(expected)) > 5, "the stored predictions tell scores apart"


def test_stems_and_sentences_count():
    assert Rouge1().score(*answer("runs", "running")) == 1
    turned = answer("one two three\nfour five six", "four five six\none two three")
    assert RougeLsum().score(*turned) == 1
    assert RougeL().score(*turned) == 0.5


def test_umlauts_and_chinese_are_blanks_to_it():
    assert Rouge1().score(*answer("大桥", "大桥")) == 0
    assert Rouge1().score(*answer("Brücke", "Br-cke")) == 1


@given(WORDS)
def test_a_perfect_summary_gets_all_points(words: list[str]):
    for metric in METRICS:
        assert metric.score(*answer(" ".join(words), "other", " ".join(words))) == 1


def test_a_missing_library_is_told(monkeypatch):
    rouge._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DataError, match=r"rouge_score.*pip install 'vesicle\[eval\]'"):
        Rouge1().score(*answer("a", "a"))


def test_the_signature_names_version_and_settings():
    assert RougeL().signature.startswith("stemmer:yes|refs:best|rouge-score:0")
