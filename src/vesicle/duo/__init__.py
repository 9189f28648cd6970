"""Duo-LLM (Alizadeh et al. 2024): big, small or no FFN for each token and layer.

A model is trained with random choices; oracles say what the best choices would have been; routers
learn to choose, and are compared with the oracles and with chance.
"""

from vesicle.duo.compared import Compared, Point, compare, executed_share, replaced
from vesicle.duo.context import Context, Measured
from vesicle.duo.deep import SEARCHES, DeepOracle, deep_oracle, fixed_patterns
from vesicle.duo.difficulty import (
    Group,
    by_class,
    by_frequency,
    by_position,
    difficulty_of,
    entropy,
    spearman,
)
from vesicle.duo.distillation import Distillation, distil, relative_errors
from vesicle.duo.error_router import ErrorRouter, fit_error_router
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
from vesicle.duo.pretrained import StandsIn, make_duo_of
from vesicle.duo.random_routing import RandomRouting, random_loss, token_losses
from vesicle.duo.reevaluation import Reevaluated, by_chance, reevaluate, unsure
from vesicle.duo.router_training import Budgeted, budget_loss, focal, oracle_loss
from vesicle.duo.routers import DialRouter, ReadOutRouter, Router, routed, share_matched
from vesicle.duo.saved import load_small_ffns, save_small_ffns
from vesicle.duo.search import MOST_LAYERS, Found, beam, by_gains, greedy
from vesicle.duo.untrained import OwnFfns, importance, jacobian, nested, own_ffns

__all__ = [
    "MOST_LAYERS",
    "SEARCHES",
    "THREE",
    "TWO",
    "Best",
    "Budgeted",
    "Choices",
    "Chooser",
    "Compared",
    "Context",
    "DeepOracle",
    "DialRouter",
    "Distillation",
    "DuoFeedForward",
    "ErrorRouter",
    "Found",
    "Group",
    "Measured",
    "Oracle",
    "OwnFfns",
    "Point",
    "RandomRouting",
    "ReadOutRouter",
    "Reevaluated",
    "Router",
    "StandsIn",
    "all_patterns",
    "always",
    "beam",
    "budget_loss",
    "by_chance",
    "by_class",
    "by_frequency",
    "by_gains",
    "by_position",
    "compare",
    "deep_oracle",
    "difficulty_of",
    "distil",
    "entropy",
    "executed_share",
    "exhaustive",
    "expected_best",
    "fit_error_router",
    "fixed_patterns",
    "focal",
    "greedy",
    "importance",
    "jacobian",
    "load_small_ffns",
    "make_duo",
    "make_duo_of",
    "nested",
    "oracle_loss",
    "oracle_of",
    "own_ffns",
    "parted",
    "random_loss",
    "reevaluate",
    "relative_errors",
    "replaced",
    "routed",
    "save_small_ffns",
    "share_matched",
    "spearman",
    "table",
    "token_losses",
    "unsure",
]
