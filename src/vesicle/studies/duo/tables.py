"""Records of jobs as tables, each row a mean over seeds and texts with its interval."""

from __future__ import annotations

from typing import Any

import numpy as np

from vesicle.studies.duo.routers import KINDS
from vesicle.studies.estimates import Records, Row, by_seed, compared, estimate

CURVES = {
    "labelled": "oracle",
    "unlabelled": "oracle without labels",
    "random 100": "best of 100 random patterns, by the label",
    "random 10": "best of 10 random patterns, by the label",
    "random 1": "a random pattern",
    "drawn": "oracle, of labels drawn from the all-big output",
    "fixed": "one pattern for all, best on validation texts",
    "fixed of 100": "one pattern for all, best of 100 random ones on validation texts",
}


def curves(records: Records, job: str) -> list[Row]:
    """Losses by number of big FFNs, in the oracle's context, and what they are above all big.

    Of drawn labels, all big is judged by those too.
    """
    seeds = by_seed(records, job)
    rows = []
    for name in CURVES:
        whole = np.array([record["curves"][name] for record in seeds])  # (S, N, K)
        rest = "drawn" if name == "drawn" else "labelled"
        big = np.array([record["curves"][rest] for record in seeds])[..., -1]
        for k in range(whole.shape[-1]):
            rows.append(
                {
                    "choice": name,
                    "n_big": k,
                    "loss": round(float(whole[..., k].mean()), 5),
                    "above_all_big": compared(whole[..., k], big),
                }
            )
    return rows


def layers(records: Records, job: str) -> dict[str, list[list[float]]]:
    """Shares of tokens whose FFN the oracle takes big: by oracle, number of big FFNs, layer."""
    seeds = by_seed(records, job)
    return {
        name: np.array([r["layers"][name] for r in seeds]).mean((0, 1)).round(4).tolist()
        for name in ("labelled", "unlabelled")
    }


def searches(records: Records) -> list[Row]:
    """How far above the exhaustive search others end, worst and mean over numbers of big FFNs."""
    seeds = by_seed(records, "compared")
    rows = []
    for place, first in enumerate(seeds[0]["rows"]):
        above = np.array([r["rows"][place]["above"] for r in seeds])  # (S, N, K)
        rows.append(
            {
                **{key: first[key] for key in ("search", "cost", "evaluated")},
                "of": seeds[0]["patterns"],
                "above": estimate(above.mean(-1)),
                "worst": round(float(above.mean((0, 1)).max()), 5),
            }
        )
    return rows


def executed(records: Records, budgets: tuple[int, ...]) -> list[Row]:
    """Losses as executed, at each number of big FFNs, beside all big and a random pattern."""
    found = points(records)
    big = next(rows for (name, _), rows in found.items() if name == "all big")
    rows = []
    for (name, n_big), own in found.items():
        whole = name in ("all small", "all big")
        if not (whole or n_big in budgets):
            continue
        losses = _losses(own)
        row = {
            "who": name,
            "n_big": n_big,
            "share": round(float(np.mean([p["share"] for p in own])), 4),
            "loss": round(float(np.mean(losses)), 5),
            "context_loss": round(float(np.mean(_losses(own, "context_losses"))), 5),
            "above_all_big": compared(losses, _losses(big)),
        }
        if not whole:
            row["above_random"] = compared(losses, _losses(found["random", n_big]))
        if (f"{name}, shuffled", n_big) in found:
            row["above_shuffled"] = compared(losses, _losses(found[f"{name}, shuffled", n_big]))
            row["agreement"] = _agreement(own)
        rows.append(row)
    return sorted(rows, key=lambda row: row["n_big"])


def points(records: Records) -> dict[tuple[str, int], list[Row]]:
    """What was judged by execution, seed by seed: by name and number of big FFNs."""
    found = dict[tuple[str, int], list[Row]]()
    for record in by_seed(records, "controls"):
        for row in record["rows"]:
            found.setdefault((row["name"], row["budget"]), []).append(row)
    for kind in KINDS:
        slug = f"routers/{kind.replace(' ', '-')}-"
        names = {job.rpartition("/")[0] for job in records if job.startswith(slug)}
        # One kind's name may begin another's.
        for name in sorted(n for n in names if "-" not in n.removeprefix(slug)):
            for record in by_seed(records, name):
                for row in record["rows"]:
                    own = f"router: {kind}", row["budget"]
                    found.setdefault(own, []).append(row)
                    moved = f"{own[0]}, shuffled", row["budget"]
                    found.setdefault(moved, []).append(row["shuffled"])
    return found


def probes(records: Records) -> list[Row]:
    """What probes gain on nothing, in nats a choice, and how often they are right."""
    names = sorted({j.rpartition("/")[0] for j in records if j.startswith("probes/")})
    rows = []
    for name in names:
        seeds = by_seed(records, name)
        nothing = [r["nothing"] for r in seeds]
        for place, first in enumerate(seeds[0]["rows"]):
            own = [r["rows"][place] for r in seeds]
            rows.append(
                {
                    "oracle": seeds[0]["oracle"],
                    "n_big": seeds[0]["budget"],
                    "inputs": first["inputs"],
                    "unknown": round(float(np.mean([n["log_losses"] for n in nothing])), 5),
                    "gain": estimate([r["gains"] for r in own]),
                    "gain_by_layer": np.mean([r["gain_by_layer"] for r in own], 0)
                    .round(5)
                    .tolist(),
                    "accuracy": round(float(np.mean([r["accuracies"] for r in own])), 4),
                    "frequency_accuracy": round(
                        float(np.mean([n["accuracies"] for n in nothing])), 4
                    ),
                }
            )
    return rows


def difficulty(records: Records) -> Row:
    """Difficulty of tokens, in nats, and how many do not gain."""
    seeds = by_seed(records, "difficulty")
    positions = {
        key: np.array([[[g["mean"] for g in text] for text in r[key]] for r in seeds])
        for key in ("by_position", "small_by_position")
    }
    return {
        "mean": estimate([r["means"] for r in seeds]),
        "drawn_mean": estimate([r["drawn_means"] for r in seeds]),
        "idle": estimate([r["idle"] for r in seeds]),
        "idle_without_choice": estimate([r["idle_without_choice"] for r in seeds]),
        "by_position": [
            {
                "name": group["name"],
                "mean": estimate(positions["by_position"][..., n]),
                "small": round(float(positions["small_by_position"][..., n].mean()), 5),
            }
            for n, group in enumerate(seeds[0]["by_position"][0])
        ],
        "by_frequency": _merged([r["by_frequency"] for r in seeds]),
        "by_class": _merged([r["by_class"] for r in seeds], [r["small_by_class"] for r in seeds]),
        "correlations": {
            name: {
                "mean": round(float(np.mean([r["correlations"][name] for r in seeds])), 4),
                "by_seed": [r["correlations"][name] for r in seeds],
            }
            for name in seeds[0]["correlations"]
        },
    }


def _merged(groups: list[list[Row]], small: list[list[Row]] | None = None) -> list[Row]:
    """Means over seeds, of groups of the same tokens."""

    def mean(told: list[list[Row]], name: str) -> float:
        return round(
            float(np.mean([g["mean"] for own in told for g in own if g["name"] == name])), 5
        )

    return [
        {
            "name": g["name"],
            "tokens": g["tokens"],
            "mean": mean(groups, g["name"]),
            **({} if small is None else {"small": mean(small, g["name"])}),
        }
        for g in groups[0]
    ]


def _losses(rows: list[Row], key: str = "text_losses") -> list[Any]:
    return [row[key] for row in rows]


def _agreement(rows: list[Row]) -> dict[str, list[float]]:
    """By oracle, shares of choices that are its own: of the router, and shuffled."""
    return {
        name: np.mean([row["agreement"][name] for row in rows], 0).round(4).tolist()
        for name in rows[0]["agreement"]
    }
