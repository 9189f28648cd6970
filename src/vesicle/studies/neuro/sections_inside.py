"""The report's sections on what was looked at inside, from tables and what was drawn."""

from __future__ import annotations

from typing import Any

from vesicle.studies.estimates import Row, told
from vesicle.studies.page import Page
from vesicle.studies.paint import bars, heat, lines

_SHADES = ((0.5, "s1"), (0.7, "s4"), (0.85, "s16"))
"""Levels up to which a token has a shade, the strongest first."""


def write_inside(made: Page, found: dict[str, Any], drawn: dict[str, Any]) -> None:
    """All of them.

    Args:
        made: The page.
        found: `inside` of the report.
        drawn: What `paths` and `case` recorded.
    """
    _levels(made, found["levels"])
    _doses(made, found["doses"])
    _lesions(made, found["lesions"])
    _hybrids(made, found["hybrids"], found["pollution"])
    _pruned(made, found["pruned"])
    _times(made, found["times"])
    _paths(made, drawn["paths"])
    if drawn.get("case"):
        _case(made, drawn["case"])


def _levels(made: Page, found: dict[str, Any]) -> None:
    made.heading("What is released where")
    made.say(
        f"Mean levels (1 is rest) at an executed cost of {found['cost']:g}. Need is what a token "
        "loses where all are served by their layer's mean levels: correlations of ranks, one a "
        "seed."
    )
    names = list(found["tokens"])
    made.table(
        ["task", *names, *(f"{name} with need" for name in names)],
        [
            [
                task,
                *(f"{own[name]:.3f}" for name in names),
                *(_seeds(found["need"][task][name]) for name in names),
            ]
            for task, own in found["by_task"].items()
        ],
    )
    made.draw(
        "Mean level by layer.",
        lines(
            {name: [(n, row[name]) for n, row in enumerate(found["by_layer"])] for name in names},
            "layer",
            "level",
        ),
    )
    for name in names:
        own = found["tokens"][name]
        made.heading(f"{name}, in running text", 3)
        made.say(
            f"With the entropy of the dense output: {_seeds(own['with_entropy'])}. Lowest: "
            f"{_words(own['lowest'])}. Highest: {_words(own['highest'])}."
        )
        for key, what in (("by_class", "class"), ("by_position", "tenth of the text")):
            rows = {row["name"]: row["mean"] for row in own[key]}
            made.draw(f"{name}: mean level by {what}.", bars(rows, "level"))


def _doses(made: Page, rows: list[Row]) -> None:
    made.heading("Dose and response")
    made.say("One transmitter held at a level for all tokens and layers, the others at rest.")
    made.table(
        ["transmitter", "level", "cost", "loss over rest"],
        [
            [row["transmitter"], f"{row['dose']:g}", f"{row['cost']:.3f}", told(row["rise"])]
            for row in rows
        ],
    )


def _lesions(made: Page, rows: list[Row]) -> None:
    made.heading("Lesions")
    made.say(
        "Flat: a transmitter at its layers' mean deficits, scaled to equal cost, the others as "
        "released; what is lost more is what its levels knew of tokens. Resting: at 1, at more "
        "cost. In nats a token, and the classes that lose most."
    )
    made.table(
        ["task", "transmitter", "how", "cost", "more", "most, by class"],
        [
            [
                row["task"],
                row["transmitter"],
                row["how"],
                f"{row['cost']:.3f}",
                told(row["more"]),
                _classes(row["by_class"]),
            ]
            for row in rows
        ],
        words=3,
    )


def _hybrids(made: Page, rows: list[Row], pollution: list[Row]) -> None:
    made.heading("The systems together")
    made.say(
        "Rise over the dense decoder. Memory: the cache keeps the first and the newest half of a "
        "text. Tiles are read at half of dense attention's reads, and cost less at rest."
    )
    budgets = [f"{b['cost']:g}" for b in rows[0]["budgets"]]
    made.table(
        ["systems", "cost, dial at rest", "rise there", *budgets],
        [
            [
                " + ".join(row["systems"]) or "none",
                f"{row['undivided']['cost']:.3f}",
                told(row["undivided"]["rise"]),
                *("not reached" if b["rise"] is None else told(b["rise"]) for b in row["budgets"]),
            ]
            for row in rows
        ],
    )
    made.heading("Pollution", 3)
    made.say(
        "The first half of each text below rest, the second dense: what each loses over all dense."
    )
    made.table(
        ["first half served by", "first half", "dense half after it"],
        [[r["what"], told(r["approximate"]), told(r["dense_after"])] for r in pollution],
    )


def _pruned(made: Page, rows: list[Row]) -> None:
    made.heading("Delays, pruned")
    made.say(
        "Each feature reads its largest taps alone, with no further training: more loss than with "
        "all taps."
    )
    made.table(
        ["taps of a feature", *(f"{b['cost']:g}" for b in rows[0]["budgets"])],
        [
            [
                str(row["kept"]),
                *("not reached" if b["more"] is None else told(b["more"]) for b in row["budgets"]),
            ]
            for row in rows
        ],
    )


def _times(made: Page, rows: list[Row]) -> None:
    made.heading("Time")
    made.say(
        "A decoded token in the engine, medians of alternating turns; trained: the study's own "
        "decoder, in fp32. The others have random weights in 4 bits and uniform levels, and were "
        "timed only."
    )
    made.table(
        ["decoder", "dial", "ms", "of rest", "FLOPs", "bytes"],
        [
            [
                row["what"],
                f"{row['dial']:g}",
                f"{row['step_ms']:.3f}",
                f"{row['of_rest']:.3f}",
                f"{row['flops_total']:.3f}",
                f"{row['bytes_read']:.3f}",
            ]
            for row in rows
        ],
    )


def _paths(made: Page, drawn: dict[str, Any]) -> None:
    made.heading("A text, token by token")
    for name, rows in drawn["levels"].items():
        made.draw(f"{name}: levels.", heat(rows, "token", "layer"))
    made.draw("Channels read, share.", heat(drawn["channels"], "token", "layer"))
    shares = [[choice / 2 for choice in row] for row in drawn["ffn"]]
    made.draw("FFN: big (1), small (0.5) or none (0).", heat(shares, "token", "layer"))
    made.draw("Attention: runs (1) or not (0).", heat(drawn["attention"], "token", "layer"))
    for name in ("dense", "modulated"):
        peak = [[min(1.0, 8 * v) for v in row] for row in drawn["maps"][name]]
        made.draw(
            f"Where queries of layer {drawn['maps']['layer']} look, {name}; eightfold.",
            heat(peak, "key", "query"),
            5,
        )
    if "dopamine" in drawn["levels"]:
        rows = drawn["levels"]["dopamine"]
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        made.say("Shaded where the mean level of dopamine is low.")
        made.text(drawn["pieces"], [_shade(level) for level in means])


def _case(made: Page, drawn: dict[str, Any]) -> None:
    made.heading("The proposal's passage, by the default model")
    made.say(drawn["request"])
    for row in drawn["answers"]:
        made.heading(f"Budget {row['budget']:g}, executed {row['share']:.3f} of the FLOPs", 3)
        n = len(row["dopamine"])
        shades = [_shade(level) for level in row["dopamine"]]
        made.text(row["pieces"][-n:], shades)


def _shade(level: float) -> str:
    return next((name for most, name in _SHADES if level <= most), "")


def _seeds(values: list[float | None]) -> str:
    return ", ".join("-" if v is None else f"{v:+.2f}" for v in values)


def _words(pairs: list[list[Any]]) -> str:
    return ", ".join(f"{word!r} {level:.2f}" for word, level in pairs) or "no token is frequent"


def _classes(groups: list[Row]) -> str:
    most = sorted(groups, key=lambda g: -float(g["mean"]))[:3]
    return ", ".join(f"{g['name']} {g['mean']:+.3f}" for g in most)
