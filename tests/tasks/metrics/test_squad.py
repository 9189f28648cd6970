"""Exact match and F1 are the official scorer's numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.metrics.helpers import answer, stored, value
from vesicle.errors import DataError
from vesicle.tasks.metrics.squad import F1, ExactMatch, normalise, token_f1

ROWS = stored("squad")


@pytest.mark.parametrize(("row", "item", "output"), ROWS, ids=range(len(ROWS)))
def test_each_answer_gets_the_official_scorers_numbers(row, item, output):
    assert ExactMatch().score(item, output) == row["exact_match"]
    assert F1().score(item, output) == row["f1"]


def test_the_corpus_number_is_the_official_one():
    pairs = [(item, output) for _, item, output in ROWS]
    n = len(ROWS)
    assert value(ExactMatch(), pairs) == pytest.approx(
        100 * sum(row["exact_match"] for row, *_ in ROWS) / n, rel=1e-15
    )
    assert value(F1(), pairs) == pytest.approx(
        100 * sum(row["f1"] for row, *_ in ROWS) / n, rel=1e-15
    )


def test_numbers_worked_out_by_hand():
    assert F1().score(*answer("in the Eiffel Tower", "Eiffel Tower")) == pytest.approx(0.8)
    assert F1().score(*answer("red red blue", "red green")) == pytest.approx(2 / 5)  # 1/3 and 1/2
    assert ExactMatch().score(*answer("a  The U.S.A.", "usa")) == 1


def test_what_normalisation_takes_away():
    assert normalise("An Apple, the pear; a-b  theatre\n") == "apple pear ab theatre"
    assert normalise("“quoted” – 5¢") == "“quoted” – 5¢", "only ASCII punctuation goes"


def test_no_reference_is_an_error_that_names_the_item():
    for metric in (ExactMatch(), F1()):
        with pytest.raises(DataError, match="'one' has no reference"):
            metric.score(*answer("x"))


@given(st.text(), st.lists(st.text(), max_size=3))
def test_a_perfect_answer_gets_all_points(text: str, others: list[str]):
    pair = answer(text, *others, text)
    assert ExactMatch().score(*pair) == 1
    assert F1().score(*pair) == (1 if normalise(text) else F1().score(*answer("", *others, text)))


@given(st.text(), st.text())
def test_normalising_twice_changes_nothing_and_f1_is_symmetric(a: str, b: str):
    x, y = normalise(a).split(), normalise(b).split()
    assert token_f1(x, y) == pytest.approx(token_f1(y, x))
    assert 0 <= token_f1(x, y) <= 1
