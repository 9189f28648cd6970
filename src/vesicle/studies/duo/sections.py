"""The report's page, section by section, from tables."""

from __future__ import annotations

from typing import Any

from vesicle.studies.duo import tables
from vesicle.studies.duo.routers import KINDS
from vesicle.studies.estimates import Row, told
from vesicle.studies.page import Page
from vesicle.studies.paint import bars, heat, lines

_SHADES = ((1.0, "s1"), (0.3, "s4"), (0.01, "s16"))
"""Nats from which on a token has a shade, the strongest first."""


def page(found: dict[str, Any], drawn: Row) -> str:
    """The page.

    Args:
        found: All tables.
        drawn: A text, in pieces, and their difficulty.
    """
    made = Page("Duo-LLM, measured")
    made.say(
        f"Scale: {found['scale']}. In every layer a token takes a big FFN or a small one. Decoders "
        "trained from scratch with random choices; losses in nats a token, on test texts that "
        "neither training nor any choice of a number, pattern or lean has seen. Intervals are of "
        "95 %, over texts; differences are paired by text and seed."
    )
    made.heading("Claims")
    for row in found["claims"]:
        _claim(made, row)
    _decoders(made, found["decoders"])
    _oracles(made, found, "Oracles and chance")
    if "three" in found:
        _oracles(made, found["three"], "Oracles that may skip FFNs too")
    _searches(made, found)
    _routers(made, found["executed"])
    _probes(made, found["probes"])
    _difficulty(made, found["difficulty"], drawn)
    return made.html()


def _claim(made: Page, row: Row) -> None:
    made.heading(f"({row['letter']}) {row['claim']}", 3)
    made.say(
        f"Here: {row['verdict']}. Measured is the {row['what']}: {told(row['measured'])}; the "
        f"claim asks for what lies {row['wanted']}."
    )
    if row["against"]:
        made.say("But " + "; and ".join(row["against"]) + ".")
    if row["controls"]:
        made.table(
            ["control", "measured", f"{row['wanted']}?"],
            [[c["control"], told(c["measured"]), c["says"]] for c in row["controls"]],
        )


def _decoders(made: Page, rows: list[Row]) -> None:
    made.heading("Decoders")
    made.table(
        ["seed", "parameters", "tokens seen", "first loss", "last loss"],
        [
            [
                str(seed),
                f"{r['parameters']:,}",
                f"{r['tokens']:,}",
                f"{r['first_loss']:.3f}",
                f"{r['last_loss']:.3f}",
            ]
            for seed, r in enumerate(rows)
        ],
    )


def _oracles(made: Page, found: dict[str, Any], title: str) -> None:
    made.heading(title)
    made.say(
        "A token takes a pattern while all tokens before it are all big. The oracle takes the best "
        "of all patterns with so many big FFNs, token by token, by the label; without labels, the "
        "nearest to the output of all big. The best of N random patterns is lucky too, and places "
        "nothing. Labels that are drawn from the all-big output cannot be known better than by "
        "it, so what an oracle gains on them is luck alone."
    )
    rows = found["curves"]
    numbers = sorted({r["n_big"] for r in rows})
    made.table(
        ["loss, by number of big FFNs", *map(str, numbers)],
        [
            [what, *(f"{r['loss']:.4f}" for r in rows if r["choice"] == name)]
            for name, what in tables.CURVES.items()
        ],
    )
    made.table(
        ["above all big", *map(str, numbers)],
        [
            [what, *(told(r["above_all_big"]) for r in rows if r["choice"] == name)]
            for name, what in tables.CURVES.items()
        ],
    )
    curves = {
        what: [(r["n_big"], r["loss"]) for r in rows if r["choice"] == name]
        for name, what in tables.CURVES.items()
    }
    made.draw(
        "Loss against the number of big FFNs.", lines(curves, "big FFNs of a token", "nats a token")
    )
    for name, what in (("labelled", "oracle"), ("unlabelled", "oracle without labels")):
        made.draw(
            f"Which layers the {what} takes: share of tokens, by number of big FFNs.",
            heat(found["layers"][name], "layer", "big FFNs of a token"),
        )


def _searches(made: Page, found: dict[str, Any]) -> None:
    made.heading("Finding the best pattern")
    made.say(
        "Searches that try few patterns, above the exhaustive one: mean over numbers of big FFNs, "
        "and at the worst of them, in nats."
    )
    made.table(
        ["search", "patterns tried", "of", "above, mean", "at worst"],
        [
            [
                f"{r['search']}, by {r['cost']}",
                str(r["evaluated"]),
                str(r["of"]),
                told(r["above"]),
                f"{r['worst']:.4f}",
            ]
            for r in found["searches"]
        ],
    )
    speed = found["speed"]
    made.say(
        f"Seconds for all {speed['patterns']:,} patterns of the {speed['tokens']} tokens of a "
        f"text, on {speed['threads']} threads of {speed['machine']}. Whole passes, in which all "
        "tokens take one pattern, answer another question."
    )
    made.table(
        ["way", "seconds", "measured for", ""],
        [
            [
                r["way"],
                f"{r['whole_s']:,.2f}",
                f"{r['measured_s']:.2f} s",
                "extrapolated" if r["extrapolated"] else "",
            ]
            for r in speed["rows"]
        ],
    )
    apart = ", ".join(f"{way} {nats:.1e}" for way, nats in speed["apart"].items())
    made.say(f"Largest difference from the tree's losses, in nats: {apart}.")


def _routers(made: Page, rows: list[Row]) -> None:
    made.heading("Routers, as they are executed")
    made.say(
        "All tokens take their choices at once. A random pattern has as many big FFNs for each "
        "token; a router's shuffled choices are its own, given to other tokens of the text. In "
        "context, all earlier tokens are all big. Agreement is the share of choices that are the "
        "oracle's, and in brackets that of the shuffled choices."
    )
    made.table(["router", "what it is"], list(KINDS.items()))
    n_layers = max(r["n_big"] for r in rows)  # where all are big
    for n_big in sorted({r["n_big"] for r in rows if "above_random" in r}):
        own = [r for r in rows if r["n_big"] == n_big or "above_random" not in r]
        made.heading(f"{n_big} of {n_layers} FFNs big", 3)
        made.table(
            ["", "share", "loss", "in context", "above all big", "above random", "above shuffled"],
            [
                [
                    r["who"],
                    f"{r['share']:.3f}",
                    f"{r['loss']:.4f}",
                    f"{r['context_loss']:.4f}",
                    *(
                        told(r[key]) if key in r else ""
                        for key in ("above_all_big", "above_random", "above_shuffled")
                    ),
                ]
                for r in own
            ],
        )
        agreed = [r for r in own if "agreement" in r]
        made.table(
            ["agreement", *agreed[0]["agreement"]],
            [
                [r["who"], *(f"{a:.3f} ({b:.3f})" for a, b in r["agreement"].values())]
                for r in agreed
            ],
        )


def _probes(made: Page, rows: list[Row]) -> None:
    made.heading("What of the oracle's choices can be known")
    made.say(
        "Probes that predict the oracle's choice in a layer. Unknown is what remains, in nats a "
        "choice, if one knows how often each layer is big; gain is what a probe takes off that, on "
        "test texts. Earlier choices are those of the same oracle: they tell what is spent, and "
        "with labels something of the label."
    )
    made.table(
        ["oracle, big FFNs, told", "unknown", "gain", "right", "right by frequency"],
        [
            [
                f"{tables.CURVES[r['oracle']]}, {r['n_big']}, {r['inputs']}",
                f"{r['unknown']:.4f}",
                told(r["gain"]),
                f"{100 * r['accuracy']:.1f} %",
                f"{100 * r['frequency_accuracy']:.1f} %",
            ]
            for r in rows
        ],
    )
    by_layer = {
        f"{tables.CURVES[r['oracle']]}, {r['n_big']}, {r['inputs']}": list(
            enumerate(r["gain_by_layer"])
        )
        for r in rows
        if r["inputs"] != "input and earlier choices"
    }
    made.draw("Gain by layer.", lines(by_layer, "layer", "nats a choice"))


def _difficulty(made: Page, found: Row, drawn: Row) -> None:
    made.heading("Difficulty")
    made.say(
        "Difficulty is what the best pattern gains on small FFNs alone, in nats, by the label: "
        f"{told(found['mean'])} a token; by labels drawn from the all-big output, "
        f"{told(found['drawn_mean'])}. Less than 0.01 nats gain {_percent(found['idle'])} of the "
        f"tokens; by all big instead, {_percent(found['idle_without_choice'])}."
    )
    places = {
        "difficulty": [(n, r["mean"]["mean"]) for n, r in enumerate(found["by_position"], 1)],
        "loss, all small": [(n, r["small"]) for n, r in enumerate(found["by_position"], 1)],
    }
    made.draw("By position in the text.", lines(places, "tenth of the text", "nats a token"))
    made.table(
        ["fifth of tokens, rare to frequent", "tokens", "difficulty"],
        [[r["name"], str(r["tokens"]), f"{r['mean']:.3f}"] for r in found["by_frequency"]],
    )
    made.table(
        ["class of the predicted token", "tokens", "difficulty", "loss, all small"],
        [
            [r["name"], str(r["tokens"]), f"{r['mean']:.3f}", f"{r['small']:.3f}"]
            for r in found["by_class"]
        ],
    )
    made.draw("By class.", bars({r["name"]: r["mean"] for r in found["by_class"]}, "nats a token"))
    made.table(
        ["difficulty goes with", "rank correlation", "by seed"],
        [
            [name, f"{r['mean']:+.3f}", ", ".join(f"{v:+.3f}" for v in r["by_seed"])]
            for name, r in found["correlations"].items()
        ],
    )
    made.say(
        "A test text: the stronger the ground of a token, the more difficult it is to predict; "
        "steps at 0.01, 0.3 and 1 nat."
    )
    made.text(drawn["pieces"], [shade(nats) for nats in drawn["difficulty"]])


def _percent(found: Row) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['mean']:.1f} % ({low:.1f} to {high:.1f})"


def shade(nats: float) -> str:
    """The class of the page's style for a difficulty."""
    return next((name for least, name in _SHADES if nats >= least), "")
