"""LongBench's numbers are those of its own scorer."""

import sys

import pytest

from tests.tasks.metrics.helpers import answer, stored, table, value
from vesicle.errors import DataError
from vesicle.tasks.metrics import longbench
from vesicle.tasks.metrics.longbench import (
    CHINESE_PUNCTUATION,
    DATA_SETS,
    LongBenchScore,
    rouge_l,
)

ROWS = stored("longbench")
METRIC = LongBenchScore()


@pytest.mark.parametrize(
    ("row", "item", "output"),
    ROWS,
    ids=[f"{row['dataset']}-{i}" for i, (row, *_) in enumerate(ROWS)],
)
def test_each_answer_gets_the_original_scorers_number(row, item, output):
    assert METRIC.score(item, output) == row["score"]


def test_every_data_set_is_among_the_stored_answers():
    assert {row["dataset"] for row, *_ in ROWS} == set(DATA_SETS)
    assert len(DATA_SETS) == 21


def test_the_mean_is_over_data_sets():
    pairs = [(item, output) for _, item, output in ROWS]
    scores: dict[str, list[float]] = {}
    for row, *_ in ROWS:
        scores.setdefault(row["dataset"], []).append(row["score"])
    means = [sum(of) / len(of) for of in scores.values()]
    assert value(METRIC, pairs) == pytest.approx(100 * sum(means) / 21)
    assert value(METRIC, pairs[::-1]) == pytest.approx(value(METRIC, pairs))


def test_a_data_set_without_items_is_left_out():
    right = answer("yes", "yes", dataset="qasper")
    wrong = answer("no", "yes", dataset="hotpotqa")
    assert value(METRIC, [right]) == 100
    assert value(METRIC, [right, wrong, wrong, wrong]) == 50
    assert table(METRIC, [right, wrong]).shape == (2, 42)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_perfect_answer_gets_all_points(name):
    text = {"passage_count": "17", "passage_retrieval_en": "Paragraph 17"}.get(name, "段落17")
    classes = [text, "other"]
    assert METRIC.score(*answer(text, text, dataset=name, all_classes=classes)) == pytest.approx(1)


def test_long_texts_do_not_overflow_the_stack():
    words = [f"w{i}" for i in range(2000)]
    limit = sys.getrecursionlimit()
    assert rouge_l("w0", " ".join(words)) == pytest.approx(2 / 2001)
    assert sys.getrecursionlimit() == limit


def test_chinese_punctuation_is_the_originals_list():
    found = [code for code in range(0x110000) if CHINESE_PUNCTUATION.match(chr(code))]
    assert len(found) == 106, "74 of the original's own, and 32 of ASCII"
    assert not CHINESE_PUNCTUATION.search("《．")


def test_unusable_items_are_refused():
    with pytest.raises(DataError, match=r"data set 'squad'; known are narrativeqa, .*repobench-p"):
        METRIC.statistics(*answer("a", "a", dataset="squad"))
    with pytest.raises(DataError, match="no reference"):
        METRIC.statistics(*answer("a", dataset="qasper"))
    with pytest.raises(DataError, match="'7' names no paragraph"):
        METRIC.statistics(*answer("7", "7", dataset="passage_retrieval_en"))


@pytest.mark.parametrize(
    ("module", "cached", "name"),
    [("jieba", longbench._jieba, "multifieldqa_zh"), ("rouge", longbench._rouge, "qmsum")],
)
def test_a_missing_library_is_told_only_where_it_is_needed(monkeypatch, module, cached, name):
    cached.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"'{module}'.*pip install 'vesicle\[eval\]'"):
        METRIC.score(*answer("a", "a", dataset=name))
    assert METRIC.score(*answer("a b", "b", dataset="qasper")) == 1
