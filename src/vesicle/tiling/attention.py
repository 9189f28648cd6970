"""Attention over tiles of unlike sizes, as plain, differentiable arithmetic.

A query reads the newest positions and the first ones one by one, and of all that lies further back
the tiles: one of a single position is that position, a larger one stands by a summary, a key, a
value and the logarithm of what it weighs. It may open the tiles that promise most, and reads their
positions instead. A position is tiled once its block of 64 has left the recent window of the query,
so that nothing looks ahead, and a query's result depends neither on later ones nor on how a text
was cut.

Summaries: of a tile of s equal positions both poolings give exactly what the s positions give.

- `mean`: mean key and value, and log s.
- `query`: positions are weighed by what the mean query of the last tokens before they were tiled
  pays them, and the weight is exact for that query: the logarithm of the sum of exponentials,
  expanded to first order there. Multipole Attention (Hooper et al. 2025) has clusters of keys with
  mean keys; what is here instead is that the query says what of a tile matters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vesicle.tiling.partition import LARGEST, SIZES, IntArray

POOLINGS = ("mean", "query")
_AT_ONCE = 256
"""Queries whose scores exist at a time."""


class Tiled(NamedTuple):
    """What `tiled_attention` gives.

    Attributes:
        output: (H, T, K).
        read: (T,) positions and summaries that each query read, of a KV head on average.
    """

    output: Tensor
    read: Tensor


class _Level(NamedTuple):
    """Summaries of all nodes of one size."""

    size: int
    keys: Tensor  # (G, N, K)
    values: Tensor  # (G, N, K)
    weights: Tensor  # (G, R, N) logarithms of what a summary weighs
    stands: Tensor  # (G, N) whether a tile of this size is there


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: IntArray,
    scale: float,
    *,
    opened: int = 0,
    recent: int = 64,
    pooling: str = "mean",
    horizon: int = 256,
    drops: bool = False,
) -> Tiled:
    """Attention of each query over what is before it, through tiles.

    Args:
        query: (H, T, K), rotated.
        key: (G, T, K), rotated; H is a multiple of G.
        value: (G, T, K).
        sizes: (T,) or (G, T) of the tiles that positions lie in, as `tile_sizes` gives them.
        scale: Of the attention logits.
        opened: Tiles that a query of a KV head opens: those of largest estimated mass, a mean over
            the query heads that share it.
        recent: Newest positions that are read one by one, at least.
        pooling: `mean` or `query`.
        horizon: Queries that the mean is taken of, for `query`.
        drops: Whether tiles that are not opened are left out, instead of standing by summaries.

    Raises:
        ValueError: If a setting is none, or sizes are of another length.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; allowed: {', '.join(POOLINGS)}")
    if opened < 0 or recent < 1 or horizon < 1:
        raise ValueError(
            f"opened is {opened}, recent {recent}, horizon {horizon}; allowed: 0, 1, 1 and above"
        )
    groups, length = key.shape[:2]
    if sizes.shape not in ((length,), (groups, length)):
        raise ValueError(f"sizes are {sizes.shape}; allowed: ({length},) or ({groups}, {length})")
    tiles = np.array(np.broadcast_to(sizes, (groups, length)))
    tiles_of = torch.from_numpy(tiles).to(key.device)
    grouped = query.unflatten(0, (groups, -1))  # (G, R, T, K)
    levels = [
        _summarised(grouped, key, value, tiles_of, size, scale, pooling, recent, horizon)
        for size in SIZES[1:]
        if bool((tiles_of == size).any())
    ]
    outs, reads = [], []
    for start in range(0, length, _AT_ONCE):
        part = slice(start, min(length, start + _AT_ONCE))
        out, read = _attended(
            grouped[:, :, part], key, value, tiles_of, levels, part, scale, opened, recent, drops
        )
        outs.append(out)
        reads.append(read)
    return Tiled(torch.cat(outs, dim=2).flatten(0, 1), torch.cat(reads))


def tiled_before(positions: Tensor, recent: int) -> Tensor:
    """(T,) where the tiles of queries at `positions` end: before it blocks of 64 are tiled."""
    return (positions + 1 - recent).clamp(min=0) // LARGEST * LARGEST


def _summarised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    size: int,
    scale: float,
    pooling: str,
    recent: int,
    horizon: int,
) -> _Level:
    n = key.shape[1] // LARGEST * LARGEST // size
    keys = key[:, : n * size].unflatten(1, (n, size))  # (G, N, s, K)
    values = value[:, : n * size].unflatten(1, (n, size))
    stands = sizes[:, : n * size : size] == size
    if pooling == "mean":
        shape = (*query.shape[:2], n)
        weights = torch.full(shape, math.log(size), dtype=key.dtype, device=key.device)
        return _Level(size, keys.mean(2), values.mean(2), weights, stands)
    # The block of a node is complete at `stop`, and tiled for the query `recent` later.
    stop = (torch.arange(n, device=key.device) * size // LARGEST + 1) * LARGEST
    stop = (stop + recent).clamp(max=key.shape[1])
    first = (stop - horizon).clamp(min=0)
    sums = torch.nn.functional.pad(query.cumsum(2), (0, 0, 1, 0))
    mean = (sums[:, :, stop] - sums[:, :, first]) / (stop - first)[:, None]  # (G, R, N, K)
    paid = torch.einsum("grnk,gnsk->grns", mean, keys) * scale
    shares = paid.softmax(-1).mean(1)  # (G, N, s)
    pooled = torch.einsum("gns,gnsk->gnk", shares, keys)
    weights = paid.logsumexp(-1) - torch.einsum("grnk,gnk->grn", mean, pooled) * scale
    return _Level(size, pooled, torch.einsum("gns,gnsk->gnk", shares, values), weights, stands)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    levels: list[_Level],
    part: slice,
    scale: float,
    opened: int,
    recent: int,
    drops: bool,
) -> tuple[Tensor, Tensor]:
    """Output (G, R, t, K) of the queries in `part`, and what they read (t,)."""
    device = key.device
    positions = torch.arange(part.start, part.stop, device=device)
    places = torch.arange(part.stop, device=device)
    tiled = tiled_before(positions, recent)[:, None]
    near = (places >= tiled) & (places <= positions[:, None])  # (t, S)
    single = (places < tiled) & (sizes[:, None, : part.stop] == 1)  # (G, t, S)
    reads = near | single
    scores = [_scores(query, level, scale) for level in levels]
    seen = []
    for level in levels:
        stops = (torch.arange(level.stands.shape[1], device=device) + 1) * level.size
        seen.append(level.stands[:, None] & (stops <= tiled))  # (G, t, N)
    chosen = _opened(scores, seen, opened)
    for level, opens in zip(levels, chosen, strict=True):
        members = opens.repeat_interleave(level.size, -1)[..., : part.stop]
        reads = reads | torch.nn.functional.pad(members, (0, part.stop - members.shape[-1]))
    exact = torch.einsum("grtk,gsk->grts", query, key[:, : part.stop]) * scale
    logits = [exact.masked_fill(~reads[:, None], -torch.inf)]
    shown = [value[:, : part.stop]]
    count = reads.sum(-1)
    for level, score, visible, opens in zip(levels, scores, seen, chosen, strict=True):
        # Whoever opens or drops tiles has read their keys to choose, half of a summary.
        count = count + visible.sum(-1) / (2 if drops else 1)
        if not drops:
            logits.append(score.masked_fill(~(visible & ~opens)[:, None], -torch.inf))
            shown.append(level.values)
    chances = torch.cat(logits, dim=-1).softmax(-1)
    out = torch.einsum("grts,gsk->grtk", chances, torch.cat(shown, dim=1))
    return out, count.to(torch.float64).mean(0)


def _scores(query: Tensor, level: _Level, scale: float) -> Tensor:
    """(G, R, t, N) logits of summaries: those of all that they stand for."""
    products = torch.einsum("grtk,gnk->grtn", query, level.keys) * scale
    return products + level.weights[:, :, None]


def _opened(scores: list[Tensor], seen: list[Tensor], opened: int) -> list[Tensor]:
    """(G, t, N) of each level, which tiles queries open."""
    if not scores or not opened:
        return [torch.zeros_like(visible) for visible in seen]
    joined = torch.cat(scores, dim=-1).detach()
    visible = torch.cat(seen, dim=-1)
    masses = joined.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num().mean(1)
    masses = masses.masked_fill(~visible, -1)
    best = masses.topk(min(opened, masses.shape[-1]), dim=-1).indices
    opens = torch.zeros_like(visible).scatter(-1, best, True) & visible
    return list(opens.split([s.shape[-1] for s in scores], dim=-1))
