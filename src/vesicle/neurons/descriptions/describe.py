"""Describes neurons by mutual information, and judges the descriptions on held-out contexts.

A neuron is described by the side, highest or lowest activations, on which it is stronger. Contexts
that it is described by and contexts that it is judged on are of different windows. Beside its own
description stand, on the same contexts: those of other neurons (*shuffled*: the next ones in order,
of the same layer or one near it), a *random* candidate of its own that was not chosen, and the
*token* at which it fires most often.

Each neuron is kept as it is done, so that a run that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vesicle.errors import DataError
from vesicle.models import Text
from vesicle.neurons.contexts import Contexts, collect
from vesicle.neurons.decoding.readout import Readout
from vesicle.neurons.descriptions import candidates
from vesicle.neurons.descriptions.detection import LexicalDetector
from vesicle.neurons.descriptions.mutual_information import Judge, Scorer, mutual_information
from vesicle.neurons.descriptions.report import DETECTORS, Report, judged, summary
from vesicle.neurons.descriptions.settings import DescribeSettings
from vesicle.neurons.descriptions.spots import Spot, spots_at
from vesicle.neurons.finished import Finished
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.shapes import ModelShape

_DRAWN = 256
"""Random contexts that candidates are compared with."""
_QUOTED = 3
"""Contexts that are shown of each neuron."""

Show = Callable[[int, str], None]
"""Told how many steps are done, and a note."""


def drawn_neurons(
    shape: ModelShape, count: int, seed: int, without: Sequence[Neuron] = ()
) -> list[Neuron]:
    """Neurons drawn from all of a model, in order.

    Args:
        shape: Of the model.
        count: How many.
        seed: Of the draw.
        without: Those that are not to be drawn.

    Raises:
        DataError: There are not as many.
    """
    total = shape.n_layers * shape.ffn_width
    if not 1 <= count <= total - len(without):
        raise DataError(f"count is {count}; allowed: 1 to {total - len(without)}")
    order = np.random.default_rng(seed).permutation(total).tolist()
    found = [Neuron(*divmod(number, shape.ffn_width)) for number in order]
    return sorted([neuron for neuron in found if neuron not in without][:count])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose neurons are described, and who describes them.

    Attributes:
        hooked: The dense model.
        text: Its text side.
        judge: Scores descriptions; the model itself if none.
    """

    hooked: Hooked
    text: Text
    judge: Judge | None = None


def pool_of(
    neurons: Sequence[Neuron], shape: ModelShape, settings: DescribeSettings
) -> list[Neuron]:
    """The neurons, and if they are too few to be shuffled, others drawn for that."""
    wanted = sorted(set(neurons))
    missing = settings.shuffled + 1 - len(wanted)
    more = drawn_neurons(shape, missing, settings.seed, wanted) if missing > 0 else []
    return [*wanted, *more]


def describe(
    subject: Subject,
    windows: Tensor,
    held_out: Tensor,
    neurons: Sequence[Neuron],
    settings: DescribeSettings,
    out: Path,
    *,
    show: Show | None = None,
) -> Report:
    """Describe neurons, and judge the descriptions.

    Args:
        subject: Whose.
        windows: (N, T) token ids that contexts are looked for in.
        held_out: (M, T) others, for the contexts that descriptions are judged on.
        neurons: Which.
        settings: How.
        out: Folder that keeps what is done, and `report.json`.
        show: Told how many steps are done: a window, a description and a judgement are one each.

    Raises:
        DataError: There are no neurons, or windows are too few or of another vocabulary.
        VesicleError: The folder holds another run, or cannot be written.
    """
    if not neurons:
        raise DataError("there are no neurons to describe; allowed: one and more")
    wanted, steps = sorted(set(neurons)), _Steps(show)
    pool = pool_of(wanted, subject.hooked.shape, settings)
    drawn = min(_DRAWN, len(windows) * (windows.shape[1] - settings.skip))
    found = collect(
        subject.hooked,
        windows,
        settings.of_contexts(max(1, drawn)),
        out / "contexts",
        show=steps.beyond(0),
    )
    steps.done = len(windows)
    held = collect(
        subject.hooked,
        held_out,
        settings.of_contexts(settings.random),
        out / "held_out",
        show=steps.beyond(steps.done),
    )
    steps.done += len(held_out)
    facts = {
        "model": found.facts["of"],
        "contexts": found.facts["windows"],
        "held_out": held.facts["windows"],
        "neurons": [str(neuron) for neuron in wanted],
        "settings": asdict(settings),
    }
    finished, work = Finished(out, facts), _Work(subject, found, held, settings)
    described: dict[Neuron, dict[str, Any]] = {}
    for neuron in pool:
        make = partial(work.described, neuron)
        described[neuron] = finished.values(f"descriptions/{neuron}", make)
        steps.take(str(neuron))
    rows = []
    for place, neuron in enumerate(wanted):
        others = [pool[(place + 1 + i) % len(pool)] for i in range(settings.shuffled)]
        texts = [described[other]["description"] for other in others]
        make = partial(work.detected, neuron, described[neuron], texts)
        detection = finished.values(f"detection/{neuron}", make)
        rows.append({**described[neuron], "detection": detection})
        steps.take(str(neuron))
    report = Report(settings=facts, neurons=rows, summary=summary(rows))
    report.save(out / "report.json")
    return report


class _Work:
    """What is done for one neuron."""

    def __init__(
        self, subject: Subject, found: Contexts, held: Contexts, settings: DescribeSettings
    ) -> None:
        self.subject, self.found, self.held, self.settings = subject, found, held, settings
        self.model, self.text = subject.hooked.model, subject.text
        self.judge: Judge = subject.judge or Scorer(self.model, self.text)
        self.lexical = LexicalDetector(self.model, self.text)
        self.readout = Readout(self.model)
        self.low, self.share = found.stronger_low(), found.share_above()
        self.others = self._spots(found, found.drawn_places)
        self.random = self._spots(held, held.drawn_places)

    def described(self, neuron: Neuron) -> dict[str, Any]:
        """A neuron's description, and what it was chosen from."""
        at, limits = (neuron.layer, neuron.index), self.settings.limits
        low = bool(self.low[at])
        spots = self._own(self.found, neuron, low=low)
        choices = candidates.distinct(
            [
                *candidates.of_contexts(spots, self.others, limits),
                *candidates.decoded(self.readout, self.text, neuron, low=low, limits=limits),
                *candidates.written(self.model, self.text, spots, limits),
            ]
        )
        texts = [candidate.text for candidate in choices]
        given = self.judge.given(spots[: self.settings.scored], texts)
        scores = mutual_information(given, self.judge.alone(texts), self.settings.weight)
        best = scores.argsort(descending=True, stable=True).tolist()
        values = self.found.extremes(low=low)[0][at]
        return {
            "neuron": str(neuron),
            "side": "low" if low else "high",
            "description": texts[best[0]],
            "kind": choices[best[0]].kind,
            "pmi": round(float(scores[best[0]]), 4),
            "candidates": [
                {"text": texts[i], "kind": choices[i].kind, "pmi": round(float(scores[i]), 4)}
                for i in best
            ],
            "token": candidates.best_token(spots),
            "strongest": round(float(values[0]), 4),
            "share_above_half": round(float(self.share[at]), 6),
            "contexts": [f"{spot.before[-60:]}[{spot.token}]" for spot in spots[:_QUOTED]],
        }

    def detected(
        self, neuron: Neuron, own: dict[str, Any], others: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """How well a description tells held-out contexts of its neuron, by detector."""
        low = own["side"] == "low"
        spots = self._own(self.held, neuron, low=low)
        texts = [candidate["text"] for candidate in own["candidates"]]
        rng = np.random.default_rng((self.settings.seed, neuron.layer, neuron.index))
        # Where there is one candidate alone, it stands for itself.
        chance = texts[int(rng.integers(1, len(texts)))] if len(texts) > 1 else texts[0]
        asked = {
            "own": [own["description"]],
            "shuffled": list(others),
            "random": [chance],
            "token": [own["token"]],
        }
        every = list(dict.fromkeys(text for each in asked.values() for text in each))
        both = [*spots, *self.random]
        # Less log p(d), which orders no contexts.
        given = dict(zip(every, self.judge.given(both, every).T, strict=True))
        alike = {text: self.lexical.scores(both, text) for text in every}
        return {
            detector: judged(
                {name: [scores[text] for text in each] for name, each in asked.items()}, len(spots)
            )
            for detector, scores in zip(DETECTORS, (given, alike), strict=True)
        }

    def _own(self, contexts: Contexts, neuron: Neuron, *, low: bool) -> list[Spot]:
        """Where the neuron is strongest, the strongest first."""
        return self._spots(contexts, contexts.extremes(low=low)[1][neuron.layer, neuron.index])

    def _spots(self, contexts: Contexts, places: Tensor) -> list[Spot]:
        return spots_at(self.text, contexts.tokens, places.tolist(), self.settings.shown)


class _Steps:
    """Counts steps of several parts, and tells them."""

    def __init__(self, show: Show | None) -> None:
        self.show, self.done = show, 0

    def take(self, note: str) -> None:
        self.done += 1
        if self.show is not None:
            self.show(self.done, note)

    def beyond(self, before: int) -> Show:
        """Tells the steps of a part that has its own count."""

        def told(step: int, note: str) -> None:
            if self.show is not None:
                self.show(before + step, note)

        return told
