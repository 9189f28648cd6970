"""A NAMM at work: it forgets entries of the cache as a text goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.eviction import Forgetful
from vesicle.namm.allotment import allot
from vesicle.namm.gates import gate_scores
from vesicle.namm.model import Namm, NammSettings
from vesicle.namm.spectrogram import Averages
from vesicle.plan import Events, Evidence, Forgetter, IntArray, Method, all_but
from vesicle.shapes import ModelShape


class NammMemory(Forgetful):
    """Another method, with a NAMM that decides which entries stay."""

    def __init__(
        self,
        namm: Namm,
        *,
        memory: float | None = None,
        interval: int | None = None,
        protects: Sequence[tuple[int, int]] = (),
        inner: Method | None = None,
    ) -> None:
        """Forget by a NAMM's scores.

        Args:
            namm: Which one.
            memory: Share of all entries to hold, of a prompt's at its end, above 0 and up to 1: of
                each KV head's, those of highest scores, as many as its part allows. None, the
                default, keeps those whose score is not below 0, however many they are.
            interval: Tokens after which entries are forgotten; the NAMM's own by default.
            protects: Spans of positions, each from its first to before its last, that stay whatever
                their scores, in every KV head and within the share: instructions, a system turn.
            inner: Decides everything else; `Dense` by default.

        Raises:
            VesicleError: If `memory` is outside (0, 1], `interval` is below what the NAMM observes
                or no multiple of 16, a span is none, or `inner` no method.
        """
        if memory is not None and not 0 < memory <= 1:
            raise VesicleError(f"memory is {memory}; allowed: above 0 and up to 1")
        interval = namm.settings.interval if interval is None else interval
        super().__init__(interval=interval, inner=inner)
        if interval < namm.settings.observes:
            raise VesicleError(
                f"interval is {interval}; allowed: {namm.settings.observes} and above, the queries "
                "that the NAMM observes"
            )
        for first, stop in protects:
            if not 0 <= first < stop:
                raise VesicleError(
                    f"a protected span is {first} to {stop}; allowed: rising, from 0 on"
                )
        self.namm, self.memory, self.protects = namm, memory, tuple(protects)

    def protected(self, positions: IntArray, length: int) -> NDArray[np.bool_]:
        """(n,) which entries stay whatever their scores."""
        return protected(self.namm.settings, positions, length) | self._spanned(positions)

    def n_protected(self, length: int) -> int:
        """How many entries of a KV head that are after `length` tokens."""
        return int(self.protected(np.arange(length, dtype=np.int32), length).sum())

    def check_room(self, length: int) -> None:
        """Refuse spans that a prompt of `length` tokens has no room for.

        Raises:
            VesicleError: Naming how many entries they are, and how many may be held.
        """
        if self.memory is None or length < self.interval:  # nothing is forgotten before
            return
        n = int(self._spanned(np.arange(length, dtype=np.int32)).sum())
        most = int(self.memory * length)
        if n > most:
            raise VesicleError(
                f"{n} entries are to be protected, and {self.memory:g} of a prompt of {length} "
                f"tokens is {most}; protect less, or hold more"
            )

    def _spanned(self, positions: IntArray) -> NDArray[np.bool_]:
        stays = np.zeros(positions.shape, bool)
        for first, stop in self.protects:
            stays |= (positions >= first) & (positions < stop)
        return stays

    def forgetter(self, shape: ModelShape) -> Forgetter:
        """Remembers averages of what entries received.

        Raises:
            VesicleError: If the NAMM has a profile or gates of another model's heads.
        """
        self.namm.check_fits(shape)
        averages = [[Averages() for _ in range(shape.n_kv_heads)] for _ in range(shape.n_layers)]
        gated = [np.zeros((shape.n_kv_heads, 0), np.float32)] * shape.n_layers
        return _NammForgetter(self, shape, averages, gated)


class _NammForgetter(Forgetter):
    def __init__(
        self,
        method: NammMemory,
        shape: ModelShape,
        averages: list[list[Averages]],
        gated: list[NDArray[np.float32]],
    ) -> None:
        namm = method.namm
        self.interval = method.interval
        self.observes = namm.settings.observes if namm.sees_attention else 0
        self.reads_entries = bool(namm.gates.size)
        self._method, self._shape = method, shape
        self._averages = [[a.fork() for a in heads] for heads in averages]
        # (G, T) of each layer, by position. Arrays are replaced, never written.
        self._gated = list(gated)
        self._profile = namm.profile_of(shape)
        self._forgets = np.nonzero(shape.layer_windows == 0)[0]
        self._stop = 0  # of the prompt
        self._counts: dict[
            int, NDArray[np.int64]
        ] = {}  # (layers, G) at the length asked about last

    def prompt(self, start: int, stop: int) -> None:
        # Its share of a prompt's end is held from the beginning: the peak is the same, and layers
        # that are to hold all of it lose nothing on the way.
        self._stop = max(self._stop, stop)
        self._method.check_room(self._stop)

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        namm, stays = self._method.namm, []
        if self.reads_entries:
            self._see(layer, length, evidence)
        for head, positions in enumerate(evidence.positions):
            scores = np.zeros(positions.shape, np.float32)
            if self.observes:
                averages = self._averages[layer][head]
                spectral = averages.update(positions, evidence.attention[head], length)
                scores = namm.scores(spectral, positions, length)
            if self.reads_entries:
                found = self._gated[layer][head, positions]
                scores = scores + namm.gated(layer, head, found, positions, length)
            always = self._method.protected(positions, length)
            if self._method.memory is None:
                stays.append(always | (scores + self._profile[layer, head] >= 0))
            else:
                stays.append(best(scores, always, self._allotted(layer, length)[head]))
        return all_but(layer, length, evidence.positions, stays)

    def _see(self, layer: int, length: int, evidence: Evidence) -> None:
        """Score the entries of a layer that are new to it."""
        before = self._gated[layer]
        known = np.zeros((len(before), length), np.float32)
        known[:, : before.shape[1]] = before[:, :length]
        new = gate_scores(self._method.namm.gates[layer], evidence.keys, evidence.values)
        for row, positions, scores in zip(known, evidence.positions, new, strict=True):
            row[positions[len(positions) - len(scores) :]] = scores
        self._gated[layer] = known

    def fork(self, n_tokens: int) -> Forgetter:
        fork = _NammForgetter(self._method, self._shape, self._averages, self._gated)
        fork._stop = self._stop
        return fork

    def _allotted(self, layer: int, length: int) -> list[int]:
        """(G,) entries that KV heads of a layer may hold now."""
        if length not in self._counts:  # layers are asked about one after another
            memory = self._method.memory
            assert memory is not None
            entries, least = memory * max(length, self._stop), self._method.n_protected(length)
            profile = self._profile[self._forgets]
            counts = allot(profile.ravel(), entries, length, least)
            self._counts = {length: np.array(counts).reshape(profile.shape)}
        row: list[int] = self._counts[length][np.searchsorted(self._forgets, layer)].tolist()
        return row


def protected(settings: NammSettings, positions: IntArray, length: int) -> NDArray[np.bool_]:
    """(..., n) which entries stay whatever their scores."""
    return (positions < settings.sinks) | (positions >= length - settings.recent)


def best(scores: NDArray[np.floating], always: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """(n_entries,) which `n` entries of a KV head stay: the protected, then by score.

    Of equal scores the newer one stays.
    """
    held = len(scores)
    if n >= held:
        return np.ones(held, bool)
    if n <= 0:
        return np.zeros(held, bool)
    ranked = np.where(always, np.inf, scores)
    least = np.partition(ranked, held - n)[held - n]
    stays: NDArray[np.bool_] = ranked > least
    equal = np.nonzero(ranked == least)[0]
    stays[equal[len(equal) - (n - int(stays.sum())) :]] = True
    return stays
