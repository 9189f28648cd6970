"""Which KV blocks a query would read first: the ranking shared by both executors.

The estimate and its options are described in `effectors.gaba_sparsity`. Only complete blocks before
the query's own are estimated, from keys at positions up to the query's, so the ranking is causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.plan import BLOCK

_FIRST, _OWN, _NEAR, _DAMAGED, _IN_PART, _HIDDEN = 5.0, 4.0, 3.0, 2.0, -1.0, -2.0
"""Priorities outside the range of an attention mass, [0, 1].

A block that cannot be estimated, since its keys hold NaN, is read: damage must show.
"""


def summarise(keys: Tensor, summary: str) -> Tensor:
    """Summaries of complete blocks.

    Args:
        keys: (..., S, K), S any length; a last partial block is left out.
        summary: `mean` or `bounds`.

    Returns:
        (..., N, V, K) for N = S // 16 blocks: V = 1 mean, or V = 2 minimum and maximum.
    """
    n = keys.shape[-2] // BLOCK
    blocks = keys[..., : n * BLOCK, :].unflatten(-2, (n, BLOCK))
    if summary == "mean":
        return blocks.mean(-2, keepdim=True)
    return torch.stack([blocks.amin(-2), blocks.amax(-2)], dim=-2)


def estimate(query: Tensor, summaries: Tensor, scale: float) -> Tensor:
    """Estimated attention logits of blocks.

    Args:
        query: (..., G, R, T, K), R query heads per KV head.
        summaries: (..., G, N, V, K).
        scale: Of the attention logits.

    Returns:
        (..., G, R, T, N).
    """
    first = summaries[..., 0, :].unsqueeze(-3).transpose(-1, -2)  # (..., G, 1, K, N)
    if summaries.shape[-2] == 1:
        return query @ first * scale
    last = summaries[..., 1, :].unsqueeze(-3).transpose(-1, -2)
    # max(q a, q b) over a <= b is q+ b + q- a, with q+ and q- the positive and negative parts.
    return (query.clamp(min=0) @ last + query.clamp(max=0) @ first) * scale


def rank_blocks(
    query: Tensor,
    summaries: Tensor,
    positions: Tensor,
    scale: float,
    *,
    window: int = 0,
    begins: bool = True,
    nearest: int = 1,
) -> Tensor:
    """Rank visible blocks for each query and KV head.

    Args:
        query: (B, H, T, K), rotated.
        summaries: (B, G, N', V, K) of complete blocks, at least those before the queries' own.
        positions: (B, T) of the queries.
        scale: Of the attention logits.
        window: Newest positions that a query sees; 0 for all.
        begins: Whether the first block is the text's own first one.
        nearest: Blocks up to the own one that come before all others, the own included.

    Returns:
        (B, T, G, N) 1-based ranks, N = last query's block + 1; the text's first block 1 where it is
        seen whole, own block next, then the nearest; a block of which its window shows but a part
        comes after those that are seen whole, and those of which nothing is seen last.
    """
    b, h, t, k = query.shape
    g = summaries.shape[1]
    own = positions // BLOCK  # (B, T)
    n = int(own.max()) + 1
    index = torch.arange(n, device=query.device)
    mass = query.new_zeros(b, g, t, n)
    known = min(n - 1, summaries.shape[2])
    if known > 0:
        logits = estimate(query.reshape(b, g, h // g, t, k), summaries[:, :, :known], scale)
        before = index[:known] < own[:, None, None, :, None]  # (B, 1, 1, T, N)
        if window:
            before &= index[:known] >= _begins(positions, window)[:, None, None, :, None]
        damaged = logits.isnan() | (logits == torch.inf)
        logits = logits.float().masked_fill(~before | damaged, -torch.inf)
        shares = logits.softmax(-1).nan_to_num(0.0).mean(2)  # NaN: nothing comes before
        mass[..., :known] = shares.masked_fill(damaged.any(2), _DAMAGED)
    place = own[:, None, :, None]
    mass = mass.masked_fill(index > place, _HIDDEN)
    mass = mass.masked_fill((index > place - nearest) & (index < place), _NEAR)
    mass = mass.masked_fill(index == place, _OWN)
    if begins:
        mass = mass.masked_fill((index == 0).expand_as(mass), _FIRST)
    if window:
        left = (index < _begins(positions, window)[:, None, :, None]) & (index != place)
        part = (positions - window + 1).clamp(min=0)[:, None, :, None] // BLOCK
        mass = mass.masked_fill(left, _HIDDEN).masked_fill(left & (index == part), _IN_PART)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(1, n + 1, device=query.device).expand_as(order))
    return rank.transpose(1, 2)


def _begins(positions: Tensor, window: int) -> Tensor:
    """The first block that queries (B, T) see whole."""
    return ((positions - window + 1).clamp(min=0) + BLOCK - 1) // BLOCK


def selected_blocks(rank: Tensor, kv_blocks: Tensor) -> Tensor:
    """Which blocks are read: (B, T, G, N) bool from ranks and counts (B, T, G)."""
    return rank <= kv_blocks[..., None]
