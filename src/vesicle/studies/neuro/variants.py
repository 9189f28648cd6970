"""Variants: what is trained and compared, each one file of `variants/`.

All go on from the same dense decoder with equal texts, steps and optimizer. A file tells what
differs from the whole mechanism, in the fields of `Variant`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from vesicle.errors import VesicleError
from vesicle.transmitters import index

GROUPS = ("whole", "baseline", "transmitters", "release", "predictor", "training", "hybrid")
TUNES = ("all", "none")
LABELS = ("text", "distillation", "both")
SUPERVISED = ("", "cross-entropy", "margin")
ESTIMATORS = ("straight-through", "soft", "policy")
SMALL = ("maps", "ffns", "nothing")
_NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to spend less.

    Attributes:
        name: Of its file.
        group: One of `GROUPS`: the table that it stands in.
        says: What it is, in a line.
        source: The paper that it is from, if any.
        transmitters: Released.
        predictor: Kind of the predictor; `none` releases the dial everywhere.
        layers_alone: Whether levels depend on layer and dial alone: read-outs are not trained.
        budgets: Least and greatest that are asked for in training; equal: not conditioned on them.
        tune: What is trained beside the predictor: `all` of the decoder, or `none` of it.
        labels: What the output is held to: the `text`, `distillation` from the dense decoder, or
            `both`.
        supervised: By which loss read-outs are told what each token needs (`neuro.needs`), in place
            of learning it from the output: `cross-entropy` or the squared `margin`; not if empty.
        estimator: How levels learn: `straight-through`, `soft` masks that harden, or `policy`
            gradients over a group of perturbed levels.
        attention: A fixed pattern of attention, local and strided, in place of dense attention: its
            `block` and `columns`.
        tiles: Share of dense attention's reads for which tiles of unlike sizes are learnt (ATT), in
            place of dense attention; 0 for none.
        small: What tokens without the big FFN take: `maps` of low rank, `ffns` of an eighth of its
            hidden units (Duo-LLM), or `nothing`, neither in place of attention.
    """

    name: str
    group: str
    says: str
    source: str = ""
    transmitters: tuple[str, ...] = ("dopamine", "serotonin", "gaba")
    predictor: str = "linear"
    layers_alone: bool = False
    budgets: tuple[float, float] = (0.5, 1.1)
    tune: str = "all"
    labels: str = "text"
    supervised: str = ""
    estimator: str = "straight-through"
    attention: dict[str, int] | None = None
    tiles: float = 0.0
    small: str = "maps"

    def __post_init__(self) -> None:
        """Check names and ranges.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
        """
        from vesicle.predictors import BASELINES, TRAINED

        kinds = (_NONE, *TRAINED)
        for name, allowed in (
            ("group", GROUPS),
            ("tune", TUNES),
            ("labels", LABELS),
            ("supervised", SUPERVISED),
            ("estimator", ESTIMATORS),
            ("small", SMALL),
            ("predictor", kinds),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        for transmitter in self.transmitters:
            index(transmitter)
        if self.predictor in BASELINES and self.transmitters != ("serotonin",):
            raise ValueError(
                f"transmitters are {', '.join(self.transmitters)}; {self.predictor!r} releases "
                "serotonin alone"
            )
        if self.attention is not None and set(self.attention) != {"block", "columns"}:
            raise ValueError(
                f"attention has {', '.join(sorted(self.attention))}; allowed: block and columns"
            )
        low, high = self.budgets
        if not 0 < low <= high:
            raise ValueError(f"budgets are {self.budgets}; allowed: above 0, rising")
        if not 0 <= self.tiles < 1:
            raise ValueError(f"tiles is {self.tiles}; allowed: 0 up to 1")

    @property
    def modulated(self) -> bool:
        """Whether it has a dial at all."""
        return bool(self.transmitters)

    @property
    def facts(self) -> dict[str, Any]:
        """All that its training depends on, as JSON has it."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in told.items() if name not in ("group", "says")}


@cache
def variants() -> dict[str, Variant]:
    """All of them by name, as the files have them: group by group, each in alphabetical order.

    Raises:
        VesicleError: A file is malformed.
    """
    found = []
    for file in (resources.files(__package__) / "variants").iterdir():
        if file.name.endswith(".json"):
            found.append(_read(file.name.removesuffix(".json"), file.read_text("utf-8")))
    found.sort(key=lambda v: (GROUPS.index(v.group), v.name))
    return {v.name: v for v in found}


def of_group(*groups: str) -> list[Variant]:
    """Variants of some groups."""
    return [v for v in variants().values() if v.group in groups]


def _read(name: str, text: str) -> Variant:
    known = sorted({f.name for f in fields(Variant)} - {"name"})
    try:
        values = json.loads(text)
        if unknown := sorted(set(values) - set(known)):
            raise VesicleError(f"{name}: unknown field {unknown[0]!r}; known: {', '.join(known)}")
        for field in ("transmitters", "budgets"):
            if field in values:
                values[field] = tuple(values[field])
        return Variant(name=name, **values)
    except (TypeError, ValueError) as error:
        raise VesicleError(f"{name}: {error}") from error
