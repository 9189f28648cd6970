"""A modulator at one position of its dial: the Method that is served for a budget."""

from __future__ import annotations

import reprlib
from dataclasses import replace

from vesicle.errors import VesicleError
from vesicle.modulator.author import ModulatorAuthor
from vesicle.modulator.modulator import Modulator
from vesicle.phases import Phases
from vesicle.plan import Method, StandIns
from vesicle.predictors import Predictor
from vesicle.reading import Reading
from vesicle.shapes import ModelShape, Overhead


class ModulatorMethod(Method):
    """A modulator at one position of its dial.

    Attributes:
        modulator: The modulator.
        dial: In (0, 1]; 1 is rest.
        phases: On which tokens each transmitter acts.
        reading: What bounds the cached entries that any token reads, whatever acts on it; or None.
    """

    def __init__(
        self,
        modulator: Modulator,
        dial: float,
        phases: Phases | None = None,
        reading: Reading | None = None,
    ) -> None:
        """Serve `dial` in (0, 1] on the tokens that `phases` tells, within a `reading`."""
        self.modulator = modulator
        self.dial = dial
        self.phases = phases or Phases()
        self.reading = reading

    @property
    def at_rest(self) -> bool:
        """Whether every level is 1 by construction, so that nothing need be predicted."""
        return self.dial >= 1 and isinstance(self.modulator.predictor, Predictor)

    def overhead(self, shape: ModelShape) -> Overhead:
        """What the modulator adds to the model's own work."""
        modulator = self.modulator
        if self.at_rest:
            return Overhead() if self.reading is None else self.reading.overhead(shape)
        return replace(
            super().overhead(shape),
            modulator_flops=modulator.predictor.flops,
            modulator_bytes=modulator.predictor.weights_read * 4,
        )

    @property
    def counts_prompt(self) -> bool:
        """Whether a budget is a share of the work on all tokens, not on generated ones alone."""
        return self.phases.ignores_phase(self.modulator.predictor.config.transmitters)

    @property
    def stand_ins(self) -> StandIns:
        """The modulator's stand-ins and block summary; a reading deals out what heads read."""
        if self.reading is None:
            return self.modulator.stand_ins
        dealt = self.reading.stand_ins
        return replace(
            self.modulator.stand_ins,
            summary=dealt.summary,
            spread=dealt.spread,
            nearest=dealt.nearest,
        )

    def author(self, shape: ModelShape) -> ModulatorAuthor:
        """An author for one new sequence on a model of `shape`, without state or levels yet."""
        self.modulator.check_fits(shape)
        return ModulatorAuthor(self, shape)


def served(
    method: Method | Modulator | None, budget: float | None, phases: Phases | None
) -> Method | None:
    """What a caller asked for: a method as it is, or a modulator at a budget and in its phases.

    Raises:
        VesicleError: If the budget is out of range, or it or phases are given to a method; or if
            one of them is none.
    """
    if not isinstance(method, Method | Modulator | None):
        raise VesicleError(
            f"method is {reprlib.repr(method)}; allowed: a Modulator, a Method such as "
            "modulator.at(0.8), or None for the dense model"
        )
    if not isinstance(phases, Phases | None):
        raise VesicleError(f"phases is {reprlib.repr(phases)}; allowed: vesicle.Phases(...)")
    if isinstance(method, Modulator):
        return method.at(budget, phases)
    for name, value in (("budget", budget), ("phases", phases)):
        if value is not None:
            there = (
                "there is no modulator: give one, such as vesicle.load_default_modulator()"
                if method is None
                else f"method is {type(method).__name__}, which has its own"
            )
            raise VesicleError(
                f"{name} is {reprlib.repr(value)}, which applies to a modulator, and {there}"
            )
    return method
