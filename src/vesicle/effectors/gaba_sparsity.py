"""GABA: how many blocks of 16 cached positions a query reads.

With n blocks visible the level g reads max(`least`, ceil(g n)) of them: always the first (attention
sinks) and the query's own, and of the others those whose estimated attention mass is largest. Short
contexts are cheap and hurt most when cut, hence `least`. The estimate is made per KV head from
summaries of *complete* blocks, so it never looks past the query:

- `mean`: q . mean(k), a block's mean key;
- `bounds`: sum_d max(q_d min_d, q_d max_d), the upper bound of q . k (Quest, Tang et al. 2024).

Scores become masses by a softmax over blocks per query head, and masses are averaged over the query
heads that share a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vesicle.effectors.base import Effector
from vesicle.effectors.rules import VISIBLE, Rules, Share
from vesicle.shapes import ModelShape

SUMMARIES = ("mean", "bounds")


@dataclass(frozen=True, kw_only=True)
class GabaSparsity(Effector):
    """Level to blocks read.

    Attributes:
        summary: How a block is summarised: `mean` or `bounds`.
        least: Blocks read at any level, where that many are visible; at least 2.
    """

    transmitter: ClassVar[str] = "gaba"
    summary: str = "mean"
    least: int = 8

    def __post_init__(self) -> None:
        """Check the name of the summary."""
        if self.summary not in SUMMARIES:
            raise ValueError(f"summary is {self.summary!r}; allowed: {', '.join(SUMMARIES)}")
        if self.least < 2:
            raise ValueError(f"least is {self.least}; allowed: 2 and above")

    @property
    def vectors(self) -> int:
        """Summary vectors per block."""
        return 1 if self.summary == "mean" else 2

    def rules(self, shape: ModelShape) -> Rules:
        """Blocks read of those that are visible."""
        blocks = Share(
            field="kv_blocks",
            transmitter=self.transmitter,
            next_layer=True,
            rate=1.0,
            width=VISIBLE,
            least=self.least,
        )
        return (blocks,)

    def count(self, level: Tensor, visible: Tensor) -> Tensor:
        """Differentiable number of blocks read, same shape as `level`."""
        return torch.minimum((level * visible).clamp(min=float(self.least)), visible)

    def mask(self, level: Tensor, rank: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """Soft mask over blocks.

        Args:
            level: (B, T).
            rank: (B, T, G, N) 1-based rank of each visible block for its query (first and own
                blocks come first), larger than N where not visible.
            visible: (B, T) blocks visible.
            temperature: Width of the sigmoid as a share of the visible blocks; 0 gives the hard
                mask with the gradient of 0.1.

        Returns:
            (B, T, G, N) in [0, 1]; exactly 1 for ranks 1 and 2 and wherever the level is 1.
        """
        n = visible.to(level.dtype)
        count = self.count(level, n)
        width = (temperature if temperature > 0 else 0.1) * n
        read = (count.detach() - 1e-6).ceil()
        edge = (
            read + 0.5 + (count - count.detach())
        )  # between two ranks, so that the mask tends to 0 or 1
        soft = torch.sigmoid((edge[..., None, None] - rank) / width[..., None, None])
        if temperature == 0:
            hard = (rank <= read[..., None, None]).to(soft.dtype)
            soft = hard + (soft - soft.detach())
        always = (rank <= 2) | (level >= 1.0)[..., None, None]
        return torch.where(always, torch.ones_like(soft), soft)
