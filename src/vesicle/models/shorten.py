"""Making a text short enough for a prompt, without touching what stands around it.

A prompt is more than its text: a first token, instructions, turns, the opening of the answer. All
of that stays. The text itself loses tokens in its middle, at its start or at its end. By default it
is the middle, as LongBench does it: beginning and end of a document say most about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Place(StrEnum):
    """The part of a text that is left out where it is too long."""

    middle = "middle"
    start = "start"
    end = "end"


@dataclass(frozen=True, kw_only=True)
class Shortened:
    """A prompt that fits.

    Attributes:
        ids: Token ids of the whole prompt.
        text: What is left of the text.
        n_left_out: Tokens of the text that are not in the prompt.
        n_text: Tokens of the whole text.
    """

    ids: list[int]
    text: str
    n_left_out: int = 0
    n_text: int = 0


def shorten(
    text: str,
    most_tokens: int,
    *,
    prompt: Callable[[str], list[int]],
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    at: Place = Place.middle,
) -> Shortened | None:
    """Encode a prompt, with less of its text where it would exceed `most_tokens`.

    Args:
        text: The part that may be cut.
        most_tokens: Of the whole prompt.
        prompt: A text to the token ids of the whole prompt with that text.
        encode: A text to its own token ids.
        decode: Token ids to their text.
        at: Where to cut.

    Returns:
        The prompt; None if it is too long without any of the text.
    """
    ids = prompt(text)
    if len(ids) <= most_tokens:
        return Shortened(ids=ids, text=text)
    words = encode(text)
    n_left_out = 0
    room = max(0, most_tokens - (len(ids) - len(words)))
    while len(ids) > most_tokens:
        if room < 0:
            return None
        text = _kept(words, room, decode, at)
        ids, n_left_out = prompt(text), len(words) - room
        # Token boundaries may move where the halves meet. No text at all is tried before giving up.
        room = max(room - max(1, len(ids) - most_tokens), 0 if room else -1)
    return Shortened(ids=ids, text=text, n_left_out=n_left_out, n_text=len(words))


def _kept(
    words: Sequence[int], room: int, decode: Callable[[Sequence[int]], str], at: Place
) -> str:
    """The text of `room` of the words."""
    tail = {Place.middle: room // 2, Place.start: room, Place.end: 0}[at]
    head = room - tail
    return (decode(words[:head]) if head else "") + (decode(words[-tail:]) if tail else "")
