"""Records of jobs as tables: losses at equal shares, with intervals, and slopes."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np

from vesicle.intervals import interval

Records = dict[str, dict[str, Any]]
Row = dict[str, Any]


def compared(records: Records, task: str, names: list[str], shares: tuple[float, ...]) -> list[Row]:
    """Losses of variants of a task beside dense attention's.

    A variant's loss on a text is the mean over its seeds. Differences are paired by text and seed,
    and their intervals are of a bootstrap over texts; how far seeds differ is told apart.

    Args:
        records: Of all jobs.
        task: One of `corpora.TASKS`.
        names: Of variants.
        shares: At which they are compared.

    Returns:
        A row for each variant and share that was judged, with dense attention first.
    """
    found = defaultdict[tuple[str, float | None], dict[int, Row]](dict)
    for job, record in records.items():
        parts = job.split("/")
        if len(parts) != 3 or parts[0] != task or "points" not in record:
            continue
        name, asked = _named(parts[1], names)
        if name is None:
            continue
        for point in record["points"]:
            share = asked if asked is not None else point.get("wanted")
            found[name, share][int(parts[2])] = point
    dense = found.get(("dense", None), {})
    rows = []
    for (name, share), points in sorted(found.items(), key=lambda kv: _order(kv[0], names)):
        seeds = sorted(points.keys() & dense.keys())
        if not seeds:
            continue
        rows.append(_row(name, share, [points[s] for s in seeds], [dense[s] for s in seeds]))
    return rows


def _named(told: str, names: list[str]) -> tuple[str | None, float | None]:
    """A job's name as a variant's and a share."""
    for name in names:
        plain = name.replace(" ", "-")
        if told == plain:
            return name, None
        if told.startswith(plain + "-"):
            try:
                return name, float(told.removeprefix(plain + "-"))
            except ValueError:
                continue
    return None, None


def _order(key: tuple[str, float | None], names: list[str]) -> tuple[int, float]:
    return names.index(key[0]), -(key[1] or 2.0)


def _row(name: str, share: float | None, points: list[Row], dense: list[Row]) -> Row:
    losses = np.array([p["text_losses"] for p in points])  # (seeds, texts)
    others = np.array([p["text_losses"] for p in dense])
    differences = (losses - others).mean(0)
    low, high = interval(differences)
    by_seed = [p["loss"] - d["loss"] for p, d in zip(points, dense, strict=True)]
    row = {
        "variant": name,
        "wanted": share,
        "share": float(np.mean([p["share"] for p in points])),
        "seeds": len(points),
        "loss": float(np.mean([p["loss"] for p in points])),
        "difference": float(np.mean(by_seed)),
        "low": low,
        "high": high,
        "by_seed": [round(d, 5) for d in by_seed],
        "perplexity_ratio": math.exp(float(np.mean(by_seed))),
        "judged_tokens_per_s": float(np.mean([p["judged_tokens_per_s"] for p in points])),
    }
    for key in ("bleu", "rouge1", "rouge2", "rougeL", "written_tokens_per_s", "cache_bytes"):
        if all(key in p for p in points):
            row[key] = float(np.mean([p[key] for p in points]))
    if all("soft_loss" in p for p in points):
        row["soft_gap"] = float(np.mean([p["loss"] - p["soft_loss"] for p in points]))
    return row


def pages(records: Records, rules: list[str]) -> list[Row]:
    """Losses of the dense model run by rules that choose pages, beside itself."""
    dense = {
        int(job.split("/")[2]): record["points"][0]
        for job, record in records.items()
        if job.startswith("lm/dense/")
    }
    rows = []
    for rule in rules:
        own = {
            int(job.split("/")[2]): record["points"]
            for job, record in records.items()
            if job.startswith(f"lm/{rule}/")
        }
        seeds = sorted(own.keys() & dense.keys())
        for place in range(min((len(own[s]) for s in seeds), default=0)):
            points = [own[s][place] for s in seeds]
            row = _row(rule, None, points, [dense[s] for s in seeds])
            rows.append({**row, "options": points[0]["options"]})
    return rows


def slopes(rows: list[Row], key: str) -> dict[str, float]:
    """Slopes of the logarithm of a figure against that of the length, by least squares."""
    found = {}
    for what in dict.fromkeys(row["what"] for row in rows):
        points = [(row["length"], row[key]) for row in rows if row["what"] == what]
        if len(points) > 1:
            x, y = (np.log([p[i] for p in points]) for i in (0, 1))
            found[what] = float(np.polyfit(x, y, 1)[0])
    return found
