"""Which class each token of a text is of, where tokens are known by their ids alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vesicle.kept.classes import SPECIAL, classes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def token_classes(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Classes of tokens by where they stand in what they spell; ends of texts are special."""
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    told = classes(decode(ids), spans_of(decode, ids))
    return [SPECIAL if i == 0 else name for i, name in zip(ids, told, strict=True)]


def spans_of(decode: Callable[[list[int]], str], ids: list[int]) -> list[tuple[int, int]]:
    """Where the characters of each token stand in the text that all of them spell."""
    stops = [len(decode(ids[: n + 1])) for n in range(len(ids))]
    # A token may be a part of a character, which counts as one once it is whole.
    for n in reversed(range(len(stops) - 1)):
        stops[n] = min(stops[n], stops[n + 1])
    return list(zip([0, *stops[:-1]], stops, strict=True))
