"""Intervals of what is computed from all sentences at once: they are drawn again, in chunks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.neurons.claims import Estimate

Drawn = Callable[[Tensor], NDArray[np.float64]]
"""Gives values (V,) of some chunks, by their numbers (C,)."""


def resample(values_of: Drawn, n_chunks: int, draws: int) -> list[Estimate]:
    """Estimates of V values, with 95 % intervals over chunks drawn with replacement.

    A value that depends on how much text there is differs from the middle of its draws, which hold
    each chunk less than once. Intervals are moved by that difference, to lie about the value.

    Args:
        values_of: Computes them.
        n_chunks: C.
        draws: How often chunks are drawn.
    """
    whole = values_of(torch.arange(n_chunks))
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [
            values_of(torch.from_numpy(rng.integers(0, n_chunks, n_chunks)))
            for _ in range(max(1, draws))
        ]
    )
    low, middle, high = np.quantile(drawn, [0.025, 0.5, 0.975], axis=0)
    return [
        Estimate(mean=float(v), low=float(v + a - m), high=float(v + b - m), n=n_chunks)
        for v, a, m, b in zip(whole, low, middle, high, strict=True)
    ]
