"""WikiText: perplexity per token and bits per byte on good and featured Wikipedia articles.

Merity et al. 2017, https://arxiv.org/abs/1609.07843, the raw version. A split is one text, scored
in windows of 1024 tokens that do not overlap; the first token of each has no context and is not
scored. Perplexity depends on the tokenizer. Bits per byte do not, and can be compared.

WikiText-2 and WikiText-103 share their validation and test text, and differ in their training
text, so a model that was trained on neither gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.base import Metric
from vesicle.tasks.metrics.likelihood import BitsPerByte, Perplexity
from vesicle.training.data import joined


class WikiText2(Task):
    """WikiText-2 raw: the loss of a split's text, by default in windows of 1024 tokens."""

    name = "wikitext2"
    title = "WikiText-2"
    kind = "loss"
    metrics: ClassVar[tuple[Metric, ...]] = (Perplexity(), BitsPerByte())
    folder = "wikitext2"
    hub = HubSet(path="Salesforce/wikitext", configuration="wikitext-2-raw-v1")
    splits: ClassVar[tuple[str, ...]] = ("test", "validation", "train")
    default_split = "test"
    fields: ClassVar[Mapping[str, type]] = {"text": str}

    def from_hub(self, row: Row) -> Iterable[Row]:
        """The hub has a line a row, and empty text where the original has a line of one blank."""
        return [{"text": row["text"] or " \n"}]

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item a document; the whole split, if its rows are the pieces of one."""
        for number, text in enumerate(joined([row["text"] for row in rows]), 1):
            yield Item(id=str(number), context=text)


class WikiText103(WikiText2):
    """WikiText-103 raw. A local folder may be called `wikitext103`, or be WikiText-2's."""

    name = "wikitext103"
    title = "WikiText-103"
    hub = HubSet(path="Salesforce/wikitext", configuration="wikitext-103-raw-v1")
    # Its own training text is half a gigabyte, and is not in WikiText-2's folder.
    splits = ("test", "validation")
