"""Haystack: filler text of a wanted number of tokens, with sentences hidden in it.

The text of all rows is cut into sentences. A passage starts at a random one and reads on, back to
the first after the last, so that any length can be had. Its last sentence is cut at a word, which
makes lengths exact to within one word. Needles go between sentences.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from vesicle.errors import DataError
from vesicle.tasks.base import HubSet, Row, Settings, Task

# How much shorter than asked a prompt may be: one word's tokens and what its cut changes.
MOST_SPARE_TOKENS = 40
# A word has at most a token a byte, so that one word more or less stays within that.
_MOST_WORD_BYTES = 30
# Longer ones are mostly lists and code without full stops, and would leave few places for needles.
_MOST_SENTENCE_WORDS = 60
# Near enough: what is left to add would seldom hold another word.
_NEAR_TOKENS = 2

# After a full stop and blanks, or none where paragraphs were joined ("at work.Nobody doubts").
_BOUNDARY = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)\s+(?=[\"'“(]?[A-Z0-9])"
    r"|(?<=[.!?][\"')”])\s+(?=[A-Z0-9])"
    r"|(?<=[a-z]{2}[.!?])(?=[A-Z])"
)


class GeneratedTask(Task):
    """A task that makes its items from a seed, and takes only filler text from its rows."""

    kind = "generate"
    folder = "paul_graham_essays"
    hub = HubSet(path="baber/paul_graham_essays", splits={"haystack": "train"})
    splits = ("train", "haystack")
    default_split = "train"
    fields: ClassVar[Mapping[str, type]] = {"text": str}


def cells(settings: Settings, lengths: Sequence[int], per_cell: int) -> Iterator[tuple[int, int]]:
    """The number of each item, and its length: all lengths, then all of them again.

    Args:
        settings: What was asked for.
        lengths: By default.
        per_cell: Items of each length, by default.
    """
    for number in range(per_cell if settings.per_cell is None else settings.per_cell):
        for length in settings.lengths or lengths:
            yield number, length


def generator(*parts: int | float | str) -> np.random.Generator:
    """A random generator that depends on the parts alone: not on the process, nor earlier draws.

    Args:
        parts: Such as a seed, a task's name, a length and a number.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each on one line; those that are not running text are left out."""
    found = []
    for piece in _BOUNDARY.split(text):
        words = piece.split()
        if (
            words
            and len(words) <= _MOST_SENTENCE_WORDS
            and all(len(word.encode()) <= _MOST_WORD_BYTES for word in words)
        ):
            found.append(" ".join(words))
    return found


class Haystack:
    """Sentences to fill prompts with.

    Args:
        rows: Rows with running text in `text`.

    Raises:
        DataError: There is no sentence in them.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.sentences = [sentence for row in rows for sentence in sentences_of(row["text"])]
        if not self.sentences:
            raise DataError(
                "the filler text is empty: it needs at least one sentence of at most"
                f" {_MOST_SENTENCE_WORDS} words, in the field 'text'"
            )
        self._lengths = [sentence.count(" ") + 1 for sentence in self.sentences]

    def passage(self, start: int, n_words: int) -> list[str]:
        """Sentences with this many words in all, the last one cut and closed with a full stop.

        Args:
            start: Index of the first sentence.
            n_words: Words wanted; more than there are begins again.
        """
        found = []
        while n_words > 0:
            index = start % len(self.sentences)
            sentence, length = self.sentences[index], self._lengths[index]
            if length > n_words:
                sentence = " ".join(sentence.split()[:n_words]).rstrip(".,;:!?\"'([“—-") + "."
            found.append(sentence)
            n_words -= length
            start += 1
        return found

    def key(self, rng: np.random.Generator) -> str:
        """Five digits that the filler does not have."""
        found = str(rng.integers(10_000, 100_000))
        while any(found in sentence for sentence in self.sentences):
            found = str(rng.integers(10_000, 100_000))
        return found

    def fill(
        self,
        rng: np.random.Generator,
        encode: Callable[[str], list[int]],
        n_tokens: int,
        prompt: Callable[[str], str],
        needles: Sequence[tuple[float, str]] = (),
    ) -> str:
        """Filler with needles, of the length that makes a prompt of `n_tokens`.

        Args:
            rng: Draws where in the text to begin.
            encode: Text to token ids.
            n_tokens: Most tokens of the whole prompt; it has at most `MOST_SPARE_TOKENS` fewer.
            prompt: The whole prompt, from the filler.
            needles: Depth in [0, 1] and sentence of each needle.

        Raises:
            DataError: The prompt is longer than that without any filler, or a depth is wrong.
        """
        start = int(rng.integers(len(self.sentences)))

        def text(n_words: int) -> str:
            return hide(self.passage(start, n_words), needles)

        return text(fit(lambda n: len(encode(prompt(text(n)))), n_tokens))


def hide(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """Put needles between sentences, each at the boundary nearest to its depth, counted in words.

    Args:
        sentences: The haystack.
        needles: Depth from 0 (before the first sentence) to 1 (after the last), and sentence.
            Needles at one boundary keep their order.

    Returns:
        One line of text.

    Raises:
        DataError: A depth outside 0 to 1.
    """
    ends = np.cumsum([0, *(sentence.count(" ") + 1 for sentence in sentences)])
    at: dict[int, list[str]] = {}
    for depth, needle in needles:
        if not 0 <= depth <= 1:
            raise DataError(f"depth {depth:g} is not from 0 (start) to 1 (end)")
        at.setdefault(int(np.argmin(np.abs(ends - depth * ends[-1]))), []).append(needle)
    parts = list(at.get(0, []))
    for index, sentence in enumerate(sentences, start=1):
        parts += [sentence, *at.get(index, [])]
    return " ".join(parts)


def fit(count: Callable[[int], int], n_tokens: int) -> int:
    """The largest size, or one almost as large, at which something has at most `n_tokens` tokens.

    Counting is the slow part. Sizes are guessed from the tokens that a unit took so far, and halved
    between the last fit and the last misfit where that does not help: three or four counts.

    Args:
        count: Tokens at a size, from 0.
        n_tokens: Most tokens.

    Raises:
        DataError: Size 0 has more.
    """
    low, low_tokens = 0, count(0)
    if low_tokens > n_tokens:
        raise DataError(
            f"a prompt of {n_tokens} tokens is too short: this one takes {low_tokens} before any"
            " filler"
        )
    overhead, high, rate = low_tokens, None, 1.3
    while n_tokens - low_tokens > _NEAR_TOKENS and (high is None or high - low > 1):
        guess = low + max(1, round((n_tokens - low_tokens) / rate))
        if high is not None and guess >= high:
            guess = (low + high) // 2
        tokens = count(guess)
        rate = max((tokens - overhead) / guess, 0.01)
        if tokens <= n_tokens:
            low, low_tokens = guess, tokens
        else:
            high = guess
    return low
