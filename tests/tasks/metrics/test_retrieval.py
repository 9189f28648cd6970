import numpy as np
import pytest

from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.retrieval import RULER_SUBTASKS, Retrieval, RulerRecall


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 48213.", 1),
        ("It is 48213", 1),
        ("48213", 1),
        ("", 0),
        (" 48214.", 0),
        ("148213", 0),
        ("482130", 0),
        ("48 213", 0),
    ],
)
def test_retrieval_wants_the_key_as_a_number_of_its_own(answer: str, score: float) -> None:
    item = Item(id="0", context="", references=("48213",))
    assert Retrieval().statistics(item, Output(text=answer)) == (score, 1)


def test_retrieval_is_a_share_in_percent() -> None:
    assert Retrieval().value(np.array([3.0, 4.0])) == 75


def ruler(group: str, *references: str) -> Item:
    return Item(id="0", context="", references=references, group=group)


@pytest.mark.parametrize(
    ("answer", "share"), [("B, a", 1), ("a only", 0.5), ("none: x, y", 0), ("", 0)]
)
def test_recall_is_the_share_of_strings_found(answer: str, share: float) -> None:
    sums = RulerRecall().statistics(ruler("multi-value", "A", "b"), Output(text=answer))
    index = 2 * RULER_SUBTASKS.index("multi-value")
    assert sums[index : index + 2] == (share, 1)
    assert sum(sums) == share + 1
    assert len(sums) == 2 * len(RULER_SUBTASKS)


def test_recall_weighs_sub_tasks_alike_and_leaves_absent_ones_out() -> None:
    metric = RulerRecall()
    items = [(ruler("multi-key", "7"), "7")] * 3 + [(ruler("common words", "p", "q"), "p")]
    sums = np.sum([metric.statistics(item, Output(text=text)) for item, text in items], axis=0)
    assert metric.value(sums) == pytest.approx(75)  # not 87.5, the mean over items
