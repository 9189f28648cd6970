"""A profile by ablation: a KV head's part is what is lost where it alone forgets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vesicle.namm import Namm

_FLOOR = 0.01
"""Of the largest loss: what is gained by chance, or lost by too little to be told from it."""


def by_ablation(start: Namm, lost: NDArray[np.float64]) -> Namm:
    """A NAMM whose profile is the logarithm of what is lost where a head alone forgets.

    Args:
        start: Whose network it has, with room for a profile.
        lost: (L, G) nats a token.
    """
    floor = max(_FLOOR * float(lost.max()), 1e-6)
    return replace(start, profile=np.log(np.maximum(lost, floor)).astype(np.float32))
