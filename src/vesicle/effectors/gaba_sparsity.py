"""GABA: how many blocks of 16 cached positions a query reads, and how many words compete.

With n blocks visible the level g reads max(`least`, ceil(g n)) of them: always the first (attention
sinks) and the query's own, and of the others those whose estimated attention mass is largest. Short
contexts are cheap and hurt most when cut, hence `least`. The estimate is made per KV head from
summaries of *complete* blocks, so it never looks past the query:

- `mean`: q . mean(k), a block's mean key;
- `bounds`: sum_d max(q_d min_d, q_d max_d), the upper bound of q . k (Quest, Tang et al. 2024).

Scores become masses by a softmax over blocks per query head, and masses are averaged over the query
heads that share a KV head.

The LM head is the same kind of choice: every word is a key, and the best by a cheap estimate, a
preview (`vesicle.preview`), are computed exactly. Where the last layer's level is below
`head_below`, that are `likeliest` words where nothing but the likeliest is asked for, and `logits`
where all logits are, whose others keep their estimates. Both are off, 0, unless they are set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vesicle.effectors.base import Effector
from vesicle.effectors.rules import VISIBLE, Ladder, Rules, Share
from vesicle.shapes import ModelShape

SUMMARIES = ("mean", "bounds")


@dataclass(frozen=True, kw_only=True)
class GabaSparsity(Effector):
    """Level to blocks read.

    Attributes:
        summary: How a block is summarised: `mean` or `bounds`.
        least: Blocks read at any level, where that many are visible; at least 2.
        likeliest: Words that the LM head ranks exactly to find the likeliest; 0 for all.
        logits: Words whose logits it computes exactly where logits are asked for; 0 for all.
        head_below: Last layer's level from which on it computes all.
    """

    transmitter: ClassVar[str] = "gaba"
    summary: str = "mean"
    least: int = 8
    likeliest: int = 0
    logits: int = 0
    head_below: float = 1.0

    def __post_init__(self) -> None:
        """Check that all settings are in range.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        if self.summary not in SUMMARIES:
            raise ValueError(f"summary is {self.summary!r}; allowed: {', '.join(SUMMARIES)}")
        if self.least < 2:
            raise ValueError(f"least is {self.least}; allowed: 2 and above")
        for name in ("likeliest", "logits"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 and above")
        if not 0 <= self.head_below <= 1:
            raise ValueError(f"head_below is {self.head_below}; allowed: 0 to 1")

    @property
    def vectors(self) -> int:
        """Summary vectors per block."""
        return 1 if self.summary == "mean" else 2

    def rules(self, shape: ModelShape) -> Rules:
        """Blocks read of those that are visible, and words of the LM head that are exact."""
        blocks = Share(
            field="kv_blocks",
            transmitter=self.transmitter,
            next_layer=True,
            rate=1.0,
            width=VISIBLE,
            least=self.least,
        )
        steps = ((self.head_below, 0),)
        words = (
            Ladder(
                field=field,
                transmitter=self.transmitter,
                steps=steps,
                below=count if count < shape.vocabulary else 0,
            )
            for field, count in (("likeliest", self.likeliest), ("logits", self.logits))
        )
        return (blocks, *words)

    def previews(self, level: Tensor) -> Tensor:
        """Whether logits are previewed at a level, booleans of its shape."""
        return (level < self.head_below) & (self.logits > 0)

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
