"""Eviction policies: two known rules of thumb for the cache, as controls for whoever learns one.

    method = HeavyHitters(512)
    engine.generate(prompt, method)

Both hold about `entries` entries in each layer and KV head, forget the others for good at every
`interval` tokens, in prompts and while writing, and leave everything else to another method. Until
the next time that they are asked, up to `interval` entries more are held.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.plan import (
    Author,
    Dense,
    Events,
    Evidence,
    FloatArray,
    Forgetter,
    Method,
    StandIns,
    all_but,
)
from vesicle.plan.forgetting import check_interval
from vesicle.shapes import ModelShape, Overhead

INTERVAL = 64


class Forgetful(Method):
    """Another method, with a forgetter."""

    def __init__(self, *, interval: int, inner: Method | None = None) -> None:
        """Forget entries every `interval` tokens, a multiple of 16.

        Args:
            interval: Tokens after which entries are forgotten.
            inner: Decides everything else; `Dense` by default.

        Raises:
            VesicleError: If `interval` is no multiple of 16, or `inner` no method.
        """
        check_interval(interval, type(self).__name__)
        if not isinstance(inner, Method | None):
            raise VesicleError(
                f"inner is a {type(inner).__name__}; allowed: a Method such as modulator.at(0.8)"
            )
        self.interval = interval
        self.inner = inner or Dense()

    @property
    def decider(self) -> Method:
        """The inner method's."""
        return self.inner.decider

    @property
    def stand_ins(self) -> StandIns:
        """The inner method's."""
        return self.inner.stand_ins

    def overhead(self, shape: ModelShape) -> Overhead:
        """The inner method's; what gathering evidence adds is known to whoever gathers it."""
        return self.inner.overhead(shape)

    def author(self, shape: ModelShape) -> Author:
        """The inner method's author, with a forgetter.

        Raises:
            VesicleError: If it has one already.
        """
        author = self.inner.author(shape)
        if author.forgetter is not None:
            raise VesicleError("the inner method has a forgetter already; one of the two may")
        author.forgetter = self.forgetter(shape)
        return author

    @abstractmethod
    def forgetter(self, shape: ModelShape) -> Forgetter:
        """A fresh forgetter for one sequence."""


class EvictionPolicy(Forgetful):
    """Holds about as many entries in each layer and KV head."""

    def __init__(self, entries: int, *, interval: int = INTERVAL, inner: Method | None = None):
        """Hold `entries` entries, rounded up to a multiple of 16.

        Args:
            entries: Of each layer and KV head.
            interval: Tokens after which entries are forgotten, a multiple of 16.
            inner: Decides everything else; `Dense` by default.

        Raises:
            VesicleError: As `Forgetful`, or if `entries` is no number from 1 on.
        """
        super().__init__(interval=interval, inner=inner)
        self.entries = _whole("entries", entries, 1)


class SinksAndRecent(EvictionPolicy):
    """The first entries and the newest stay (StreamingLLM, Xiao et al. 2023)."""

    def __init__(
        self,
        entries: int,
        *,
        sinks: int | None = None,
        interval: int = INTERVAL,
        inner: Method | None = None,
    ) -> None:
        """Hold the first `sinks` entries (4 by default) and, to make up `entries`, the newest.

        Raises:
            VesicleError: As `EvictionPolicy`, or if `sinks` is outside 0 to `entries`.
        """
        super().__init__(entries, interval=interval, inner=inner)
        self.sinks = _whole("sinks", min(4, entries) if sinks is None else sinks, 0, entries)

    def forgetter(self, shape: ModelShape) -> Forgetter:
        """Remembers nothing."""
        return _SinksAndRecent(self)


class _SinksAndRecent(Forgetter):
    def __init__(self, policy: SinksAndRecent) -> None:
        self._policy, self.interval = policy, policy.interval

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        policy, stays = self._policy, []
        for positions in evidence.positions:
            row = positions < policy.sinks
            row[max(0, len(positions) - (policy.entries - policy.sinks)) :] = True
            stays.append(row)
        return all_but(layer, length, evidence.positions, stays)

    def fork(self, n_tokens: int) -> Forgetter:
        return self


class HeavyHitters(EvictionPolicy):
    """The newest entries stay, and those that received most attention (H2O, Zhang et al. 2023)."""

    def __init__(
        self,
        entries: int,
        *,
        recent: int | None = None,
        interval: int = INTERVAL,
        inner: Method | None = None,
    ) -> None:
        """Hold the newest `recent` entries and, to make up `entries`, those of largest sums.

        Raises:
            VesicleError: As `EvictionPolicy`, or if `recent` is outside 0 to `entries`.
        """
        super().__init__(entries, interval=interval, inner=inner)
        self.recent = _whole("recent", entries // 2 if recent is None else recent, 0, entries)

    def forgetter(self, shape: ModelShape) -> Forgetter:
        """Remembers the sums of all attention that each entry has received."""
        nothing = np.zeros((shape.n_kv_heads, 0))
        return _HeavyHitters(self, [nothing] * shape.n_layers)


class _HeavyHitters(Forgetter):
    reads_attention = True

    def __init__(self, policy: HeavyHitters, sums: list[FloatArray]) -> None:
        self._policy, self.interval = policy, policy.interval
        self._sums = sums  # of each layer, (G, tokens read) by position

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        held, sums = evidence.positions, self._sums[layer]
        if sums.shape[1] < length:  # unless it is asked again
            sums = np.pad(sums, ((0, 0), (0, length - sums.shape[1])))
            for row, positions, received in zip(sums, held, evidence.received, strict=True):
                row[positions] += received
            self._sums[layer] = sums
        rows = zip(sums, held, strict=True)
        stays = [self._stays(row[positions]) for row, positions in rows]
        return all_but(layer, length, held, stays)

    def _stays(self, sums: FloatArray) -> NDArray[np.bool_]:
        """(n,) of the entries that have received these sums (n,)."""
        policy = self._policy
        old = max(0, len(sums) - policy.recent)
        stays = np.ones(len(sums), bool)
        stays[:old] = False
        order = np.argsort(-sums[:old], kind="stable")
        stays[order[: policy.entries - policy.recent]] = True
        return stays

    def fork(self, n_tokens: int) -> Forgetter:
        return _HeavyHitters(self._policy, [sums.copy() for sums in self._sums])


def _whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number in bounds.

    Raises:
        VesicleError: If it is none.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"{least} and above" if most is None else f"{least} to {most}"
        raise VesicleError(f"{name} is {value!r}; allowed: {allowed}")
    return int(value)  # type: ignore[call-overload]
