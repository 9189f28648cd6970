"""SQuAD v1.1: answer a question with a span of a Wikipedia passage.

Rajpurkar et al. 2016, https://aclanthology.org/D16-1264. Scored by F1 and exact match with the
best of the references, after the official normalisation. A plain completion after three fixed
examples of our own, which show that an answer is short:

    Passage: The town library opened in 1904 in a former grain store. ...

    Question: When did the town library open?
    Answer: 1904

    ...

    Passage: The harbour froze in 1709.

    Question: When did it freeze?
    Answer:
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task, no_text
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.squad import F1, ExactMatch

EXAMPLES = (
    (
        "The town library opened in 1904 in a former grain store. It holds about 60,000 books.",
        "When did the town library open?",
        "1904",
    ),
    (
        "Marta Lind, a botanist from Uppsala, described the plant in 1931 and named it after her "
        "teacher.",
        "Who described the plant?",
        "Marta Lind",
    ),
    (
        "Salt was carried over the pass on mules, because the road was too steep for carts.",
        "Why was salt carried on mules?",
        "the road was too steep for carts",
    ),
)


class Squad(Task):
    """SQuAD v1.1: spans of a passage as answers, asked after three fixed examples."""

    name = "squad"
    title = "SQuAD v1.1"
    kind = "generate"
    metrics = (F1(), ExactMatch())
    folder = "squad"
    hub = HubSet(path="rajpurkar/squad")
    splits = ("validation", "train")
    default_split = "validation"
    fields: ClassVar[Mapping[str, type]] = {"context": str, "question": str, "answers": list}

    def from_hub(self, row: Row) -> Iterable[Row]:
        """The hub lists an answer as often as annotators gave it, with offsets."""
        return [{**row, "answers": list(dict.fromkeys(row["answers"]["text"]))}]

    def check(self, row: Row) -> str:
        """`answers` must hold text."""
        return no_text(row, "answers")

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item a question; the examples and the passage are its context."""
        examples = "".join(
            f"Passage: {passage}\n\nQuestion: {question}\nAnswer: {answer}\n\n"
            for passage, question, answer in EXAMPLES
        )
        for row in rows:
            yield Item(
                id=str(row["id"]),
                context=f"{examples}Passage: {row['context'].strip()}\n\n",
                question=f"Question: {row['question'].strip()}\nAnswer:",
                references=tuple(row["answers"]),
                max_new_tokens=32,
                stop=("\n",),
            )
