"""A profile by ablation: a KV head's part is what is lost where it alone forgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vesicle.evolution.contexts import Context
from vesicle.namm import Namm

_FLOOR = 0.01
"""Of the largest loss: what is gained by chance, or lost by too little to be told from it."""


def by_ablation(
    start: Namm,
    contexts: Sequence[Context],
    most_excess: float,
    wait: Callable[[str], None] = lambda note: None,
) -> Namm:
    """A NAMM whose profile is the logarithm of what contexts lose where a head alone forgets.

    Args:
        start: Whose network it has, with room for a profile.
        contexts: By whose answers losses are measured; weighed by their weights.
        most_excess: Nats a token beyond which more does not count.
        wait: Takes a note of which context it is at.
    """
    lost = np.zeros(start.profile.shape)
    for n, context in enumerate(contexts):
        wait(f"each KV head alone, context {n + 1} of {len(contexts)}")
        excess = np.minimum(context.excess_without(start), most_excess)
        lost += context.question.weight * excess / len(contexts)
    floor = max(_FLOOR * float(lost.max()), 1e-6)
    return replace(start, profile=np.log(np.maximum(lost, floor)).astype(np.float32))
