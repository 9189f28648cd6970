"""Items as token ids: chat templates, where the context ends, and how a long one is shortened.

The prompt is encoded in one piece, so that its tokens are those that a user's own prompt would
have. A method that compresses memory before the question is known does so after `n_context` tokens:
the longest opening that the prompt shares, token by token, with the prompt cut off after its
context.

A prompt that is too long loses the middle of its context, as LongBench does it: the beginning and
the end of a document say most about it. Its template, question and opening stay.

What an item holds is text, also where it spells out special tokens. What is put behind a prompt
gets no first token of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vesicle.errors import DataError
from vesicle.models.shorten import shorten
from vesicle.models.text import n_common
from vesicle.tasks.items import Item


class Codec(Protocol):
    """A model's text side, such as `vesicle.models.text.Text`."""

    def encode(
        self, text: str, *, control_tokens: bool = True, continues: bool = False
    ) -> list[int]:
        """Token ids of plain text; whether special tokens in it are meant, whether it goes on."""

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn, up to where the answer begins; it is text, all of it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to run.

    Attributes:
        ids: Token ids.
        n_context: Leading tokens that hold nothing but template and context.
        shortened: Tokens of context that were left out.
        n_preamble: Leading tokens that hold nothing but template and the context's preamble; 0
            where it has none.
    """

    ids: list[int]
    n_context: int
    shortened: int = 0
    n_preamble: int = 0


def make_prompt(
    item: Item, codec: Codec, style: Literal["chat", "plain"], most_tokens: int
) -> Prompt:
    """Encode an item, shortening its context where the prompt would exceed `most_tokens`.

    Raises:
        DataError: What cannot be shortened is too long already.
    """
    found = shorten(
        item.context,
        most_tokens,
        prompt=_encoder(item, codec, style),
        encode=lambda text: codec.encode(text, control_tokens=False, continues=True),
        decode=codec.decode,
    )
    if found is None:
        room = f"more than {most_tokens} tokens" if most_tokens > 0 else "room for a prompt"
        raise DataError(
            f"item {item.id!r} needs {room} without any of its context; raise --max-length"
        )
    n_context = _n_opening(codec, style, found.text, found.ids)
    preamble = item.preamble
    return Prompt(
        ids=found.ids,
        n_context=n_context,
        shortened=found.n_left_out,
        n_preamble=_n_opening(codec, style, preamble, found.ids) if preamble else 0,
    )


def continuation(prompt: str, choice: str, codec: Codec) -> tuple[list[int], list[int]]:
    """Token ids of a plain prompt and of a choice behind it.

    Blanks at the prompt's end go to the choice, where tokenizers put them.
    """
    bare = prompt.rstrip()
    whole = codec.encode(prompt + choice, control_tokens=False)
    opening = codec.encode(bare, control_tokens=False)
    return whole[: len(opening)], whole[len(opening) :]


def _encoder(
    item: Item, codec: Codec, style: Literal["chat", "plain"]
) -> Callable[[str], list[int]]:
    """Context to the ids of the whole prompt."""
    if style == "plain":
        return lambda context: codec.encode(
            context + item.question + item.opening, control_tokens=False
        )
    opening = (
        codec.encode(item.opening, control_tokens=False, continues=True) if item.opening else []
    )
    return lambda context: codec.chat(context + item.question) + opening


def _n_opening(codec: Codec, style: Literal["chat", "plain"], context: str, ids: list[int]) -> int:
    """Leading tokens that a prompt shares with one that has nothing behind `context`."""
    plain = style == "plain"
    alone = codec.encode(context, control_tokens=False) if plain else codec.chat(context)
    return n_common(alone, ids[:-1])
