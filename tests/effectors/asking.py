"""What an effector decides, asked one decision at a time."""

from dataclasses import replace

import numpy as np

from tests.tiny import SHAPE
from vesicle.effectors import Effector
from vesicle.effectors.rules import Share
from vesicle.plan import FloatArray, IntArray

SCREENED = replace(SHAPE, weight_bytes=4, stored_bits=4, head_bits=8, vocabulary=97)


def decided(
    effector: Effector,
    level: FloatArray,
    field: str,
    column: int = 0,
    *,
    width: int | None = None,
    visible: IntArray | None = None,
) -> IntArray:
    """(N,) one number of a row, for levels (N,) of tokens that see `visible` (N,) blocks."""
    rules = {(rule.field, rule.column): rule for rule in effector.rules(SCREENED)}
    rule = rules[field, column]
    if width is not None and isinstance(rule, Share):
        rule = replace(rule, width=width)
    return rule.values(level, np.ones(len(level), np.int32) if visible is None else visible)
