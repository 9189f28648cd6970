"""What a modulator is trained for: to say what the dense model says, for the share of work asked.

loss = KL(dense || modulated) + price * (share - budget)^2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def divergence(dense: Tensor, modulated: Tensor, chunk: int = 16) -> Tensor:
    """KL divergence of the modulated model's next-token distribution from the dense model's.

    With p the dense and q the modulated distribution over V tokens,

        KL = mean over positions of sum_v p_v (log p_v - log q_v)          in nats
        dKL / dlogits_q = (q - p) / positions

    Worked out in fp32 for `chunk` positions at a time, gradient included, so that no (B, T, V)
    array in fp32 ever exists.

    Args:
        dense: (B, T, V) logits; takes no gradient.
        modulated: (B, T, V) logits.
        chunk: Positions worked out at once; few, so that they stay in the cache.

    Returns:
        Scalar, fp32.

    Raises:
        ValueError: If the shapes differ.
    """
    if dense.shape != modulated.shape:
        raise ValueError(f"logits have shapes {tuple(dense.shape)} and {tuple(modulated.shape)}")
    result: Tensor = _Divergence.apply(modulated, dense.detach(), chunk)  # type: ignore[no-untyped-call]  # torch
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, modulated: Tensor, dense: Tensor, chunk: int) -> Tensor:
        flat_q = modulated.reshape(-1, modulated.shape[-1])
        flat_p = dense.reshape(flat_q.shape)
        n = len(flat_q)
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(flat_q) if wanted else flat_q[:0]
        total = torch.zeros((), device=flat_q.device)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            log_p = flat_p[rows].float().log_softmax(-1)
            log_q = flat_q[rows].float().log_softmax(-1)
            p = log_p.exp()
            total = total + (p * (log_p - log_q)).sum()
            if wanted:
                slope[rows] = (log_q.exp_() - p).div_(n).to(slope.dtype)
        ctx.save_for_backward(slope)
        ctx.shape = modulated.shape
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0].to(slope.dtype)).reshape(ctx.shape), None, None


def budget_penalty(share: Tensor, budget: float, price: float, one_sided: bool = False) -> Tensor:
    """The price of missing a budget.

        penalty = price (share - budget)^2                 two-sided: spend what was given
        penalty = price max(share - budget, 0)^2           one-sided: only overspending costs

    Args:
        share: Executed share of the dense FLOPs, a scalar.
        budget: The share asked for, in (0, 1].
        price: Nats per squared share, not negative.
        one_sided: Whether spending less is free.

    Returns:
        Scalar of `share`'s dtype.
    """
    gap = share - budget
    if one_sided:
        gap = gap.clamp(min=0)
    return price * gap.square()


@dataclass(frozen=True, kw_only=True)
class TemperatureSchedule:
    """Temperature of the soft masks over a run: exponential, or constant if both ends agree.

        temperature(x) = start (end / start)^x,   x in [0, 1] the share of the run that is done

    Attributes:
        start: At the first step; 0 means straight-through, and then `end` must be 0 as well.
        end: At the last step.
    """

    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Check that both temperatures are above 0, or both are 0.

        Raises:
            ValueError: Naming them, and what is allowed.
        """
        if self.start < 0 or self.end < 0:
            raise ValueError(f"temperatures are {self.start}, {self.end}; allowed: 0 and above")
        if (self.start == 0) != (self.end == 0):
            raise ValueError(
                f"temperature goes from {self.start} to {self.end}; "
                "give both above 0, or both 0 for straight-through"
            )

    def at(self, progress: float) -> float:
        """The temperature when the share `progress` (0 to 1) of the run is done."""
        if self.start == self.end:
            return self.start
        return self.start * (self.end / self.start) ** min(max(progress, 0.0), 1.0)
