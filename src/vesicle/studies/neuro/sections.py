"""The report's page and its summary in Markdown, section by section, from tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vesicle.studies.estimates import Row, told
from vesicle.studies.neuro.sections_inside import write_inside
from vesicle.studies.neuro.tables import WHOLE
from vesicle.studies.page import Page
from vesicle.studies.paint import lines

_GROUPS = {
    "baseline": "Baselines",
    "transmitters": "Transmitters, removed and alone",
    "release": "Where levels may differ",
    "predictor": "What predicts them",
    "training": "How they are trained",
}
_SAYS = {
    "baseline": (
        "All go on from the same dense decoder, with equal texts, steps and optimizer. Rise is the "
        "loss over the dense decoder that was trained on as long."
    ),
    "transmitters": "Each without one of the three, and with one alone.",
    "release": "The same three, released per token and layer, per text, or per layer alone.",
    "predictor": "From hidden states to levels; sizes differ little beside the decoder's.",
    "training": "What levels learn from, and whether the decoder learns with them.",
}

Table = tuple[str, list[str], list[list[str]]]
"""What it is of, its head, its rows."""


def page(found: dict[str, Any], drawn: dict[str, Any]) -> str:
    """The page.

    Args:
        found: All tables.
        drawn: What `paths` and `case` recorded.
    """
    made = Page("Neurotransmitter-inspired inference, measured")
    made.say(_about(found))
    for group, title in _GROUPS.items():
        made.heading(title)
        made.say(_SAYS[group])
        rows = found["groups"][group]
        made.table(_group_head(found), [_group_row(row, found) for row in rows], words=2)
        if group != "baseline":
            made.table(_beyond_head(found), [_beyond_row(r) for r in rows if r["name"] != WHOLE])
        else:
            made.draw(
                "Loss against executed cost, over tasks, texts and seeds.",
                lines(found["curves"], "executed share of the dense FLOPs", "nats a target"),
            )
            for row in rows:
                if row.get("own_cost") is not None:
                    made.say(_fixed(row))
    for title, head, rows in _others(found):
        made.heading(title)
        made.table(head, rows, words=2 if "levels" in head else 1)
    made.heading("By size: fits")
    for fit in found["scaling"]["fits"]:
        made.say(_fit(fit))
    write_inside(made, found["inside"], drawn)
    return made.html()


def summary(found: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = ["# Neurotransmitter-inspired inference, measured", "", _about(found), ""]
    for group, title in _GROUPS.items():
        rows = found["groups"][group]
        parts += [f"## {title}", "", _SAYS[group], ""]
        parts += _markdown(_group_head(found), [_group_row(row, found) for row in rows])
        parts += [_fixed(row) + "\n" for row in rows if row.get("own_cost") is not None]
    for title, head, rows in _others(found):
        parts += [f"## {title}", "", *_markdown(head, rows)]
    parts += [_fit(fit) + "\n" for fit in found["scaling"]["fits"]]
    return "\n".join(parts).rstrip() + "\n"


def _about(found: dict[str, Any]) -> str:
    first = found["decoders"][0]
    count = len(found["decoders"])
    tried = "Figures of this scale mean nothing. " if found["scale"] == "debug" else ""
    return (
        f"Scale: {found['scale']}. {tried}{count} decoder{'s' if count > 1 else ''} of "
        f"{first['parameters']:,} parameters, trained from scratch on running text, translation "
        "and summaries. All costs were executed and priced; losses are nats a target on test "
        "texts, intervals are of 95 % over texts, differences paired by text and seed."
    )


def _others(found: dict[str, Any]) -> list[Table]:
    """Tables that need no more than a title."""
    budgets = [f"{b:g}" for b in found["budgets"]]
    earned = [
        [row["transmitter"], *(_told(b[key]) for b in row["budgets"])]
        for key in ("added_last", "alone")
        for row in found["earned"]
    ]
    n = len(found["earned"])
    return [
        ("What each transmitter gains when added last", ["", *budgets], earned[:n]),
        ("What each loses alone, over dense", ["", *budgets], earned[n:]),
        (
            "By task, over dense",
            ["", "levels", "dense", *budgets],
            [
                [
                    row["task"],
                    row["name"],
                    f"{row['dense']['mean']:.3f}",
                    *(_told(b["rise"]) for b in row["budgets"]),
                ]
                for row in found["tasks"]
            ],
        ),
        (
            "Other levels in the same decoder: more loss than what was learnt",
            ["", *budgets],
            [
                [row["name"], *(_told(b["more"]) for b in row["budgets"])]
                for row in found["controls"]
                if row["name"] != "learnt"
            ],
        ),
        (
            "By size: rise over dense",
            ["parameters", "dense", *budgets],
            [
                [
                    f"{row['parameters']:,}",
                    f"{row['dense']['mean']:.3f}",
                    *(_told(b["rise"]) for b in row["budgets"]),
                ]
                for row in found["scaling"]["rows"]
            ],
        ),
        (
            "By size: gain over uniform",
            ["parameters", *budgets],
            [
                [f"{row['parameters']:,}", *(_told(b["gain"]) for b in row["budgets"])]
                for row in found["scaling"]["rows"]
            ],
        ),
    ]


def _group_head(found: dict[str, Any]) -> list[str]:
    return ["", "what it is", "at rest", *(f"{b:g}" for b in found["budgets"])]


def _group_row(row: Row, found: dict[str, Any]) -> list[str]:
    cells = [_told(b["rise"]) for b in row["budgets"]]
    return [
        row["name"],
        row["says"],
        _told(row["at_rest"]),
        *(cells or ["" for _ in found["budgets"]]),
    ]


def _beyond_head(found: dict[str, Any]) -> list[str]:
    return ["loses more than the whole", *(f"{b:g}" for b in found["budgets"])]


def _beyond_row(row: Row) -> list[str]:
    return [row["name"], *(_told(b["beyond_whole"]) for b in row["budgets"])]


def _fixed(row: Row) -> str:
    beyond = row["beyond_whole"]
    than = "" if beyond is None else f", {told(beyond)} beyond the whole at that cost"
    return f"{row['name']} has one cost, {row['own_cost']:.3f}: {told(row['at_rest'])}{than}."


def _fit(fit: Row) -> str:
    if fit["slope"] is None:
        return f"At {fit['cost']:g} too few sizes reach the cost for a fit."
    return (
        f"At {fit['cost']:g} the gain over uniform changes by {fit['slope']:+.4f} nats with every "
        f"tenfold of parameters ({fit['low']:+.4f} to {fit['high']:+.4f})."
    )


def _told(estimate: Row | None) -> str:
    return "not reached" if estimate is None else told(estimate)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines_ = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines_] + [""]
