"""CMA-ES over the numbers of a NAMM that are to be evolved.

Which numbers, and how far apart candidates begin, is said here; the search is the `cmaes` package's
(Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, arXiv:1604.00772). Its covariance is whole
for few numbers and diagonal (Ros and Hansen 2008) for many.

Candidates follow from the seed and from the losses told before, so that a search is taken up again
by telling it the same losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vesicle.evolution.config import EvolveConfig
from vesicle.namm.model import Namm
from vesicle.namm.networks import spread_of

_WHOLE = 256
"""Numbers up to which the covariance is whole: beyond, its decomposition takes seconds."""
FloatArray = NDArray[np.float64]


class Search:
    """Candidates, generation by generation."""

    def __init__(self, start: Namm, config: EvolveConfig) -> None:
        """Begin at a NAMM."""
        import cmaes

        self._start, settings = start, start.settings
        network = config.evolves != "profile"
        profile = config.evolves != "network"
        spread = spread_of(settings.network, settings.n_features, settings.hidden)
        parts = [(start.parameters, spread)] if network else []
        flat = start.profile.ravel()
        parts += [(flat, np.ones(len(flat), np.float32))] if profile else []
        mean = np.concatenate([values / scale for values, scale in parts]).astype(np.float64)
        self._spread = np.concatenate([scale for _, scale in parts])
        self._n_network = len(start.parameters) if network else 0
        kind = cmaes.CMA if len(mean) <= _WHOLE else cmaes.SepCMA
        self._cma = kind(
            mean=mean, sigma=config.sigma, seed=config.seed, population_size=config.population
        )
        self._asked: list[FloatArray] = []

    @property
    def n_numbers(self) -> int:
        """That are evolved."""
        return len(self._spread)

    def ask(self) -> list[Namm]:
        """The candidates of the next generation."""
        self._asked = [self._cma.ask() for _ in range(self._cma.population_size)]
        return [self._namm(vector) for vector in self._asked]

    def tell(self, losses: Sequence[float]) -> None:
        """Their losses, in their order."""
        self._cma.tell(list(zip(self._asked, losses, strict=True)))

    @property
    def mean(self) -> Namm:
        """Where the search stands."""
        return self._namm(self._cma.mean)

    def _namm(self, vector: FloatArray) -> Namm:
        values = (vector * self._spread).astype(np.float32)
        n, start = self._n_network, self._start
        return replace(
            start,
            parameters=values[:n] if n else start.parameters,
            profile=values[n:].reshape(start.profile.shape) if n < len(values) else start.profile,
        )
