"""How many entries each KV head may hold, of a memory that all heads of all layers share.

Heads need it unequally: in the default model two or three find a pass key, and the other eighty-odd
read what is near. A *profile* has one number for each head, the logarithm of its part; parts are
held between what every head must have and all that there is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import BLOCK


def allot(profile: NDArray[np.floating], entries: float, length: int, least: int) -> list[int]:
    """Entries that KV heads hold after `length` tokens, in whole blocks.

    Args:
        profile: (N,) of the heads that forget.
        entries: A head's, on average; they are not more in all but where `least` asks for it.
        length: Tokens read.
        least: Entries that every head holds, whatever the others need.

    Returns:
        (N,) multiples of 16; `least` and `length` are rounded up to them.
    """
    most = -(-length // BLOCK) * BLOCK
    least = min(most, -(-least // BLOCK) * BLOCK)
    budget = entries * len(profile)
    parts = np.exp(np.clip(profile - np.max(profile), -30, 0))  # the largest is 1
    low, high = 0.0, most / parts.min()
    for _ in range(60):
        middle = (low + high) / 2
        inside = np.clip(middle * parts, least, most).sum() <= budget
        low, high = (middle, high) if inside else (low, middle)
    whole = np.clip(low * parts, least, most)
    counts = np.maximum(least, whole // BLOCK * BLOCK).astype(int)
    # What rounding left over goes to those that lost most by it.
    left = int(budget - counts.sum()) // BLOCK
    for head in np.argsort(counts - whole, kind="stable").tolist():
        if left > 0 and counts[head] < most:
            counts[head] += BLOCK
            left -= 1
    return [int(count) for count in counts]
