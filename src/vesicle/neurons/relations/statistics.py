"""How specific a neuron is to a relation: average precision of its activation (Liu et al. 2025).

With the prompts of one relation as positives and those of all others as negatives, a neuron's
activation x is a classifier's score (Cuadros et al. 2022):

    AP = (1 / P) Σ_{positives j} |{positives with x >= x_j}| / |{prompts with x >= x_j}|

so that tied activations count alike. 1 says that every positive lies above every negative. The k
neurons of highest AP are the relation's. Where many have the same AP, as at 1 with few prompts,
those come first whose activation differs more, in standard deviations; that order is ours.

Not as published: a neuron here is a hidden unit, where the paper counts the outputs of gate, up and
down projection apart; and all other relations' prompts are negatives, not four times as many drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 8192


def average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """(M,) average precision of M classifiers.

    Args:
        scores: (N, M) of N prompts.
        positive: (N,) bool, at least one of them true.
    """
    found = []
    for part in scores.split(_AT_ONCE, dim=1):
        columns = part.T.contiguous().sort(-1).values  # (m, N)
        own = part[positive].T.contiguous().sort(-1).values  # (m, P)
        at_least = columns.shape[1] - torch.searchsorted(columns, own)
        own_at_least = own.shape[1] - torch.searchsorted(own, own)
        found.append((own_at_least / at_least).mean(-1))
    return torch.cat(found)


def difference(scores: Tensor, positive: Tensor) -> Tensor:
    """(M,) how far positives lie above negatives, in standard deviations of all."""
    apart = scores[positive].mean(0) - scores[~positive].mean(0)
    return apart / scores.std(0, correction=0).clamp_min(1e-12)


def most_specific(scores: Tensor, positive: Tensor, count: int) -> Tensor:
    """(count,) numbers of the neurons that are most specific, the first the most.

    Args:
        scores: (N, M) activations.
        positive: (N,) bool.
        count: How many.
    """
    precision = average_precision(scores, positive).numpy()
    order = np.lexsort((-difference(scores, positive).numpy(), -precision))
    return torch.from_numpy(order[:count].copy())
