"""Task: a data set, a standard prompt, metrics. One file a task; the registry is `registry.py`.

A task takes rows of the *local format* (one JSON object a row, fields documented in
`docs/tasks/`), wherever they come from:

- `--data DIR`: a folder with `FOLDER/SPLIT.jsonl.gz` (or `.jsonl`), read as it is;
- no `--data`: the Hugging Face hub, under the data set's usual name; `from_hub` turns a row into
  the local format;
- `--data sample`: a few rows that come with the package, for tests and a first try.

Generated tasks (needle, RULER, instructions) make their items from a seed, and take only filler
text from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vesicle.tasks.items import Item
from vesicle.tasks.metrics.base import Metric

Kind = Literal["generate", "choose", "loss"]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A data set on the Hugging Face hub.

    Attributes:
        path: Such as `rajpurkar/squad`.
        configuration: Such as `wikitext-2-raw-v1`; None for the only one.
        splits: Our split names to the hub's, where they differ.
    """

    path: str
    configuration: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a task may need to make its items.

    Attributes:
        seed: Of generated items.
        encode: Text to token ids, by which generated tasks measure lengths.
        lengths: Tokens of the prompts of generated tasks; () for the task's own.
        depths: Where in the haystack a needle lies, from 0 (start) to 1 (end); () likewise.
        per_cell: Items of each length and depth of generated tasks.
    """

    seed: int = 0
    encode: Callable[[str], list[int]]
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    per_cell: int | None = None


class Task(ABC):
    """One task.

    Attributes:
        name: On the command line, such as `squad`.
        title: In tables, such as `SQuAD v1.1`.
        kind: `generate` an answer, `choose` among continuations, or the `loss` of a text.
        style: `chat` puts the prompt into the model's chat template, `plain` leaves it as it is.
        metrics: The first is the main one.
        folder: Its folder in a local data directory.
        hub: Where it lies on the hub; None for what is generated and needs no text.
        splits: Known splits.
        default_split: The one that is scored unless asked otherwise.
        fields: Fields that a row of the local format must have, with their types.
        optional: Other fields that its items take over, as they are.
        window: Tokens in a window, for kind `loss`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Kind]
    style: ClassVar[Literal["chat", "plain"]] = "plain"
    metrics: ClassVar[tuple[Metric, ...]]
    folder: ClassVar[str]
    hub: ClassVar[HubSet | None]
    splits: ClassVar[tuple[str, ...]]
    default_split: ClassVar[str]
    fields: ClassVar[Mapping[str, type]]
    optional: ClassVar[tuple[str, ...]] = ("id",)
    window: ClassVar[int] = 1024

    def from_hub(self, row: Row) -> Iterable[Row]:
        """Rows of the local format from one row of the hub's; by default the row as it is."""
        return [row]

    def check(self, row: Row) -> str:
        """What keeps a row, whose fields have the right types, from being asked or scored.

        Returns:
            Such as `field 'answers' is empty; at least one is needed`; "" if nothing.
        """
        return ""

    @abstractmethod
    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """Items from rows of the local format, in order.

        Tasks of kind `loss` give one item a document, with its text as `context`; whoever scores
        them cuts windows.
        """


def no_text(row: Row, field: str) -> str:
    """For `Task.check`: the complaint that a field, text or texts, has nothing to score against."""
    texts = [row[field]] if isinstance(row[field], str) else row[field]
    if any(text.strip() for text in texts):
        return ""
    return f"field {field!r} is empty; there must be something to score against"
