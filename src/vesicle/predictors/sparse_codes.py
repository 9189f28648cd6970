"""How often a dendritic segment mistakes a random sparse pattern for one of its own.

The counting argument of Ahmad and Hawkins 2016, "How do neurons operate on sparse distributed
representations?" (arXiv 1601.00720). Of n cells, a are active at a time; a segment has synapses
with s of them, and is active when at least theta of those cells are. A pattern drawn at random
overlaps in exactly b cells in

    C(s, b) C(n - s, a - b)

of the C(n, a) ways of drawing it, so that

    false match = sum over b from theta to min(s, a) of C(s, b) C(n - s, a - b) / C(n, a).

Counts are whole numbers, however large, and are divided once.
"""

from __future__ import annotations

import math
from fractions import Fraction


def overlap_count(n: int, a: int, s: int, b: int) -> int:
    """Patterns of a active among n cells that overlap in exactly b with s synapses.

    Raises:
        ValueError: If a or s is not from 0 to n, or b is below 0.
    """
    _check(n, a=a, s=s)
    if b < 0:
        raise ValueError(f"b is {b}; allowed: 0 and above")
    return math.comb(s, b) * math.comb(n - s, a - b) if b <= a else 0


def false_match(n: int, a: int, s: int, theta: int) -> float:
    """Probability that a random pattern of a among n cells reaches theta of s synapses.

    Raises:
        ValueError: As `overlap_count`, and if theta is below 0.
    """
    _check(n, a=a, s=s)
    if theta < 0:
        raise ValueError(f"theta is {theta}; allowed: 0 and above")
    matches = sum(overlap_count(n, a, s, b) for b in range(theta, min(s, a) + 1))
    return matches / math.comb(n, a)


def least_threshold(n: int, a: int, s: int, most: float) -> int:
    """The least theta whose probability of a false match is at most `most`.

    It is min(s, a) + 1, which no pattern reaches, where even a whole match is too likely.

    Raises:
        ValueError: As `overlap_count`, and if `most` is not from 0 to 1.
    """
    _check(n, a=a, s=s)
    if not 0 <= most <= 1:
        raise ValueError(f"most is {most}; allowed: 0 to 1")
    allowed = Fraction(most) * math.comb(n, a)
    matches = 0
    for theta in range(min(s, a), -1, -1):
        matches += overlap_count(n, a, s, theta)
        if matches > allowed:
            return theta + 1
    return 0


def union_false_match(n: int, a: int, patterns: int) -> float:
    """Probability that a random pattern lies wholly in the union of `patterns` others.

    (1 - (1 - a / n)^M)^a for M patterns: the share of cells in the union, once for each active
    cell. It takes those cells as independent, and so is close where a is far below n.

    Raises:
        ValueError: If a is not from 0 to n, n is 0, or `patterns` is below 0.
    """
    _check(n, a=a)
    if n == 0:
        raise ValueError("n is 0; allowed: 1 and above")
    if patterns < 0:
        raise ValueError(f"patterns is {patterns}; allowed: 0 and above")
    return float((1 - (1 - Fraction(a, n)) ** patterns) ** a)


def _check(n: int, **parts: int) -> None:
    for name, part in parts.items():
        if not 0 <= part <= n:
            raise ValueError(f"{name} is {part}; allowed: 0 to {n}")
