"""Places in a text where a neuron fires, as strings that descriptions can be made of and tested on.

The neuron has seen nothing to the right of its token. The rest of the token's word is told all the
same, because what it fires at may be the beginning of a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vesicle.models import Text

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_RIGHT = 8
"""Tokens to the right in which the word's end is looked for."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A token in its context.

    Attributes:
        ids: Token ids up to the token, itself the last.
        token: Its own text, blanks included.
        word: The word that it is a part of, or begins; the token without blanks where that is none.
        before: Text before the token.
        before_word: Text before the word.
    """

    ids: tuple[int, ...]
    token: str
    word: str
    before: str
    before_word: str

    @property
    def begins_sentence(self) -> bool:
        """Whether nothing, or the end of a sentence, stands before the word."""
        earlier = self.before_word.rstrip()
        return not earlier or "\n" in self.before_word[len(earlier) :] or earlier[-1] in ".!?"

    @property
    def continues_word(self) -> bool:
        """Whether the word has begun before the token."""
        return self.token[:1].isalnum() and self.before[-1:].isalnum()


def spots_at(
    text: Text, tokens: Tensor, places: Iterable[Sequence[int]], n_tokens: int
) -> list[Spot]:
    """The spots at places.

    Args:
        text: The model's text side.
        tokens: (N, T) token ids of windows.
        places: Of each its window and token.
        n_tokens: Tokens of a spot at most.
    """
    return [_spot(text, tokens[window], token, n_tokens) for window, token in places]


def words_in(text: str) -> list[str]:
    """Runs of letters and digits."""
    return _WORD.findall(text)


def _spot(text: Text, window: Tensor, place: int, n_tokens: int) -> Spot:
    first = max(0, place + 1 - n_tokens)
    ids = window[first : place + 1 + _RIGHT].tolist()
    n = place + 1 - first
    # What a token adds to the text, because some decoders put blanks between tokens.
    before, own, whole = (text.decode(ids[:stop]) for stop in (n - 1, n, len(ids)))
    token = own[len(before) :] if own.startswith(before) else text.pieces(ids[n - 1 : n])[0]
    right = whole[len(own) :] if whole.startswith(own) else ""
    word, begin = _word(before, token, right)
    return Spot(
        ids=tuple(ids[:n]),
        token=token,
        word=word,
        before=before,
        before_word=(before + token)[:begin],
    )


def _word(before: str, token: str, right: str) -> tuple[str, int]:
    """The word that covers the token's last letter or digit, and where it begins."""
    own = token.rstrip()
    end = len(before) + len(own)
    if own[-1:].isalnum():
        for found in _WORD.finditer(before + token + right):
            if found.start() < end <= found.end():
                return found[0], found.start()
    return own.strip(), end - len(own.lstrip())
