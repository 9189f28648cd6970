"""The text that each token of a window stands for, so that joined they are the window's text."""

from __future__ import annotations

from collections.abc import Sequence

from vesicle.models import Text
from vesicle.terminal import visible


def own_texts(ids: Sequence[int], text: Text) -> list[str]:
    """Each token's text: of a character that several tokens share the last one has all, "" others.

    Special tokens are spelt out, and so are control characters.

    Args:
        ids: Token ids of a text, from its beginning.
        text: The model's tokens.
    """
    stream, found = text.stream(), []
    for token, piece in zip(ids, text.pieces(ids), strict=True):
        own = stream.push(token)
        # Decoded by itself, a special token is nothing, and a part of a character is not.
        found.append(visible(own or ("" if text.decode([token]) else piece)))
    if found and (rest := stream.flush()):
        found[-1] += visible(rest)
    return found
