"""A NAMM at work: it forgets entries of the cache as a text goes on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.eviction import Forgetful
from vesicle.namm.allotment import allot
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
        inner: Method | None = None,
    ) -> None:
        """Forget by a NAMM's scores.

        Args:
            namm: Which one.
            memory: Share of all entries to hold, of a prompt's at its end, above 0 and up to 1: of
                each layer's, those of highest scores, as many as its part allows. None, the
                default, keeps those whose score is not below 0, however many they are.
            interval: Tokens after which entries are forgotten; the NAMM's own by default.
            inner: Decides everything else; `Dense` by default.

        Raises:
            VesicleError: If `memory` is outside (0, 1], `interval` is below what the NAMM observes
                or no multiple of 16, or `inner` no method.
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
        self.namm, self.memory = namm, memory

    def forgetter(self, shape: ModelShape) -> Forgetter:
        """Remembers averages of what entries received.

        Raises:
            VesicleError: If the NAMM has a profile of another model's layers.
        """
        return _NammForgetter(self, shape, [Averages(shape.n_kv_heads)] * shape.n_layers)


class _NammForgetter(Forgetter):
    def __init__(self, method: NammMemory, shape: ModelShape, averages: list[Averages]) -> None:
        self.interval = method.interval
        # A network that prefers nothing need not see anything.
        self._sees = bool(method.namm.parameters.any())
        self.observes = method.namm.settings.observes if self._sees else 0
        self._method, self._shape = method, shape
        self._averages = [a.fork() for a in averages]
        self._profile = method.namm.layer_profile(shape.n_layers)
        self._forgets = np.nonzero(shape.layer_windows == 0)[0]
        self._stop = 0  # of the prompt
        self._counts: dict[int, list[int]] = {}  # at the length of the last layer asked about

    def prompt(self, start: int, stop: int) -> None:
        # Its share of a prompt's end is held from the beginning: the peak is the same, and layers
        # that are to hold all of it lose nothing on the way.
        self._stop = max(self._stop, stop)

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        namm, positions = self._method.namm, evidence.positions
        scores = np.zeros(positions.shape, np.float32)
        if self._sees:
            spectral = self._averages[layer].update(positions, evidence.attention, length)
            scores = namm.scores(spectral, positions, length)
        always = protected(namm.settings, positions, length)
        if self._method.memory is None:
            stays = always | (scores + self._profile[layer] >= 0)
        else:
            stays = best(scores, always, self._allotted(layer, length))
        return all_but(layer, length, positions, stays)

    def fork(self, n_tokens: int) -> Forgetter:
        fork = _NammForgetter(self._method, self._shape, self._averages)
        fork._stop = self._stop
        return fork

    def _allotted(self, layer: int, length: int) -> int:
        """Entries that a layer may hold now."""
        if length not in self._counts:  # layers are asked about one after another
            settings, memory = self._method.namm.settings, self._method.memory
            assert memory is not None
            entries, least = memory * max(length, self._stop), settings.sinks + settings.recent
            counts = allot(self._profile[self._forgets], entries, length, least)
            self._counts = {length: counts}
        return self._counts[length][int(np.searchsorted(self._forgets, layer))]


def protected(settings: NammSettings, positions: IntArray, length: int) -> NDArray[np.bool_]:
    """(G, n) which entries stay whatever their scores."""
    return (positions < settings.sinks) | (positions >= length - settings.recent)


def best(scores: NDArray[np.floating], always: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """(G, n_entries) which `n` entries of each KV head stay: the protected, then by score.

    Of equal scores the newer one stays.
    """
    held = scores.shape[1]
    ranked = np.where(always, np.inf, scores)
    order = held - 1 - np.argsort(-ranked[:, ::-1], axis=1, kind="stable")
    stays = np.zeros(scores.shape, bool)
    np.put_along_axis(stays, order[:, : min(n, held)], True, axis=1)
    return stays
