"""A task's items as token ids, ready to be run.

Documents of a text are cut into windows, prompts that are too long are shortened, and choices are
told from the prompt they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.execution.language_modelling import evenly, scored_bytes
from vesicle.evaluation.execution.prompts import Codec, Prompt, continuation, make_prompt
from vesicle.tasks.base import Task
from vesicle.tasks.items import Item, Missing, Output
from vesicle.training.data import token_windows


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An item as token ids.

    Attributes:
        item: What is asked.
        prompt: To be read; of kind `loss` the whole window.
        choices: Token ids of each choice.
        n_bytes: UTF-8 bytes of the text that is scored, of kind `loss`.
        context: Tokens of the window that are a prompt and not scored, of kind `loss`.
    """

    item: Item
    prompt: Prompt
    choices: tuple[list[int], ...] = ()
    n_bytes: int = 0
    context: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens to run, but for an answer's."""
        return len(self.prompt.ids) + sum(map(len, self.choices))

    @property
    def n_most(self) -> int:
        """Tokens to run if the answer is as long as it may be."""
        return self.n_tokens + self.item.max_new_tokens


def prepare(
    task: Task,
    items: Sequence[Item],
    codec: Codec,
    most: int,
    *,
    length: int | None = None,
    context: int = 0,
    limit: int | None = None,
) -> tuple[list[Prepared], list[Missing]]:
    """Encode the items of a task.

    Args:
        task: The task.
        items: Its items; of a text, its documents.
        codec: The model's text side.
        most: Tokens of prompt and answer together.
        length: Tokens in a window of a text; None for the task's own.
        context: How many of them are a prompt and not scored.
        limit: Windows of a text, evenly spread; None for all.

    Returns:
        The items that can be run, at least one; and those that cannot be made short enough, told
        apart, or scored.

    Raises:
        DataError: None can be run, or there is too little text for a window.
        VesicleError: A window is longer than the model's context, or all of it is prompt.
    """
    if task.kind == "loss":
        return _windows(items, codec, length or task.window, context, most, limit), []
    prepared: list[Prepared] = []
    missing: list[Missing] = []
    for item in items:
        try:
            prepared.append(_prepared(task, item, codec, most))
        except DataError as error:
            reason = str(error).removeprefix(f"item {item.id!r}").lstrip(": ")
            missing.append(Missing(item=item.id, reason=reason))
    if not prepared:
        raise DataError(f"no item of {task.name} can be run: {missing[0]}")
    return prepared, missing


def _prepared(task: Task, item: Item, codec: Codec, most: int) -> Prepared:
    if task.kind == "choose":
        found = _choices(item, codec, most)
    else:
        style = item.style or task.style
        found = Prepared(
            item=item, prompt=make_prompt(item, codec, style, most - item.max_new_tokens)
        )
    # What a scorer lacks, in the item or on this machine, shows before any model runs.
    n = len(item.choices)
    for metric in task.metrics:
        metric.statistics(item, Output(choice_nats=(-1.0,) * n, choice_bytes=(1,) * n))
    return found


def _choices(item: Item, codec: Codec, most: int) -> Prepared:
    longest = max(
        len(codec.encode(choice, control_tokens=False, continues=True)) for choice in item.choices
    )
    prompt = make_prompt(item, codec, "plain", most - longest)
    text = codec.decode(prompt.ids) if prompt.shortened else item.prompt
    pairs = [continuation(text, choice, codec) for choice in item.choices]
    ids = pairs[0][0]
    if any(opening != ids for opening, _ in pairs) or any(not own for _, own in pairs):
        raise DataError(f"item {item.id!r}: a choice cannot be told from its prompt in tokens")
    prompt = replace(prompt, ids=ids, n_context=min(prompt.n_context, len(ids)))
    return Prepared(item=item, prompt=prompt, choices=tuple(own for _, own in pairs))


def _windows(
    documents: Sequence[Item],
    codec: Codec,
    length: int,
    context: int,
    most: int,
    limit: int | None,
) -> list[Prepared]:
    if length > most:
        raise VesicleError(f"window is {length}; allowed: at most {most} tokens")
    if context >= length:
        raise VesicleError(f"context is {context}; allowed: fewer than the window's {length}")
    windows = token_windows(
        [item.context for item in documents],
        lambda text: codec.encode(text, control_tokens=False),
        length,
    )
    return [
        window(f"window {number}", windows[number].tolist(), codec, context)
        for number in evenly(len(windows), limit)
    ]


def window(name: str, ids: list[int], codec: Codec, context: int = 0) -> Prepared:
    """A window of a text: all tokens behind its context are scored, but for its very first."""
    return Prepared(
        item=Item(id=name, context=""),
        prompt=Prompt(ids=ids, n_context=len(ids)),
        n_bytes=scored_bytes(ids, codec, context),
        context=context,
    )
