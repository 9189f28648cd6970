"""The likeliest token, or that there is none: numbers that are not finite have no order."""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.errors import VesicleError


def likeliest(logits: Tensor) -> Tensor:
    """The place () of the largest of logits (V,); -1 where any of them is not finite."""
    return torch.where(logits.isfinite().all(), logits.argmax(), -1)


def not_finite(position: int) -> VesicleError:
    """What is wrong where logits are NaN or infinite.

    Args:
        position: Of the token that they were computed for.
    """
    return VesicleError(
        f"logits are not finite at position {position}: the weights or the cache are damaged"
    )
