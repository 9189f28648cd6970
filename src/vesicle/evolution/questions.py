"""Contexts to be remembered, and what is asked of them afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vesicle.evaluation.execution.prompts import Codec, continuation
from vesicle.models.text import n_common
from vesicle.tasks.items import Item


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context, whose entries are forgotten before anything else is known, and what follows it.

    Attributes:
        id: Unique.
        context: Token ids.
        lead: Of the question, and of how its answer begins; may be empty.
        answer: Of what is to be predicted.
        weight: Of its loss a token, beside others'.
    """

    id: str
    context: list[int]
    lead: list[int]
    answer: list[int]
    weight: float = 1.0


def of_items(items: Iterable[Item], codec: Codec, weight: float = 1.0) -> Iterator[Question]:
    """Questions with one right answer, as plain text."""
    for item in items:
        prompt, answer = continuation(item.prompt, " " + item.references[0], codec)
        n = n_common(codec.encode(item.context, control_tokens=False), prompt[:-1])
        yield Question(
            id=item.id, context=prompt[:n], lead=prompt[n:], answer=answer, weight=weight
        )


def of_text(
    ids: list[int], length: int, n_answer: int, count: int, weight: float, name: str = "text"
) -> Iterator[Question]:
    """Pieces of running text, whose next tokens are to be predicted; evenly spread."""
    whole = length + n_answer
    count = min(count, len(ids) // whole)
    for i in range(count):
        start = i * (len(ids) - whole) // max(1, count - 1)
        piece = ids[start : start + whole]
        yield Question(
            id=f"{name}-{i}", context=piece[:length], lead=[], answer=piece[length:], weight=weight
        )
