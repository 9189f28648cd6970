"""Small FFNs of a pretrained model beside other kinds of small module, and a page of it.

Kinds, the maps with as many weights as the small FFNs where the model is wide enough:

- *distilled*: what `vesicle.duo.distil` made;
- *nested*: where it started from, the model's own hidden units that matter most;
- *low-rank*: ridge regression of the output on the input, cut to a rank;
- *Jacobian*: the FFN's mean slope, cut to a rank;
- *low-rank 32*: what modulators have by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vesicle.calibration import fit_standins
from vesicle.duo import Compared, OwnFfns, compare, jacobian, nested, relative_errors
from vesicle.intervals import interval
from vesicle.shapes import ModelShape
from vesicle.small_modules import LowRankMaps, SmallFfn, SmallModule
from vesicle.studies.page import Page

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7)
"""Of the dense FLOPs, at which kinds are told beside each other."""
DEFAULT_RANK = 32


def kinds_of(
    model: nn.Module, own: OwnFfns, matters: Tensor, small: SmallFfn, windows: Tensor
) -> dict[str, SmallModule]:
    """All kinds, those that are fitted on windows (N, T)."""
    n_layers, width, _ = own.ffn_in.shape
    rank = min(width, small.weights // (2 * width))
    kinds: dict[str, SmallModule] = {
        "distilled": small,
        "nested": nested(own, matters, small.units),
    }
    for name, r in {"low-rank": rank, f"low-rank {DEFAULT_RANK}": DEFAULT_RANK}.items():
        maps = LowRankMaps(n_layers, width, min(width, r))
        fit_standins(model, windows, maps, LowRankMaps(n_layers, width, 1))
        kinds[name] = maps
    kinds["Jacobian"] = jacobian(model, own, windows.split(4), rank)
    return kinds


def counts(n_layers: int) -> tuple[int, ...]:
    """Numbers of layers with small FFNs that are tried: about ten, up to all."""
    return tuple(sorted({max(1, round(n_layers * n / 10)) for n in range(1, 11)}))


def compare_kinds(
    model: nn.Module,
    windows: Tensor,
    shape: ModelShape,
    kinds: Mapping[str, SmallModule],
    *,
    show: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """All that is told of kinds, as JSON, on windows (N, T) that none was fitted to."""
    errors = relative_errors(model, windows, dict(kinds))
    found = compare(model, windows, shape, kinds, counts(shape.n_layers), show=show)
    return {
        "schema": "vesicle-small-ffns-compared-1",
        "windows": list(windows.shape),
        "kinds": [
            {
                "kind": name,
                "weights": small.weights,
                "of_ffn": small.weights / (shape.width * shape.ffn_width * (2 + shape.gated)),
                "error": float(np.mean(errors[name])),
                "errors": [round(e, 5) for e in errors[name]],
                "alone": [round(r, 5) for r in found[name].alone],
                "points": _points(found[name]),
                "at": {str(share): _rounded(found[name].at(share)) for share in SHARES},
            }
            for name, small in kinds.items()
        ],
    }


def _points(found: Compared) -> list[dict[str, Any]]:
    return [
        {
            "layers": list(p.layers),
            "flops": round(p.flops, 5),
            "rise": round(p.rise, 5),
            "interval": [round(v, 5) for v in interval(np.array(p.rises))],
        }
        for p in found.points
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of the table, its head first."""
    head = ["kind", "weights of the FFN's", "error", *(f"at {share}" for share in SHARES)]
    told = [
        [
            row["kind"],
            f"{row['of_ffn']:.1%}",
            f"{row['error']:.3f}",
            *("" if v is None else f"{v:+.3f}" for v in row["at"].values()),
        ]
        for row in found["kinds"]
    ]
    return [head, *told]


def table(found: dict[str, Any]) -> Table:
    """For a terminal."""
    from rich.table import Table

    head, *body = rows(found)
    shown = Table(*head, title="Rise of the loss in nats, by executed share of FLOPs", box=None)
    for row in body:
        shown.add_row(*row)
    return shown


def page(found: dict[str, Any]) -> str:
    """The page."""
    made = Page("Small FFNs, compared")
    n, length = found["windows"]
    made.say(
        f"The loss of the model on {n} windows of {length} tokens that nothing was fitted to, in "
        "nats a token above the dense model, where the FFNs of some layers are small for all "
        "tokens. Layers are added in the order of what each costs alone. The error is the squared "
        "error of a layer's output over the squared output, weighted as the next norm sees it; "
        "skipping outright would give 1. Between two numbers of layers losses are interpolated."
    )
    head, *body = rows(found)
    made.table(head, body)
    names = [row["kind"] for row in found["kinds"]]
    curves = {
        row["kind"]: [(p["flops"], p["rise"]) for p in row["points"]] for row in found["kinds"]
    }
    made.draw("Rise of the loss.", _lines(curves, "executed share of FLOPs", "nats a token"))
    for key, what in (("errors", "Error"), ("alone", "Rise of the loss, one layer alone")):
        by_layer = {row["kind"]: list(enumerate(row[key])) for row in found["kinds"]}
        made.draw(f"{what}, by layer.", _lines(by_layer, "layer", what.split(",")[0].lower()))
    made.table(
        ["layers with small FFNs", *names],
        [
            [
                str(len(points[0]["layers"])),
                *(
                    f"{p['rise']:+.3f} ({p['interval'][0]:+.3f} to {p['interval'][1]:+.3f})"
                    for p in points
                ),
            ]
            for points in zip(*(row["points"] for row in found["kinds"]), strict=True)
        ],
    )
    return made.html()


def _lines(
    curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str
) -> Callable[[Any], None]:
    from vesicle.studies.paint import lines

    inner = lines(curves, across, up)

    def paint(axes: Any) -> None:
        inner(axes)
        axes.set_yscale("symlog", linthresh=0.05)

    return paint
