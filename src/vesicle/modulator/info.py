"""What a modulator knows about itself: the model that it is for, its dial, how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vesicle.errors import VesicleError


def check_budget(budget: float) -> float:
    """The budget, if it is in (0, 1].

    Raises:
        VesicleError: If it is not.
    """
    if isinstance(budget, bool | str) or not 0 < budget <= 1:
        raise VesicleError(f"budget is {budget!r}; allowed: above 0, up to 1")
    return float(budget)


Dial = list[tuple[float, float]]
"""(budget, dial) pairs, rising, ending at (1, 1)."""


@dataclass(kw_only=True)
class Measured:
    """What was measured of generated tokens.

    Attributes:
        dial: As `ModulatorInfo.dial`, of the work on generated tokens.
        default_budget: As `ModulatorInfo.default_budget`, of the loss of generated tokens.
    """

    dial: Dial
    default_budget: float = 1.0


@dataclass(kw_only=True)
class ModulatorInfo:
    """What a modulator knows about itself.

    Attributes:
        model_name: The model that it was trained on.
        model: `ModelShape.fingerprint()` of that model.
        dial: (budget, dial) pairs, rising, ending at (1, 1), where every token is governed.
        default_budget: Lowest budget whose measured loss is within 1 % of dense, where every token
            is governed; 1 until measured.
        generated: The same two where prompts rest; None until measured, and then the others serve.
        gaba_alone: The same two where GABA alone acts, in long texts; None until measured, and then
            the others serve.
        training: Free-form record of how it was trained and measured.
    """

    model_name: str
    model: dict[str, Any]
    dial: Dial = field(default_factory=lambda: [(0.05, 0.05), (1.0, 1.0)])
    default_budget: float = 1.0
    generated: Measured | None = None
    gaba_alone: Measured | None = None
    training: dict[str, Any] = field(default_factory=dict)
