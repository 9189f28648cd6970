"""Lower precision of the attacked model, as dopamine sets it: constant levels, no one's choice.

Two things are lowered, each by itself:

    budget b  input channels: one level in all layers and at all tokens, at which the model
              executes a share b of its dense FLOPs (the control `uniform` of an evaluation)
    bits n    weights: the n leading bits of a nested 8-bit store, all channels

As with any level, the first layer's attention rests; embeddings, norms and the LM head are not
lowered by either. Meeus et al. 2024 lower the precision of all of a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from vesicle.cost import price
from vesicle.effectors import DopaminePrecision
from vesicle.effectors.dopamine_precision import BITS
from vesicle.errors import BudgetError, VesicleError
from vesicle.evaluation.execution.executor import Span
from vesicle.evaluation.execution.language_modelling import model_shape
from vesicle.evaluation.methods.controls import uniform
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.modulator import Modulator
from vesicle.plan import Method, Plan
from vesicle.shapes import FULL_BITS
from vesicle.transmitters import NAMES

SHARES = ("level", "flops_share", "weight_share")
"""Fields of `Lowered` that reports have."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How precisely the attacked model computes.

    Attributes:
        budget: Share of the dense FLOPs, in (0, 1], that leaving out input channels comes to.
        bits: Of weights; 16 for the stored ones.
    """

    budget: float = 1.0
    bits: int = FULL_BITS

    def __post_init__(self) -> None:
        """Check.

        Raises:
            BudgetError: If the budget is out of range.
            VesicleError: If the bits are none that a store has, or both are lowered.
        """
        if not 0 < self.budget <= 1:
            raise BudgetError(f"budget is {self.budget:g}; allowed: above 0, up to 1")
        if self.bits not in BITS:
            raise VesicleError(f"bits is {self.bits}; allowed: {', '.join(map(str, BITS))}")
        if self.budget < 1 and self.bits < FULL_BITS:
            raise VesicleError(
                f"budget is {self.budget:g} and bits {self.bits}; allowed: one of them lowered"
            )

    @property
    def name(self) -> str:
        """Such as `full`, `budget-0.8` or `bits-4`."""
        if self.bits < FULL_BITS:
            return f"bits-{self.bits}"
        return "full" if self.budget == 1 else f"budget-{self.budget:g}"


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model's precision, and what it comes to.

    Attributes:
        method: Who decides so; None where nothing is lowered.
        level: Dopamine's, in all layers but the first attention.
        flops_share: Of the dense model's FLOPs, over a window.
        weight_share: Of the bytes of its weights read, as 16-bit numbers, likewise.
    """

    method: Method | None
    level: float = 1.0
    flops_share: float = 1.0
    weight_share: float = 1.0


def lowered(precision: Precision, model: nn.Module, n_tokens: int) -> Lowered:
    """The method by which a model computes so.

    Args:
        precision: How precisely.
        model: A causal LM; of any family, if nothing is lowered.
        n_tokens: Of a window.

    Raises:
        BudgetError: If leaving out channels cannot reach the budget.
        ModelError: If the model's family is not supported.
    """
    if precision == Precision():
        return Lowered(method=None)
    shape = model_shape(model)
    few = precision.bits < FULL_BITS
    effector = (
        DopaminePrecision(site_rates=(0.0,) * 4, bits_ladder=((0.0, precision.bits),))
        if few
        else DopaminePrecision()
    )
    modulator = Modulator.new(
        shape,
        transmitters=("dopamine",),
        effectors={"dopamine": effector},
        ffn_rank=1,
        attention_rank=1,
    )
    ledger = Ledger(modulator, shape, [[Span(0, n_tokens, 0)]])
    if few:
        # Below rest the ladder has one step, so that any level is that of its bits.
        deficits = np.ones((shape.n_layers, 1))
        method: Method = ledger.method(ledger.table(deficits))
    else:
        found = uniform(ledger, precision.budget)
        assert isinstance(found.method, Method)  # one for all sequences
        method, deficits = found.method, np.asarray(found.deficits)
    levels = np.ones((n_tokens, shape.n_layers, len(NAMES)))
    levels[..., ledger.columns] = 1 - deficits
    halves = replace(shape, weight_bytes=2)
    dense = price(Plan.rest(halves, n_tokens), halves)
    ratio = price(ledger.plan(levels), halves, method.overhead(halves)).ratio(dense)
    return Lowered(
        method=method,
        level=float(1 - deficits.mean()),
        flops_share=ratio["flops"],
        weight_share=ratio["weight_bytes"],
    )
