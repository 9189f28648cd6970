"""A briefing before a long document: is what was said at the very beginning still known at the end?

Following instructions is beyond a small model behind a thousand tokens (see `instructions`), so
that nobody can lose the ability by forgetting. Saying what they were is not. An item, shortened:

    Briefing. Keep to it until the end.
    - Your name is Clara Brandt.
    - Sign every answer with the code 48213.
    - Send every report to the office in Lisbon.

    Text:

    ...

    Question: With which code do you sign every answer?
    Answer: I sign every answer with the code

The briefing is the item's `preamble`: methods may protect it. Which of its lines will be asked for
is not known before the question.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vesicle.tasks.base import Row, Settings
from vesicle.tasks.haystack import GeneratedTask, Haystack, cells, generator
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.retrieval import Retrieval

LENGTHS = (512, 1024, 2048)
PER_CELL = 12

_FIRST_NAMES = ("Clara", "Jonas", "Mira", "Oscar", "Lena", "Victor", "Nadia", "Hugo")
_LAST_NAMES = ("Brandt", "Keller", "Moreau", "Lindqvist", "Okafor", "Tanaka", "Silva", "Novak")
_CITIES = ("Lisbon", "Oslo", "Vienna", "Toronto", "Nairobi", "Osaka", "Lima", "Dublin")


class Briefing(GeneratedTask):
    """Three lines at the beginning, a document, and a question about one of them."""

    name = "briefing"
    title = "Briefing before a document"
    style = "plain"
    metrics = (Retrieval(),)

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item of each length, then another of each, `per_cell` times.

        Items of one number have the same briefing and question at all lengths, so that lengths
        compare. The questions are asked by turns.

        Raises:
            DataError: Filler without sentences, a length too short for the briefing.
        """
        haystack = Haystack(rows)
        for number, length in cells(settings, LENGTHS, PER_CELL):
            yield self._item(haystack, settings, length, number)

    def _item(self, haystack: Haystack, settings: Settings, length: int, number: int) -> Item:
        rng = generator(self.name, settings.seed, number)
        name = f"{rng.choice(_FIRST_NAMES)} {_not_in(haystack, _LAST_NAMES, rng)}"
        code = haystack.key(rng)
        city = _not_in(haystack, _CITIES, rng)
        preamble = (
            "Briefing. Keep to it until the end.\n"
            f"- Your name is {name}.\n"
            f"- Sign every answer with the code {code}.\n"
            f"- Send every report to the office in {city}."
        )
        asked, opening, answer = (
            ("What is your name?", " My name is", name),
            (
                "With which code do you sign every answer?",
                " I sign every answer with the code",
                code,
            ),
            (
                "To which office do you send every report?",
                " I send every report to the office in",
                city,
            ),
        )[number % 3]
        before, question = f"{preamble}\n\nText:\n\n", f"\n\nQuestion: {asked}\nAnswer:"
        context = before + haystack.fill(
            generator(self.name, settings.seed, number, length),
            settings.encode,
            length,
            lambda filler: before + filler + question + opening,
        )
        return Item(
            id=f"{length}-{number}",
            context=context,
            preamble=preamble,
            question=question,
            opening=opening,
            references=(answer,),
            max_new_tokens=12,
            stop=("\n",),
            group=f"{length} tokens",
            facts={"length": length, "asked": ("name", "code", "office")[number % 3]},
        )


def _not_in(haystack: Haystack, words: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of the words, if possible one that the filler does not have."""
    free = [word for word in words if not any(word in line for line in haystack.sentences)]
    return str(rng.choice(free or words))
