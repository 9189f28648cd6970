"""Means over texts and seeds, with intervals, and whether they bear a claim out."""

from __future__ import annotations

from typing import Any

import numpy as np

from vesicle.intervals import interval

Records = dict[str, dict[str, Any]]
Row = dict[str, Any]
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "not told apart from 0"


def by_seed(records: Records, name: str) -> list[Row]:
    """Records of the jobs of one name, by seed."""
    found = {int(job.rpartition("/")[2]): job for job in records if job.rpartition("/")[0] == name}
    return [records[found[seed]] for seed in sorted(found)]


def estimate(values: Any) -> Row:
    """Mean of values (seeds, texts), with a bootstrap interval of 95 % over texts.

    A text's value is the mean over seeds; how far seeds differ is told apart. Where there is no
    value (not a number), the text's is that of its other seeds.
    """
    whole = np.array(values, dtype=float)
    per_text = np.array([_mean(column) for column in whole.T])
    per_text = per_text[~np.isnan(per_text)]
    if not len(per_text):
        raise ValueError("no text has a value; allowed: one and more")
    low, high = interval(per_text)
    return {
        "mean": round(float(per_text.mean()), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "by_seed": [round(_mean(row), 5) for row in whole],
    }


def compared(left: Any, right: Any) -> Row:
    """The estimate of left less right, (seeds, texts) each, text by text and seed by seed."""
    return estimate(np.array(left, dtype=float) - np.array(right, dtype=float))


def verdict(found: Row, side: int) -> str:
    """Whether an estimate lies above 0 (side 1) or below it (side -1).

    It holds if all of the interval does, does not hold if all of it lies on the other side, and is
    not told apart otherwise.
    """
    low, high = sorted((side * found["low"], side * found["high"]))
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else UNTOLD


def told(found: Row) -> str:
    """An estimate in figures."""
    return f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
