"""Needle in a haystack: a pass key hidden in essays, asked for at the end.

After Kamradt's test (2023, one fact at chosen lengths and depths of Paul Graham's essays) and the
pass key of Mohtashami and Jaggi (2023, arXiv:2305.16300). An item, shortened:

    A pass key is hidden in the text below. Find it and remember it.

    ... The pass key of the green cabin is 63134. ...

    Question: What is the pass key of the green cabin?
    Answer: The pass key of the green cabin is

The question is no part of `context`: whoever compresses memory after the context does not know yet
what will be asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from vesicle.tasks.base import Row, Settings
from vesicle.tasks.haystack import GeneratedTask, Haystack, cells, generator
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.retrieval import Retrieval

LENGTHS = (512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PER_CELL = 2
# The set that lm-evaluation-harness fills its RULER tasks with; it has one split.

_COLOURS = ("blue", "green", "red", "yellow", "white", "black", "grey", "brown")
_PLACES = (
    *("lighthouse", "cabin", "bridge", "castle", "mill", "tower", "barn", "station"),
    *("library", "chapel", "bakery", "museum", "garage", "cellar", "theatre", "harbour"),
)


class Needle(GeneratedTask):
    """A five-digit pass key in essays, at each length and depth."""

    name = "needle"
    title = "Needle in a haystack"
    style = "plain"
    metrics = (Retrieval(),)

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """Items of all lengths and depths, then all of them again, `per_cell` times.

        An item depends on the seed, its own length, depth and number only, so that asking for other
        lengths beside does not change it.

        Raises:
            DataError: Filler without sentences, a length too short for the question, a depth
                outside 0 to 1.
        """
        haystack = Haystack(rows)
        for number, length in cells(settings, LENGTHS, PER_CELL):
            for depth in settings.depths or DEPTHS:
                yield self._item(haystack, settings, length, float(depth), number)

    def _item(
        self, haystack: Haystack, settings: Settings, length: int, depth: float, number: int
    ) -> Item:
        rng = generator(self.name, settings.seed, length, depth, number)
        thing = f"{rng.choice(_COLOURS)} {rng.choice(_PLACES)}"
        key = haystack.key(rng)
        before = "A pass key is hidden in the text below. Find it and remember it.\n\n"
        question = f"\n\nQuestion: What is the pass key of the {thing}?\nAnswer:"
        opening = f" The pass key of the {thing} is"
        needle = f"The pass key of the {thing} is {key}."
        text = haystack.fill(
            rng,
            settings.encode,
            length,
            lambda filler: before + filler + question + opening,
            [(depth, needle)],
        )
        return Item(
            id=f"{length}-{depth:g}-{number}",
            context=before + text,
            question=question,
            opening=opening,
            references=(key,),
            max_new_tokens=12,
            stop=("\n",),
            group=f"{length} tokens, depth {depth:g}",
            facts={"length": length, "depth": depth, "key": key},
        )
