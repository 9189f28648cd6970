"""Linear regression with an intercept and a ridge: of routers that are fitted, and of probes."""

from __future__ import annotations

import torch
from torch import Tensor


def regression(x: Tensor, targets: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight (D, P) and bias (P,) for which x W + b is nearest to the targets.

    Args:
        x: (N, D).
        targets: (N, P).
        ridge: Share of the mean variance of x that is added to each direction's.
    """
    y = targets.to(x)
    mean, middle = x.mean(0), y.mean(0)
    centred = x - mean
    square = centred.T @ centred / len(x)
    square += ridge * square.diagonal().mean() * torch.eye(len(square)).to(x)
    weight = torch.linalg.solve(square, centred.T @ (y - middle) / len(x))
    return weight, middle - mean @ weight
