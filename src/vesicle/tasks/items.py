"""What a task asks and what a model gives back: plain records that tasks and executors share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a task.

    The prompt is `context + question`. Methods that compress memory before the question is known
    (key-value presses) do so after `context`.

    Attributes:
        id: Unique within the task's split.
        context: What is read first: a document, a passage, a haystack. The only part that may be
            shortened to fit a window.
        preamble: How the context begins, where that is instructions: what methods that forget may
            be told to protect.
        question: The rest of the prompt.
        opening: How the answer begins, put before the model's own words; in a chat it is the
            beginning of the assistant's turn.
        references: Accepted answers, reference summaries or translations.
        choices: Continuations of the prompt to choose from, for tasks of kind `choose`.
        answer: Index of the right choice.
        max_new_tokens: Most tokens of a generated answer.
        style: `chat` or `plain`, as `Task.style`; None for the task's own.
        stop: Strings that end a generated answer; they are not part of it.
        group: What the item is averaged with: a data set of a collection, a depth, a level.
        facts: What else scoring needs, as JSON can hold it.
    """

    id: str
    context: str
    preamble: str = ""
    question: str = ""
    opening: str = ""
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int | None = None
    max_new_tokens: int = 0
    style: Literal["chat", "plain"] | None = None
    stop: tuple[str, ...] = ()
    group: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """All that is asked, without a chat template."""
        return self.context + self.question + self.opening


@dataclass(frozen=True, kw_only=True)
class Missing:
    """An item that could not be asked or run, while others could.

    Attributes:
        item: Its id; of a row that makes no item, where the row is, such as `line 3`.
        reason: What is wrong with it, in one line that any file can hold.
    """

    item: str
    reason: str

    def __post_init__(self) -> None:
        """Fold line breaks, show halves of characters as escapes, cut what is too long to read."""
        for name, most in (("item", 100), ("reason", 400)):
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            text = " ".join(text.split())
            short = text if len(text) <= most else f"{text[: most - 3]}..."
            object.__setattr__(self, name, short)

    def __str__(self) -> str:
        """Such as `line 3 has no field 'de'`, or `item 7: the loss is not finite`."""
        colon = "" if self.reason.startswith(("has ", "is ")) else ":"
        return f"{self.item}{colon} {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model gave for an item; which fields are filled depends on the task's kind.

    Attributes:
        text: The generated answer (`generate`), cut before a stop string.
        choice_nats: Summed log-likelihood in nats of each choice after the prompt (`choose`).
        choice_bytes: UTF-8 bytes of each choice.
        nats: Summed loss in nats of the scored tokens of a window (`loss`), above 0.
        n_tokens: Scored tokens.
        n_bytes: UTF-8 bytes of the scored text.
    """

    text: str = ""
    choice_nats: tuple[float, ...] = ()
    choice_bytes: tuple[int, ...] = ()
    nats: float = 0.0
    n_tokens: int = 0
    n_bytes: int = 0
