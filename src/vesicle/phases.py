"""Phases: on which tokens each transmitter acts.

A sequence has tokens of two phases. *Prompt* tokens are read for what they leave in the cache, and
nobody asks what follows them; *generated* tokens are those at whose position the next token is
written or scored: the last token of a prompt, every token fed back, and in a log-likelihood every
position that predicts a scored token. A text that is scored whole has no prompt.

A transmitter that does not act on a token rests there: its level is 1, which is an exact no-op.
Where none acts nothing is predicted either, so a prompt is read as the dense model reads it.

By default prompts rest. Many tokens share one read of the weights there, so leaving out other
channels for each of them saves no time, and a prompt read in full leaves better keys and values
behind for the tokens that do save. What does save time, and where, is in `Phases.saving_time`.

The phase of a token depends on its position and on what was asked for, never on how a text was cut
into passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.transmitters import NAMES

PROMPT, GENERATED, ALL, NEVER = "prompt", "generated", "all", "never"
PLACES = (GENERATED, ALL, PROMPT, NEVER)
"""Where a transmitter may act."""

_SAVE_NO_TIME = {
    "avx2": ("dopamine", "serotonin"),
    "generic": ("dopamine", "serotonin"),
    "avx512 AuthenticAMD": ("dopamine", "serotonin"),
}
"""Transmitters of the shipped modulator that are not worth their loss in time, by instruction set,
or by instruction set and the processor's maker, which goes first.

Measured (docs/log.md): rows of codes that are left out lie one cache line each among those that are
read, so on AVX2, and on AMD's processors with AVX-512 (Zen 4), reading three quarters of them takes
as long as all; and a small FFN in 2 % of places costs 0.05 nats for 1 % of the time. Where
nothing was measured all of them act.
"""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Where each transmitter acts, each one of `PLACES`."""

    dopamine: str = GENERATED
    serotonin: str = GENERATED
    gaba: str = GENERATED
    acetylcholine: str = GENERATED
    noradrenaline: str = GENERATED

    def __post_init__(self) -> None:
        """Check.

        Raises:
            VesicleError: Naming the transmitter, the value and what is allowed.
        """
        for name, place in asdict(self).items():
            if place not in PLACES:
                raise VesicleError(f"phase of {name} is {place!r}; allowed: {', '.join(PLACES)}")

    @classmethod
    def everywhere(cls) -> Self:
        """Every transmitter acts on every token."""
        return cls(**dict.fromkeys(NAMES, ALL))

    @classmethod
    def saving_time(cls, instructions: str | None, maker: str | None = None) -> Self:
        """Where transmitters act if a lower budget is to save time, not only FLOPs.

        GABA acts on prompts too: tokens side by side choose much the same blocks, which are read
        once for all of them, so a long prompt is read in less time (docs/log.md).

        Args:
            instructions: Of the engine's kernels, as `engine.core.instructions` says; None where it
                has none.
            maker: Of the processor, as `processors.maker` says.
        """
        named = instructions or "generic"
        rest = _SAVE_NO_TIME.get(f"{named} {maker}", _SAVE_NO_TIME.get(named, ()))
        return cls(gaba=ALL, **dict.fromkeys(rest, NEVER))

    @classmethod
    def parse(cls, words: Iterable[str], default: Self | None = None) -> Self:
        """Read `PLACE` for all transmitters or `TRANSMITTER=PLACE` for one; later words win.

        Transmitters that no word is about act where `default` says, on generated tokens by default.

        Raises:
            VesicleError: Naming the word and what is allowed.
        """
        chosen = {} if default is None else default.to_dict()
        for word in words:
            name, separator, place = word.partition("=")
            names = NAMES if not separator else (name,)
            place = place if separator else name
            if place not in PLACES or names[0] not in NAMES:
                raise VesicleError(
                    f"phase is {word!r}; allowed: {', '.join(PLACES)}, or TRANSMITTER=PLACE with "
                    f"one of {', '.join(NAMES)}"
                )
            chosen.update(dict.fromkeys(names, place))
        return cls(**chosen)

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            VesicleError: For an unknown transmitter or place.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise VesicleError(f"unknown transmitter {name!r}; known: {', '.join(NAMES)}")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """Transmitter to place, as JSON writes it."""
        return asdict(self)

    def acting(self, prompt: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(T, 5) whether each transmitter acts on tokens that are prompt (T,)."""
        places = [getattr(self, name) for name in NAMES]
        on_prompt = np.array([place in (PROMPT, ALL) for place in places])
        on_generated = np.array([place in (GENERATED, ALL) for place in places])
        return np.where(prompt[:, None], on_prompt, on_generated)

    def ignores_phase(self, transmitters: Iterable[str] = NAMES) -> bool:
        """Whether all of these transmitters act on every token.

        A budget then counts all tokens; otherwise it is a share of the work on generated ones.
        """
        return all(getattr(self, name) == ALL for name in transmitters)

    def only(self, transmitter: str, transmitters: Sequence[str]) -> bool:
        """Whether of several transmitters, among which others are, this one alone ever acts."""
        acting = [name for name in transmitters if getattr(self, name) != NEVER]
        return acting == [transmitter] and len(transmitters) > 1


EVERYWHERE = Phases.everywhere()
GABA_ALONE = Phases(**{**dict.fromkeys(NAMES, NEVER), "gaba": ALL})


class Spans:
    """Which positions of a sequence are prompt: disjoint spans, in order.

    Spans are added as a sequence grows, so that phases of positions already computed never change.
    """

    def __init__(self) -> None:
        """Start without spans: every position is generated."""
        self._spans: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The spans, (first, one past the last)."""
        return iter(self._spans)

    def add(self, start: int, stop: int) -> None:
        """Positions `start` to `stop` are prompt; nothing if there are none."""
        if start >= stop:
            return
        if self._spans and self._spans[-1][1] >= start:
            first, last = self._spans.pop()
            start, stop = first, max(stop, last)
        self._spans.append((start, stop))

    @property
    def opening_prompt(self) -> int:
        """How many tokens the prompt has that a sequence begins with; 0 for none."""
        return self._spans[0][1] if self._spans and self._spans[0][0] == 0 else 0

    def contains(self, positions: NDArray[np.int32]) -> NDArray[np.bool_]:
        """(T,) which of `positions` (T,) are prompt."""
        found = np.zeros(len(positions), bool)
        for start, stop in self._spans:
            found |= (positions >= start) & (positions < stop)
        return found

    def opening(self, n_tokens: int) -> Spans:
        """A copy of what lies in the first `n_tokens` positions."""
        other = Spans()
        for start, stop in self._spans:
            other.add(start, min(stop, n_tokens))
        return other
