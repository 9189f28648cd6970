"""What may be given as a prompt: a text to continue, a chat to answer, or token ids.

A text is continued as it stands and messages are answered through the model's chat template, which
is how the pipelines of Hugging Face treat the two.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from vesicle.errors import VesicleError

Message = Mapping[str, str]
"""One turn of a chat: its `role` and its `content`."""
Prompt = str | Sequence[int] | Sequence[Message]


def is_chat(prompt: Any) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of messages."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    return listed and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def prompt_ids(prompt: Any) -> list[int]:
    """A prompt's token ids as a list of its own, from any row of whole numbers.

    Raises:
        VesicleError: If it is something else.
    """
    ids = None if isinstance(prompt, str | bytes | Mapping) else _whole(prompt)
    if ids is None:
        raise VesicleError(
            f"the prompt is {reprlib.repr(prompt)}; allowed: a text, token ids, or messages with "
            "role and content"
        )
    return ids


def checked_ends(stop: Collection[int]) -> frozenset[int]:
    """The tokens that end a text.

    Raises:
        VesicleError: If they are not token ids.
    """
    ids = None if isinstance(stop, str | bytes | Mapping) else _whole(stop)
    if ids is None:
        raise VesicleError(
            f"stop is {reprlib.repr(stop)}; allowed: token ids, or None for the model's own"
        )
    return frozenset(ids)


def checked_count(name: str, count: Any) -> int:
    """A number of tokens that was asked for.

    Raises:
        VesicleError: If it is not a whole number from 0 on; `name` says of what.
    """
    try:
        whole = operator.index(count)
    except TypeError:
        whole = -1
    if whole < 0 or isinstance(count, bool):
        raise VesicleError(f"{name} is {count!r}; allowed: whole numbers from 0 on")
    return whole


def _whole(values: Any) -> list[int] | None:
    """The numbers, if they are whole ones in a row."""
    if isinstance(values, np.ndarray | Tensor):
        values = values.tolist()
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        return None
