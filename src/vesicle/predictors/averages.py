"""Exponential moving averages along a sequence, for predictors that remember."""

from __future__ import annotations

import torch
from torch import Tensor

_SPAN = 64
"""Tokens that one decay matrix covers: longer chunks are taken in pieces, which bounds memory."""


def smooth(u: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """m_t = decay m_{t-1} + (1 - decay) u_t, by a matrix of decays rather than a loop.

    Args:
        u: (B, T, M).
        decay: (M,) in (0, 1).
        carried: (B, M), the average before the first token.

    Returns:
        (B, T, M). The last token's average is what the next chunk starts from.
    """
    pieces = []
    for piece in u.split(_SPAN, dim=1):
        average = _smooth(piece, decay, carried)
        carried = average[:, -1]
        pieces.append(average)
    return torch.cat(pieces, dim=1)


def _smooth(u: Tensor, decay: Tensor, carried: Tensor) -> Tensor:
    """One piece, with a (T, T) matrix."""
    steps = torch.arange(u.shape[1], device=u.device)
    lag = steps[:, None] - steps[None, :]  # (T, T)
    powers = decay[:, None, None] ** lag.clamp(min=0) * (lag >= 0)  # (M, T, T)
    new = torch.einsum("mts,bsm->btm", powers, u * (1 - decay))
    return new + carried[:, None] * decay ** (steps[:, None] + 1)
