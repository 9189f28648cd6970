"""Instruction keeping: which of the instructions in a prompt an answer keeps (IFEval)."""

from __future__ import annotations

from typing import ClassVar

from vesicle.tasks.instruction_checks import is_kept
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import MeanMetric


class InstructionShare(MeanMetric):
    """Share of instructions kept.

    The mean over items of an item's share; as all items have the same number of instructions, this
    is IFEval's instruction-level accuracy.
    """

    name = "instruction_share"
    title = "Instructions kept"
    loose: ClassVar[bool] = False

    def score(self, item: Item, output: Output) -> float:
        """The share of `item.facts["instructions"]` that hold."""
        instructions = item.facts["instructions"]
        kept = sum(is_kept(one, output.text, loose=self.loose) for one in instructions)
        return kept / len(instructions)


class AllInstructions(InstructionShare):
    """Share of answers that keep all of their instructions: IFEval's prompt-level accuracy."""

    name = "all_instructions"
    title = "All kept"

    def score(self, item: Item, output: Output) -> float:
        """1 if the answer keeps all of the item's instructions, else 0."""
        return float(super().score(item, output) == 1)


class InstructionShareLoose(InstructionShare):
    """Share of instructions that one of IFEval's loose readings of the answer keeps."""

    name = "instruction_share_loose"
    title = "Instructions kept, loose"
    loose = True


class AllInstructionsLoose(AllInstructions):
    """Share of answers of which each instruction is kept by some loose reading."""

    name = "all_instructions_loose"
    title = "All kept, loose"
    loose = True
