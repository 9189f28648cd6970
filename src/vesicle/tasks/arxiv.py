"""arXiv: write the abstract of a scientific article, scored by ROUGE.

Cohan et al. 2018, https://aclanthology.org/N18-2097. Articles are long: tens of thousands of
tokens are common, and what does not fit the model's window is cut. A chat whose only turn is:

    Article:
    ## Introduction
    A cup of coffee that is left on a table cools. ...

    Write the abstract of the article in one paragraph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task, no_text
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.rouge import Rouge1, Rouge2, RougeL, RougeLsum


class Arxiv(Task):
    """arXiv long-document summarization."""

    name = "arxiv"
    title = "arXiv"
    kind = "generate"
    style = "chat"
    metrics = (Rouge1(), Rouge2(), RougeL(), RougeLsum())
    folder = "arxiv"
    hub = HubSet(path="ccdv/arxiv-summarization")
    splits = ("test", "validation", "train")
    default_split = "test"
    fields: ClassVar[Mapping[str, type]] = {"article": str, "abstract": str}

    def check(self, row: Row) -> str:
        """`abstract` must hold text."""
        return no_text(row, "abstract")

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item an article, with the abstract as its reference."""
        for row in rows:
            yield Item(
                id=str(row["id"]),
                context=f"Article:\n{row['article'].strip()}",
                question="\n\nWrite the abstract of the article in one paragraph.",
                references=(row["abstract"].strip(),),
                max_new_tokens=200,
            )
