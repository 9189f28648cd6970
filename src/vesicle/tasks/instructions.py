"""Instruction keeping: do several instructions survive a long document between them and the task?

After IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models",
arXiv:2311.07911): instructions that a program can check. Ours stand at the beginning, a document
follows, and the task comes last. An item, shortened:

    Keep to all of these rules when you answer.
    1. Do not use any commas.
    2. Use at least 40 words.
    3. Give your answer a title in double angle brackets, such as <<title>>.

    Text:

    ...

    Sum up in a few sentences what the text says. Keep to all of the rules given at the beginning.

Rules and document are the item's `context`, which methods that compress memory may thin out; the
task is its `question`. With length 0 there is no document, and the task names a topic.
"""

from __future__ import annotations

from collections.abc import Iterable

from vesicle.tasks.base import Row, Settings
from vesicle.tasks.haystack import GeneratedTask, Haystack, cells, generator
from vesicle.tasks.instruction_checks import draw, in_words
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.instructions import (
    AllInstructions,
    AllInstructionsLoose,
    InstructionShare,
    InstructionShareLoose,
)

LENGTHS = (0, 1024)
PER_CELL = 12
N_INSTRUCTIONS = 3

_TASKS = (
    "Sum up in a few sentences what the text says.",
    "Continue the text with a few sentences of your own.",
    "Write a short reply to the author of the text.",
    "Tell a friend in a few sentences what you learned from the text.",
)
_TOPICS = (
    *("a walk in the rain", "learning to cook", "an old bicycle", "moving to a new town"),
    *("the first day of school", "a night train", "growing tomatoes", "a lost umbrella"),
)
_AGAIN = " Keep to all of the rules given at the beginning."


class Instructions(GeneratedTask):
    """Three instructions, a document, a task."""

    name = "instructions"
    title = "Instruction keeping"
    style = "chat"
    metrics = (
        InstructionShare(),
        AllInstructions(),
        InstructionShareLoose(),
        AllInstructionsLoose(),
    )

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """One item of each length, then another of each, `per_cell` times.

        Items of one number have the same instructions at all lengths, so that lengths compare.

        Raises:
            DataError: Filler without sentences, a length too short for the instructions.
        """
        haystack = Haystack(rows)
        for number, length in cells(settings, LENGTHS, PER_CELL):
            yield self._item(haystack, settings, length, number)

    def _item(self, haystack: Haystack, settings: Settings, length: int, number: int) -> Item:
        rng = generator(self.name, settings.seed, number)
        instructions = draw(rng, N_INSTRUCTIONS)
        rules = "Keep to all of these rules when you answer."
        for index, instruction in enumerate(instructions, start=1):
            rules += f"\n{index}. {in_words(instruction)}"
        if length == 0:
            context = rules
            question = f"\n\nWrite a few sentences about {rng.choice(_TOPICS)}.{_AGAIN}"
        else:
            question = f"\n\n{rng.choice(_TASKS)}{_AGAIN}"
            before = f"{rules}\n\nText:\n\n"
            context = before + haystack.fill(
                rng, settings.encode, length, lambda filler: before + filler + question
            )
        return Item(
            id=f"{length}-{number}",
            context=context,
            preamble=rules,
            question=question,
            max_new_tokens=200,
            group=f"{length} tokens" if length else "no document",
            facts={"length": length, "instructions": instructions},
        )
