"""BLEU and chrF are sacrebleu's corpus scores, to the last bit."""

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.metrics.helpers import STORED, answer, stored, table, value
from vesicle.errors import DataError
from vesicle.tasks.metrics import translation
from vesicle.tasks.metrics.bootstrap import interval, paired
from vesicle.tasks.metrics.translation import Bleu, ChrF

CORPUS = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}
METRICS = (Bleu(), ChrF())
PAIRS = [(item, output) for _, item, output in stored("translation")]


def library_score(metric, indices) -> float:
    rows = [STORED["translation"][i] for i in indices]
    texts = [row["text"] for row in rows]
    return CORPUS[metric.name](texts, [[row["references"][0] for row in rows]]).score


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_equals_the_library_on_every_beginning_and_every_single_item(metric):
    everything = list(range(len(PAIRS)))
    choices = [everything[:n] for n in everything[1:]] + [[i] for i in everything] + [everything]
    for indices in choices:
        assert value(metric, [PAIRS[i] for i in indices]) == library_score(metric, indices)
    assert 5 < value(metric, PAIRS) < 95


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
@given(drawn=st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=20))
def test_a_draw_with_repeats_scores_as_the_library_scores_that_corpus(metric, drawn):
    assert value(metric, [PAIRS[i] for i in drawn]) == library_score(metric, drawn)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_a_perfect_translation_gets_all_points(metric):
    rows = [answer(row["references"][0], row["references"][0]) for row in STORED["translation"]]
    assert value(metric, rows) == pytest.approx(100)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_an_interval_is_made_of_library_scores(metric):
    statistics = table(metric, PAIRS)
    found = interval(metric, statistics, seed=3, draws=50)
    draws = np.random.default_rng(3).integers(0, len(PAIRS), (50, len(PAIRS)))
    low, high = np.quantile([library_score(metric, draw) for draw in draws], (0.025, 0.975))
    assert (found.value, found.low, found.high) == (
        library_score(metric, range(len(PAIRS))),
        low,
        high,
    )
    assert paired(metric, statistics, statistics, draws=50).high == 0


def test_signatures_are_sacrebleus_own():
    translation._scorer.cache_clear()  # known before anything is scored
    for metric, scorer in ((Bleu(), sacrebleu.BLEU()), (ChrF(), sacrebleu.CHRF())):
        scorer.corpus_score(["a"], [["a"]])
        assert metric.signature == str(scorer.get_signature())
        assert sacrebleu.__version__ in metric.signature


def test_more_than_one_reference_is_refused():
    with pytest.raises(DataError, match="2 reference translations; BLEU is made from 1"):
        Bleu().statistics(*answer("a", "a", "b"))
