"""RACE: multiple-choice questions of English exams, each about a passage.

Lai et al. 2017, https://aclanthology.org/D17-1082. Every option is a continuation of the prompt;
the one with the highest log-likelihood per byte is the model's choice:

    Article: Tom's bus was late, so he walked to school. ...

    Question: Why did Tom walk to school?
    Answer: His bus was late.

About half of the questions are sentences with a gap. Where the gap is at the end, as it mostly is,
the sentence itself is what an option continues:

    Tom walked to school because his bus was late.

Other gaps stay as they are, and the question is put like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.likelihood import Accuracy, NormalisedAccuracy

_GAP_AT_END = re.compile(r"\s*_+\s*[.?!]?\s*")


class Race(Task):
    """RACE, middle and high school together."""

    name = "race"
    title = "RACE"
    kind = "choose"
    metrics = (NormalisedAccuracy(), Accuracy())
    folder = "race"
    hub = HubSet(path="ehovy/race", configuration="all")
    splits = ("test", "validation", "train")
    default_split = "test"
    fields: ClassVar[Mapping[str, type]] = {
        "article": str,
        "question": str,
        "options": list,
        "answer": int,
    }
    optional = ("id", "level")

    def from_hub(self, row: Row) -> Iterable[Row]:
        """The hub has letters for answers, and the passage's file name for an id."""
        passage = row["example_id"].removesuffix(".txt")
        level = "middle" if passage.startswith("middle") else "high"
        answer = "ABCD".index(row["answer"])
        return [{**row, "id": passage, "answer": answer, "level": level}]

    def check(self, row: Row) -> str:
        """No option may be blank, and `answer` must be the index of one."""
        options, answer = row["options"], row["answer"]
        if not 0 <= answer < len(options):
            return (
                f"has the answer {_short(answer)} to {len(options)} options; "
                "allowed: the index of one of them, from 0"
            )
        return "" if all(map(str.strip, options)) else "has an option without text"

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item a question; `group` is the level."""
        for row in rows:
            yield Item(
                id=str(row["id"]),
                context=f"Article: {row['article'].strip()}\n\n",
                question=asked(row["question"]),
                choices=tuple(f" {option.strip()}" for option in row["options"]),
                answer=row["answer"],
                group=str(row.get("level", "")),
            )


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**9 else "of a great many digits"


def asked(question: str) -> str:
    """A question as the prompt ends with it; a sentence with its gap at the end stops there."""
    question = question.strip()
    *_, last = [None, *_GAP_AT_END.finditer(question)]
    begin = question[: last.start()] if last and last.end() == len(question) else ""
    if begin and "_" not in begin:
        return begin
    return f"Question: {question}\nAnswer:"
