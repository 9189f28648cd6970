"""Duo-LLM (Alizadeh et al. 2024): big, small or no FFN for each token and layer.

A model is trained with random choices; oracles say what the best choices would have been; routers
learn to choose, and are compared with the oracles and with chance.
"""

from vesicle.duo.context import Context, Measured
from vesicle.duo.difficulty import (
    Group,
    by_class,
    by_frequency,
    by_position,
    difficulty_of,
    entropy,
    spearman,
)
from vesicle.duo.export import parted
from vesicle.duo.module import Choices, Chooser, DuoFeedForward, always, make_duo, table
from vesicle.duo.oracle import (
    THREE,
    TWO,
    Best,
    Oracle,
    all_patterns,
    exhaustive,
    expected_best,
    oracle_of,
)
from vesicle.duo.random_routing import RandomRouting, random_loss, token_losses
from vesicle.duo.router_training import Budgeted, budget_loss, focal, oracle_loss
from vesicle.duo.routers import DialRouter, ReadOutRouter, Router, routed, share_matched
from vesicle.duo.search import Found, beam, by_gains, greedy

__all__ = [
    "THREE",
    "TWO",
    "Best",
    "Budgeted",
    "Choices",
    "Chooser",
    "Context",
    "DialRouter",
    "DuoFeedForward",
    "Found",
    "Group",
    "Measured",
    "Oracle",
    "RandomRouting",
    "ReadOutRouter",
    "Router",
    "all_patterns",
    "always",
    "beam",
    "budget_loss",
    "by_class",
    "by_frequency",
    "by_gains",
    "by_position",
    "difficulty_of",
    "entropy",
    "exhaustive",
    "expected_best",
    "focal",
    "greedy",
    "make_duo",
    "oracle_loss",
    "oracle_of",
    "parted",
    "random_loss",
    "routed",
    "share_matched",
    "spearman",
    "table",
    "token_losses",
]
