import json
from collections.abc import Callable
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesicle.errors import DataError
from vesicle.tasks.base import Row
from vesicle.tasks.haystack import (
    MOST_SPARE_TOKENS,
    Haystack,
    fit,
    generator,
    hide,
    sentences_of,
)


def filler() -> list[Row]:
    """The filler text that is shipped, about 1100 words."""
    file = resources.files("vesicle.tasks") / "samples" / "filler.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def blanks(text: str) -> list[int]:
    """A tokenizer of words between blanks."""
    return [len(word) for word in text.split()]


def byte_pairs(text: str) -> list[int]:
    """A tokenizer with many tokens a word, a special first one, and merges across words."""
    return [0, *range((len(text.encode()) + 1) // 2)]


def test_sentences_end_where_they_should() -> None:
    text = (
        'Dr. Smith met J. Doe. "Why?" he said. Nobody knew!\nIt was 3.5 miles at work.Then they'
        " left. See https://example.org/a/very/long/address/of/a/page for more. The end."
    )
    assert sentences_of(text) == [
        "Dr. Smith met J. Doe.",
        '"Why?" he said.',
        "Nobody knew!",
        "It was 3.5 miles at work.",
        "Then they left.",
        "The end.",
    ]


def test_text_without_full_stops_is_left_out() -> None:
    assert sentences_of("word " * 61) == []
    assert sentences_of("word " * 60) != []


@pytest.mark.parametrize("rows", [[], [{"text": ""}], [{"text": " \n "}], [{"text": "x" * 31}]])
def test_empty_filler_is_an_error(rows: list[Row]) -> None:
    with pytest.raises(DataError, match="filler text is empty"):
        Haystack(rows)


def test_passage_repeats_a_short_text_and_cuts_the_last_sentence() -> None:
    haystack = Haystack([{"text": "One two three. Four five, six seven."}])
    assert haystack.passage(0, 3) == ["One two three."]
    assert haystack.passage(1, 9) == ["Four five, six seven.", "One two three.", "Four five."]
    assert haystack.passage(0, 700) == ["One two three.", "Four five, six seven."] * 100
    assert haystack.passage(0, 0) == []


@given(st.integers(0, 100), st.integers(0, 3000))
def test_passage_has_the_words_asked_for(start: int, n_words: int) -> None:
    haystack = Haystack([{"text": "A. B c d. E f; g h i j - k. L m n o."}])
    assert len(" ".join(haystack.passage(start, n_words)).split()) in (n_words, n_words - 1)


def test_needles_lie_between_sentences_at_their_depths() -> None:
    sentences = ["a a a a.", "b b b b.", "c c c c.", "d d d d."]
    needles = [(1.0, "END"), (0.0, "START"), (0.5, "HALF"), (0.55, "ALSO"), (0.7, "LATE")]
    assert hide(sentences, needles) == (
        "START a a a a. b b b b. HALF ALSO c c c c. LATE d d d d. END"
    )


@pytest.mark.parametrize("depth", [-0.1, 1.5, float("nan")])
def test_a_depth_outside_the_haystack_is_an_error(depth: float) -> None:
    with pytest.raises(DataError, match=r"from 0 .* to 1"):
        hide(["a."], [(depth, "x")])


@given(
    overhead=st.integers(0, 50),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=300),
    n_tokens=st.integers(50, 3000),
)
def test_fit_finds_a_size_that_fits_and_one_more_does_not(
    overhead: int, steps: list[int], n_tokens: int
) -> None:
    cycle = np.resize(steps, 4000)
    ends = overhead + np.concatenate([[0], np.cumsum(cycle)])
    asked: list[int] = []

    def count(size: int) -> int:
        asked.append(size)
        return int(ends[size])

    size = fit(count, n_tokens)
    assert ends[size] <= n_tokens
    assert ends[size] >= n_tokens - 2 or ends[size + 1] > n_tokens
    assert len(asked) <= 40
    assert len(asked) == len(set(asked))


def test_fit_is_quick_where_words_are_alike() -> None:
    asked: list[int] = []

    def count(size: int) -> int:
        asked.append(size)
        return 30 + size + size // 4 + size % 3

    assert 99_998 <= count(fit(count, 100_000)) <= 100_000
    assert len(asked) <= 6


def test_a_prompt_that_is_too_long_already_is_an_error() -> None:
    with pytest.raises(DataError, match=r"10 tokens is too short: this one takes 11"):
        fit(lambda size: 11 + size, 10)


@pytest.mark.parametrize("encode", [blanks, byte_pairs])
@pytest.mark.parametrize("n_tokens", [64, 500, 5000])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_filled_prompts_have_the_length_asked_for(
    encode: Callable[[str], list[int]], n_tokens: int, depth: float
) -> None:
    for seed in range(5):
        text = Haystack(filler()).fill(
            generator(seed), encode, n_tokens, "Begin. {} Stop.".format, [(depth, "NEEDLE here.")]
        )
        length = len(encode(f"Begin. {text} Stop."))
        assert n_tokens - MOST_SPARE_TOKENS <= length <= n_tokens
        assert text.count("NEEDLE here.") == 1


def test_generator_depends_on_all_of_its_parts() -> None:
    draws = [
        generator(*parts).integers(1 << 60)
        for parts in [("a", 1), ("a", 1), ("a", 2), ("b", 1), (-1,), (1, "a"), (1, 1), (11,)]
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == len(draws) - 1
