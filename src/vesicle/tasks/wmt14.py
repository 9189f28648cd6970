"""WMT14 English to German: news sentences, scored by BLEU and chrF.

Bojar et al. 2014, https://aclanthology.org/W14-3302. A plain completion after three fixed pairs
of our own:

    English: The house is small.
    German: Das Haus ist klein.
    ...
    English: The train to Hamburg leaves from platform four.
    German:
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from vesicle.tasks.base import HubSet, Row, Settings, Task, no_text
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.translation import Bleu, ChrF

PAIRS = (
    ("The house is small.", "Das Haus ist klein."),
    (
        "He read the newspaper before he went to work.",
        "Er las die Zeitung, bevor er zur Arbeit ging.",
    ),
    (
        "Prices rose by three percent last year.",
        "Die Preise sind im vergangenen Jahr um drei Prozent gestiegen.",
    ),
)


class Wmt14EnDe(Task):
    """WMT14 English to German."""

    name = "wmt14_en_de"
    title = "WMT14 English-German"
    kind = "generate"
    metrics = (Bleu(), ChrF())
    folder = "wmt14_en_de"
    hub = HubSet(path="wmt/wmt14", configuration="de-en")
    splits = ("test", "validation", "train")
    default_split = "test"
    fields: ClassVar[Mapping[str, type]] = {"en": str, "de": str}

    def from_hub(self, row: Row) -> Iterable[Row]:
        """The hub nests both sides in `translation`, and has no ids."""
        return [{"en": row["translation"]["en"], "de": row["translation"]["de"]}]

    def check(self, row: Row) -> str:
        """`de`, the reference translation, must hold text."""
        return no_text(row, "de")

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item a sentence; the examples are its context."""
        examples = "".join(f"English: {en}\nGerman: {de}\n\n" for en, de in PAIRS)
        for row in rows:
            yield Item(
                id=str(row["id"]),
                context=examples,
                question=f"English: {row['en'].strip()}\nGerman:",
                references=(row["de"].strip(),),
                max_new_tokens=96,
                stop=("\n",),
            )
