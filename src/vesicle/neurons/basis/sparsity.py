"""How sparse the edges between two layers are.

No one number says it, so several do. All are of squared attributions E, as `interactions.edges`
gives them, and the lower the first four are, the sparser; of the last the higher.

- Shares of all edges that hold 95 and 99 % of the sum of E, the largest first.
- Share of the inputs that hold 95 % of the sum of E into a feature, averaged over features. A scale
  of the next layer's features does not change it, while in the others what goes into the strongest
  features is all that counts.
- L1 against L2: (sum E)² / (n sum E²), 1 where all n edges are alike, 1 / n where there is but one.
- The Gini coefficient, 0 where all edges are alike, near 1 where few have all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Of the edges between two layers; see the module.

    Attributes:
        edges_95: Share of edges.
        edges_99: Share of edges.
        inputs_95: Share of inputs.
        spread: L1 against L2.
        gini: Gini coefficient.
    """

    edges_95: float
    edges_99: float
    inputs_95: float
    spread: float
    gini: float


def sparsity(edges: Tensor) -> Sparsity:
    """Measures of edges (k_target, k_source), none negative.

    Raises:
        ValueError: There are none, or all are 0.
    """
    flat = edges.double().flatten().sort(descending=True).values
    if not flat.numel() or flat[0] <= 0:
        raise ValueError("all edges are 0; allowed: edges of which some are above 0")
    n, total = len(flat), flat.sum()
    rows = edges.double().sort(1, descending=True).values
    rows = rows[rows[:, 0] > 0]
    ranks = torch.arange(n, 0, -1, dtype=torch.float64)  # of the smallest it is 1
    return Sparsity(
        edges_95=share_holding(flat, 0.95),
        edges_99=share_holding(flat, 0.99),
        inputs_95=sum(share_holding(row, 0.95) for row in rows) / len(rows),
        spread=float(total.square() / (n * flat.square().sum())),
        gini=float((2 * (ranks * flat).sum() / total - (n + 1)) / n),
    )


def share_holding(falling: Tensor, part: float) -> float:
    """Share of the values, the largest first, that holds a part of their sum.

    Args:
        falling: (n,) values from the largest down, none negative.
        part: Of the sum, 0 to 1.
    """
    held = falling.cumsum(0)
    return (int((held < part * held[-1]).sum()) + 1) / len(falling)
