"""What Duo-LLM claims, and whether it holds here: computed from the records, control by control.

The claims are the paper's in our words; its own models, texts and budgets are larger.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vesicle.studies.duo.difficulty import GAINS, HARD
from vesicle.studies.duo.tables import points
from vesicle.studies.duo.verdicts import claim, control
from vesicle.studies.estimates import (
    FAILS,
    HOLDS,
    Records,
    Row,
    by_seed,
    compared,
    estimate,
)

_FEW = 0.01
"""Share of tokens that is more than none."""


def claims(records: Records, budgets: tuple[int, ...]) -> list[Row]:
    """All of them, in the order of their letters."""
    return [
        one_big(records),
        best_budget(records),
        late_first(records),
        *(router_is_chance(records, n_big) for n_big in budgets),
        idle_tokens(records),
        late_positions(records),
    ]


def one_big(records: Records) -> Row:
    """(a) One big FFN, well placed, is better than all."""
    found = points(records)
    done, big = (found[key] for key in (("oracle", 1), ("all big", _n_layers(records))))
    both = compared(*([row["text_losses"] for row in rows] for rows in (done, big)))
    executed = control(
        "the oracle's choices taken by all tokens at once",
        both,
        -1,
        FAILS,
        "it is not there once all tokens take their choices",
    )
    return claim(
        "a",
        "With one big FFN a token, chosen by the oracle, the loss is lower than with all big.",
        "loss of the oracle with 1 big FFN, less all big",
        _above_big(records, "labelled", 1),
        -1,
        [*_chosen_otherwise(records, 1), executed],
    )


def best_budget(records: Records) -> Row:
    """(b) The oracle's best number of big FFNs is less than all."""
    on_valid = np.mean([r["valid_labelled"] for r in by_seed(records, "oracle")], 0)
    n_big = int(on_valid.argmin())
    whole = n_big == _n_layers(records)
    return claim(
        "b",
        "The oracle's loss is least with fewer than all FFNs big.",
        f"loss of the oracle with {n_big} big FFNs, its best number on validation texts, less all",
        _above_big(records, "labelled", n_big),
        -1,
        [] if whole else _chosen_otherwise(records, n_big),
        says=FAILS if whole else None,
    )


def late_first(records: Records) -> Row:
    """(c) Where little is big, it is late."""
    seeds = by_seed(records, "oracle")
    n_layers = _n_layers(records)
    depth = np.linspace(-1, 1, n_layers)

    def depths(name: str, n_big: int) -> Row:
        taken = np.array([r["layers"][name] for r in seeds])[:, :, n_big]  # (S, N, L)
        return estimate(taken @ depth / n_big)

    singles = estimate([[depth[layer] for layer in r["best_layer"]] for r in seeds])
    controls = [
        control(
            "the same, chosen without the label",
            depths("unlabelled", 1),
            1,
            FAILS,
            "chosen without the label, layers are not late",
        ),
        control(
            "the layer that serves all tokens of a text best",
            singles,
            1,
            FAILS,
            "the layer that serves a whole text best is not late",
        ),
    ]
    if n_layers > 2:
        controls.append(control("with 2 big FFNs", depths("labelled", 2), 1))
    return claim(
        "c",
        "Where few FFNs are big, the oracle takes those of late layers.",
        "depth of the one big FFN, from -1 (first layer) to 1 (last); 0 is even",
        depths("labelled", 1),
        1,
        controls,
    )


def router_is_chance(records: Records, n_big: int) -> Row:
    """(d) The trained router is no better than the best of 100 random patterns."""
    found = points(records)
    router = found["router: read-out", n_big]
    curve = [_curve(records, name, n_big) for name in ("random 100", "unlabelled")]
    context = [row["context_losses"] for row in router]
    losses = [row["text_losses"] for row in router]

    def beside(name: str) -> Row:
        return compared(losses, [row["text_losses"] for row in found[name, n_big]])

    controls = [
        control(
            "the oracle without labels instead of the router",
            compared(curve[1], curve[0]),
            1,
            HOLDS,
            "the oracle without labels loses to them too, so the label is what they win by",
        ),
        control(
            "against one pattern for all, best of 100 on validation texts, executed",
            beside("fixed of 100"),
            1,
            FAILS,
            "it is not worse than the best of 100 that are chosen on other texts",
        ),
        control(
            "against its own choices, shuffled over tokens", beside("router: read-out, shuffled"), 1
        ),
        control("against a random pattern for each token", beside("random"), 1),
    ]
    return claim(
        "d",
        f"With {n_big} of {_n_layers(records)} FFNs big, the trained router is no better than the "
        "best of 100 random patterns for each token.",
        "loss of the read-out router's choices, less the best of 100 by the label",
        compared(context, curve[0]),
        1,
        controls,
    )


def idle_tokens(records: Records) -> Row:
    """(e) Some tokens do not gain, whatever is computed."""
    seeds = by_seed(records, "difficulty")

    def above(key: str) -> Row | None:
        shares = np.array([r[key] for r in seeds], dtype=float)
        return None if np.isnan(shares).all() else estimate(shares - _FEW)

    controls = []
    hard, plain = above("idle_if_hard"), above("idle_without_choice")
    if hard is not None:
        controls.append(
            control(
                f"of the tokens that small FFNs miss by over {HARD:g} nat",
                hard,
                1,
                FAILS,
                "nearly all tokens that are missed by much gain, so the others are known anyway",
            )
        )
    assert plain is not None
    controls.append(control("by all big instead of the best pattern", plain, 1))
    measured = above("idle")
    assert measured is not None
    return claim(
        "e",
        "Some tokens do not gain, whatever is computed.",
        f"share of tokens that gain less than {GAINS:g} nats by their best pattern, less {_FEW:g}",
        measured,
        1,
        controls,
    )


def late_positions(records: Records) -> Row:
    """(e) Late positions gain less."""
    seeds = by_seed(records, "difficulty")

    def last_less_first(key: str) -> Row:
        return estimate([[t[-1]["mean"] - t[0]["mean"] for t in r[key]] for r in seeds])

    return claim(
        "e",
        "Late positions of a text gain less than early ones.",
        "difficulty in the last tenth of texts, less the first, in nats",
        last_less_first("by_position"),
        -1,
        [
            control(
                "the loss with small FFNs, in the same tenths",
                last_less_first("small_by_position"),
                -1,
                HOLDS,
                "the loss itself falls along texts, and with it what could be gained",
            )
        ],
    )


def _chosen_otherwise(records: Records, n_big: int) -> list[Row]:
    """Controls of what the oracle gains on all big, at one number of big FFNs."""
    found = {
        name: _above_big(records, name, n_big)
        for name in ("labelled", "unlabelled", "drawn", "random 10", "random 100", "fixed")
    }

    def part(name: str) -> str:
        whole = found["labelled"]["mean"]
        return f"{100 * found[name]['mean'] / whole:.0f} % of it" if whole else "as much"

    return [
        control(
            "the same, chosen without the label",
            found["unlabelled"],
            -1,
            FAILS,
            "chosen without the label, it is not there",
        ),
        control(
            "the oracle of labels drawn from the all-big output, less all big on the same labels",
            found["drawn"],
            -1,
            HOLDS,
            f"labels drawn from the all-big output, where all is luck, give {part('drawn')}",
        ),
        control(
            "the best of 10 random patterns, by the label",
            found["random 10"],
            -1,
            HOLDS,
            f"the best of 10 random patterns by the label has {part('random 10')}",
        ),
        control("the best of 100 random patterns, by the label", found["random 100"], -1),
        control(
            "one pattern for all, best on validation texts",
            found["fixed"],
            -1,
            FAILS,
            "no pattern for all has it",
        ),
        control("a random pattern", _above_big(records, "random 1", n_big), -1),
    ]


def _curve(records: Records, name: str, n_big: int) -> Any:
    """(seeds, texts) losses in the oracle's context."""
    return [
        [text[n_big] for text in record["curves"][name]] for record in by_seed(records, "oracle")
    ]


def _above_big(records: Records, name: str, n_big: int) -> Row:
    """Loss of one curve above that of all big, by the same labels."""
    rest = "drawn" if name == "drawn" else "labelled"
    big = _curve(records, rest, _n_layers(records))
    return compared(_curve(records, name, n_big), big)


def _n_layers(records: Records) -> int:
    return len(by_seed(records, "oracle")[0]["fixed_patterns"]) - 1
