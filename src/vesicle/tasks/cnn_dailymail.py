"""CNN/DailyMail: summarize a news article in a few sentences, scored by ROUGE.

See et al. 2017, https://aclanthology.org/P17-1099, the version with names (3.0.0). A chat whose
only turn is:

    Article:
    The old stone bridge over the river in Oakford will be closed ...

    Summarize the article in three sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task, no_text
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.rouge import Rouge1, Rouge2, RougeL, RougeLsum


class CnnDailyMail(Task):
    """CNN/DailyMail 3.0.0: summarize a news article in three sentences."""

    name = "cnn_dailymail"
    title = "CNN/DailyMail"
    kind = "generate"
    style = "chat"
    metrics = (Rouge1(), Rouge2(), RougeL(), RougeLsum())
    folder = "cnn_dailymail"
    hub = HubSet(path="abisee/cnn_dailymail", configuration="3.0.0")
    splits = ("validation", "test", "train")
    default_split = "validation"
    fields: ClassVar[Mapping[str, type]] = {"article": str, "highlights": str}

    def check(self, row: Row) -> str:
        """`highlights` must hold text."""
        return no_text(row, "highlights")

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item an article; the reference keeps a highlight on each line, for ROUGE-Lsum."""
        for row in rows:
            yield Item(
                id=str(row["id"]),
                context=f"Article:\n{row['article'].strip()}",
                question="\n\nSummarize the article in three sentences.",
                references=(row["highlights"].strip(),),
                max_new_tokens=96,
            )
