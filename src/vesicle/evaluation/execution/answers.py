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
    task: Task,
    items: Sequence[Item],
    codec: Codec,
    end: int | None,
    length: int,
    window: int | None = None,
) -> list[Pair]:
    """Prompts and right answers of a task's items.

    Args:
        task: The task.
        items: Its items; of a text, its documents.
        codec: The model's text side.
        end: Token id that ends a turn, put behind a chat's answer; None for none.
        length: Tokens of prompt and answer together, at most.
        window: Of a text's windows; `length` if not given.

    Returns:
        Those that fit whole, which may be none.

    Raises:
        DataError: None can be asked.
    """
    prepared, _ = prepare(task, items, codec, length, length=window or length)
    found = [_pair(task, own, codec, end) for own in prepared if not own.prompt.shortened]
    return [(prompt, answer) for prompt, answer in found if len(prompt) + len(answer) <= length]


def _pair(task: Task, prepared: Prepared, codec: Codec, end: int | None) -> Pair:
    item, ids = prepared.item, prepared.prompt.ids
    if task.kind == "loss":
        return ids[:1], ids[1:]
    if task.kind == "choose":
        assert item.answer is not None
        return ids, prepared.choices[item.answer]
    answer = item.references[0]
    if (item.style or task.style) == "chat":
        told = codec.encode(answer, control_tokens=False, continues=True)
        return ids, told if end is None else [*told, end]
    stop = item.stop[0] if item.stop else ""
    return continuation(item.prompt, f" {answer.strip()}{stop}", codec)
