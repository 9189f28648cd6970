"""A task's items as prompts with their right answers, to be trained on.

The prompt is what the task asks with, and the answer what it scores best: the first reference, the
right choice, or a whole window of a text behind its first token. Prompts and answers are encoded as
an evaluation encodes them; a chat's answer ends as the model's turns do, a plain one with what
stops it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vesicle.evaluation.execution.items import Prepared, prepare
from vesicle.evaluation.execution.prompts import Codec, continuation
from vesicle.tasks.base import Task
from vesicle.tasks.items import Item

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


def pairs_of(
    task: Task, items: Sequence[Item], codec: Codec, ends: Sequence[int], length: int
) -> list[Pair]:
    """Prompts and right answers of a task's items.

    Args:
        task: The task.
        items: Its items; of a text, its documents.
        codec: The model's text side.
        ends: Token ids that end a turn, the first of which is put behind a chat's answer.
        length: Tokens of prompt and answer together, at most; a text's windows have as many.

    Returns:
        Those that fit, at least one.

    Raises:
        DataError: None can be asked.
    """
    prepared, _ = prepare(task, items, codec, length, length=length)
    found = [_pair(task, own, codec, ends) for own in prepared]
    return [(prompt, answer) for prompt, answer in found if len(prompt) + len(answer) <= length]


def _pair(task: Task, prepared: Prepared, codec: Codec, ends: Sequence[int]) -> Pair:
    item, ids = prepared.item, prepared.prompt.ids
    if task.kind == "loss":
        return ids[:1], ids[1:]
    if task.kind == "choose":
        assert item.answer is not None
        return ids, prepared.choices[item.answer]
    answer = item.references[0]
    if (item.style or task.style) == "chat":
        told = codec.encode(answer, control_tokens=False, continues=True)
        return ids, [*told, *ends[:1]]
    stop = item.stop[0] if item.stop else ""
    opening = codec.decode(ids) if prepared.prompt.shortened else item.prompt
    return continuation(opening, f" {answer.strip()}{stop}", codec)
