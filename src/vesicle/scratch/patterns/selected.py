"""What is chosen for each query from summaries of blocks: Quest, Twilight and Multipole Attention.

They are ways of running a model that was trained densely, so they are not trained with.

- `quest` (Tang et al. 2024): pages of 16 by the upper bound of what they could hold; the `opened`
  most promising are read, the others are not.
- `twilight` (Lin et al. 2025): as many pages as hold the share `mass` of attention, by an estimate.
  There the estimate reads keys of 4 bits; here it reads mean keys.
- `multipole` (Hooper et al. 2025): mean keys and values stand for pages that are not opened. There
  clusters of keys; here pages of neighbours, and one level of them.

A page is summarised once it is complete, and the newest positions are read in any case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vesicle.scratch.patterns.base import Pattern

_PAGE = 16
RULES = ("quest", "twilight", "multipole")


class Selected(Pattern):
    """Pages of 16, chosen by each query for itself."""

    kind = "selected"

    def __init__(self, rule: str, opened: int = 8, mass: float = 0.9, recent: int = 64) -> None:
        """The pattern.

        Args:
            rule: One of `RULES`.
            opened: Pages that quest and multipole open.
            mass: Share of the attention that twilight opens pages for.
            recent: Newest positions that are read in any case, at least.

        Raises:
            ValueError: If there is no such rule.
        """
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
        self.rule, self.opened, self.mass, self.recent = rule, opened, mass, recent

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See the base class."""
        length, groups = query.shape[2], key.shape[1]
        grouped = query.unflatten(1, (groups, -1))  # (B, G, R, T, K)
        n = length // _PAGE
        pages = key[:, :, : n * _PAGE].unflatten(2, (n, _PAGE))
        place = torch.arange(length, device=query.device)
        edge = (place + 1 - self.recent).clamp(min=0) // _PAGE  # complete pages behind the window
        visible = torch.arange(n, device=query.device) < edge[:, None]  # (T, N)
        logits = self._promise(grouped, pages, scale).masked_fill(~visible, -torch.inf)
        masses = logits.softmax(-1).nan_to_num().mean(2)  # (B, G, T, N)
        opens = self._opens(masses) & visible
        members = opens.repeat_interleave(_PAGE, -1)
        members = torch.nn.functional.pad(members, (0, length - n * _PAGE))
        near = (place <= place[:, None]) & (place >= (edge * _PAGE)[:, None])
        reads = members | near
        bias = torch.zeros_like(reads, dtype=query.dtype).masked_fill(~reads, -torch.inf)
        seen = reads.sum(-1).float().mean()
        keys, values = key, value
        if self.rule == "multipole":
            means = [x[:, :, : n * _PAGE].unflatten(2, (n, _PAGE)).mean(3) for x in (key, value)]
            stands = torch.full_like(masses, math.log(_PAGE))
            bias = torch.cat([bias, stands.masked_fill(opens | ~visible, -torch.inf)], -1)
            keys, values = torch.cat([key, means[0]], 2), torch.cat([value, means[1]], 2)
        # A mean key is half an entry; bounds are two vectors; multipole's mean values are read too.
        vectors = {"quest": 1.0, "twilight": 0.5, "multipole": 1.0}[self.rule]
        self.reads = seen + vectors * visible.sum(-1).float().mean()
        group = query.shape[1] // groups
        return scaled_dot_product_attention(
            query,
            keys.repeat_interleave(group, 1),
            values.repeat_interleave(group, 1),
            attn_mask=bias.repeat_interleave(group, 1),
            scale=scale,
        )

    def _promise(self, query: Tensor, pages: Tensor, scale: float) -> Tensor:
        """(B, G, R, T, N) logits that pages promise."""
        if self.rule == "quest":
            high = torch.einsum("bgrtk,bgnk->bgrtn", query.clamp(min=0), pages.amax(3))
            return (high + torch.einsum("bgrtk,bgnk->bgrtn", query.clamp(max=0), pages.amin(3))) * (
                scale
            )
        return torch.einsum("bgrtk,bgnk->bgrtn", query, pages.mean(3)) * scale

    def _opens(self, masses: Tensor) -> Tensor:
        """(B, G, T, N) pages that are read one by one."""
        if self.rule == "twilight":
            found = masses.sort(-1, descending=True)
            before = found.values.cumsum(-1) - found.values
            return torch.zeros_like(masses, dtype=torch.bool).scatter(
                -1, found.indices, before < self.mass
            )
        best = masses.topk(min(self.opened, masses.shape[-1]), -1).indices
        return torch.zeros_like(masses, dtype=torch.bool).scatter(-1, best, True)
