"""Retrieval: whether what was hidden in a long prompt comes back in the answer."""

from __future__ import annotations

import re

from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import MeanMetric, Metric

# The sub-tasks of `vesicle.tasks.ruler`, in the order of the statistics.
RULER_SUBTASKS = (
    "single needle",
    "multi-key",
    "multi-value",
    "multi-query",
    "variable tracking",
    "common words",
    "frequent words",
)


class Retrieval(MeanMetric):
    """Share of answers that contain the key, as a number of its own and not inside a longer one."""

    name = "retrieval"
    title = "Retrieval"

    def score(self, item: Item, output: Output) -> float:
        """1 if any reference stands in the answer, else 0."""
        return float(
            any(
                re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", output.text)
                for reference in item.references
            )
        )


class RulerRecall(Metric):
    """RULER's recall: of all strings asked for, the share that the answer contains.

    As in the original (Hsieh et al. 2024, `string_match_all`): a string counts if it occurs
    anywhere in the answer, letter case aside. Averaged over the items of a sub-task, and then over
    the sub-tasks that are present, so that each counts the same.
    """

    name = "recall"
    title = "Recall"

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """A sum of shares and a count for each sub-task; zeros for all but the item's own."""
        answer = output.text.lower()
        found = [reference.lower() in answer for reference in item.references]
        sums = [0.0] * (2 * len(RULER_SUBTASKS))
        index = RULER_SUBTASKS.index(item.group)
        sums[2 * index : 2 * index + 2] = [sum(found) / len(found), 1.0]
        return tuple(sums)

    def value(self, sums: FloatArray) -> float:
        """100 times the mean over present sub-tasks of the mean over their items."""
        shares, counts = sums[0::2], sums[1::2]
        present = counts > 0
        return float(100 * (shares[present] / counts[present]).mean())
