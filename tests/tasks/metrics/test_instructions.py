import numpy as np
import pytest

from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.instructions import (
    AllInstructions,
    AllInstructionsLoose,
    InstructionShare,
    InstructionShareLoose,
)

ITEM = Item(
    id="0",
    context="",
    facts={
        "instructions": [
            {"kind": "no_commas"},
            {"kind": "lower_case"},
            {"kind": "at_least_words", "n": 3},
        ]
    },
)
METRICS = (InstructionShare(), AllInstructions(), InstructionShareLoose(), AllInstructionsLoose())


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("all of it kept", (1, 1, 1, 1)),
        ("Here, sir:\nall of it kept", (1 / 3, 0, 1, 1)),
        ("Two of three", (2 / 3, 0, 2 / 3, 0)),
        # Each is kept by another variant: the first line has the words, the last the small letters.
        ("One long line, sir\nsmall", (1 / 3, 0, 1, 1)),
        ("No, Sir", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_strict_and_loose_share_and_all(answer: str, scores: tuple[float, ...]) -> None:
    found = tuple(metric.statistics(ITEM, Output(text=answer)) for metric in METRICS)
    assert tuple(score for score, _ in found) == pytest.approx(scores)
    assert all(count == 1 for _, count in found)


def test_names_differ_and_values_are_percent() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert METRICS[0].name == "instruction_share"
    assert METRICS[1].value(np.array([1.0, 4.0])) == 25
