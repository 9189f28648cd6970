"""Where transmitters act, and which positions of a sequence are prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesicle.errors import VesicleError
from vesicle.phases import EVERYWHERE, GABA_ALONE, PLACES, Phases, Spans
from vesicle.transmitters import NAMES


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), Phases()),
        (("generated",), Phases()),
        (("all",), EVERYWHERE),
        (("gaba=all",), Phases(gaba="all")),
        (("all", "dopamine=prompt"), Phases(**{**EVERYWHERE.to_dict(), "dopamine": "prompt"})),
        (("dopamine=prompt", "all"), EVERYWHERE),
        (("gaba=never",), Phases(gaba="never")),
    ],
)
def test_words(words: tuple[str, ...], expected: Phases):
    assert Phases.parse(words) == expected
    assert Phases.from_dict(expected.to_dict()) == expected


@pytest.mark.parametrize("word", ["", "decode", "gaba", "gaba=", "gaba=sometimes", "glutamate=all"])
def test_words_that_mean_nothing(word: str):
    with pytest.raises(
        VesicleError, match=f"phase is {word!r}; allowed: generated, all, prompt, never"
    ):
        Phases.parse([word])


def test_values_that_mean_nothing():
    with pytest.raises(VesicleError, match="phase of gaba is 'rarely'; allowed: generated"):
        Phases(gaba="rarely")
    with pytest.raises(VesicleError, match="unknown transmitter 'glutamate'"):
        Phases.from_dict({"glutamate": "all"})


@given(st.fixed_dictionaries({name: st.sampled_from(PLACES) for name in NAMES}))
def test_who_acts(places: dict[str, str]):
    phases = Phases(**places)
    acting = phases.acting(np.array([True, False]))
    for i, name in enumerate(NAMES):
        assert acting[0, i] == (places[name] in ("prompt", "all"))
        assert acting[1, i] == (places[name] in ("generated", "all"))
        assert phases.ignores_phase([name]) == (places[name] == "all")


def test_what_saves_no_time_rests_unless_a_word_says_otherwise():
    """Where nothing was measured all of them act."""
    avx2 = Phases.saving_time("avx2")
    rest = {"dopamine": "never", "serotonin": "never"}
    assert avx2 == Phases.saving_time(None) == Phases(gaba="all", **rest)
    assert Phases.saving_time("avx512") == Phases.saving_time("neon") == Phases(gaba="all")
    assert Phases.saving_time("avx512", "GenuineIntel") == Phases(gaba="all")
    assert Phases.saving_time("avx512", "AuthenticAMD") == avx2
    assert Phases.saving_time("avx2", "AuthenticAMD") == avx2
    assert Phases.parse(("serotonin=all",), avx2) == Phases(
        dopamine="never", serotonin="all", gaba="all"
    )
    assert Phases.parse(("all",), avx2) == EVERYWHERE
    assert Phases.parse((), avx2) == avx2


def test_one_alone():
    three = ("dopamine", "serotonin", "gaba")
    assert GABA_ALONE.only("gaba", three)
    assert Phases.saving_time("avx2").only("gaba", three)
    assert not Phases.saving_time("avx512").only("gaba", three)
    assert not GABA_ALONE.only("dopamine", three)
    assert not GABA_ALONE.only("gaba", ("gaba",))  # it has no others to be told from


SPANS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6)


@given(steps=SPANS, cut=st.integers(0, 60))
def test_spans(steps: list[tuple[int, int]], cut: int):
    """Gaps and lengths in turn, against a plain list of booleans."""
    spans, plain, at = Spans(), [False] * 80, 0
    for gap, length in steps:
        at += gap
        spans.add(at, at + length)
        plain[at : at + length] = [True] * length
        at += length
    positions = np.arange(80, dtype=np.int32)
    assert spans.contains(positions).tolist() == plain
    assert spans.opening_prompt == plain.index(False)
    opening = [p and i < cut for i, p in enumerate(plain)]
    assert spans.opening(cut).contains(positions).tolist() == opening
