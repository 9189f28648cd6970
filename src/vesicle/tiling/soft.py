"""Tiles with soft edges, so that an importance network can learn by gradient where to split.

Acetylcholine's level a of a position says how large a tile it may lie in: 1 (rest) in none, and of
the k sizes above one in the i-th wherever a < 1 - i / (k + 1). A tile stands where all of its
positions allow it, as `tile_sizes` has it. Softly, a position allows a size by

    q = sigmoid((1 - i / (k + 1) - a) / temperature)

a tile by the smallest q of its members, f, and it stands by what it is allowed beyond the tile that
it lies in: w = f - f(parent). Over all tiles that hold a position the w sum to 1. What a query
reads is weighed by w inside the softmax (log w is added to the logit), and counted by w. At
temperature 0 all w are 0 or 1, and this is `tiled_attention`.

A tile's summary is a mean of its keys and values, weighed by a softmax of `pool` over its members
if that is given, and its logit gets the logarithm of its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vesicle.tiling.attention import tiled_before
from vesicle.tiling.partition import LARGEST, SIZES

_AT_ONCE = 256
"""Queries whose scores exist at a time."""
_LEAST = 1e-6
"""Smallest soft weight, which keeps its logarithm finite."""
SINKS = 16


class SoftTiled(NamedTuple):
    """What `soft_tiled_attention` gives.

    Attributes:
        output: (B, H, T, K).
        reads: (B, T) positions and summaries that each query reads, differentiable.
    """

    output: Tensor
    reads: Tensor


def thresholds(sizes: Sequence[int] = SIZES) -> list[float]:
    """The level below which a position may lie in a tile of each size but the first.

    Raises:
        ValueError: If `sizes` do not rise from 1 through tiles that there are.
    """
    if tuple(sizes) != tuple(sorted(set(sizes) & set(SIZES))) or sizes[0] != 1 or len(sizes) < 2:
        raise ValueError(
            f"tile sizes are {tuple(sizes)}; allowed: 1 and some of {SIZES[1:]}, rising"
        )
    return [1 - i / len(sizes) for i in range(1, len(sizes))]


def wanted_sizes(level: Tensor, sizes: Sequence[int] = SIZES) -> Tensor:
    """The largest tile that each position may lie in, for `tile_sizes`, shaped as `level`."""
    found = torch.ones_like(level, dtype=torch.int32)
    for size, edge in zip(sizes[1:], thresholds(sizes), strict=True):
        found = torch.where(level < edge, size, found)
    return found


def tile_weights(
    level: Tensor, sizes: Sequence[int] = SIZES, temperature: float = 0.0, sinks: int = SINKS
) -> list[Tensor]:
    """How far tiles of each size stand.

    Args:
        level: (B, T) in [0, 1].
        sizes: Of tiles, from 1 on.
        temperature: 0 for tiles that stand or do not.
        sinks: First positions that stand alone.

    Returns:
        For each size s (B, n / s), n being T without its incomplete last block of 64; for size 1
        (B, T). In [0, 1].
    """
    length = level.shape[1]
    whole = length // LARGEST * LARGEST
    allowed = []
    for edge in thresholds(sizes):
        if temperature > 0:
            free = torch.sigmoid((edge - level[:, :whole]) / temperature)
        else:
            free = (level[:, :whole] < edge).to(level.dtype)
        # At rest nothing is tiled, whatever the temperature.
        free = torch.where(level[:, :whole] >= 1, 0.0, free)
        alone = torch.arange(whole, device=level.device) < sinks
        allowed.append(free.masked_fill(alone, 0.0))
    weights, above = list[Tensor](), None
    for size, free in zip(reversed(sizes[1:]), reversed(allowed), strict=True):
        fits = free.unflatten(1, (whole // size, size)).amin(2) if whole else free[:, :0]
        within = fits
        if above is not None:
            within = fits - above[1].repeat_interleave(above[0] // size, 1)
        weights.append(within.clamp(min=0))
        above = (size, fits)
    assert above is not None
    covered = above[1].repeat_interleave(above[0], 1)
    single = torch.nn.functional.pad(1 - covered, (0, length - whole), value=1.0)
    return [single, *reversed(weights)]


def soft_tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    level: Tensor,
    scale: float,
    *,
    sizes: Sequence[int] = SIZES,
    temperature: float = 0.0,
    recent: int = 64,
    pool: Tensor | None = None,
    corrects: bool = True,
) -> SoftTiled:
    """Attention of each query over what is before it, through tiles with soft edges.

    Args:
        query: (B, H, T, K), rotated.
        key: (B, G, T, K), rotated; H is a multiple of G.
        value: (B, G, T, K).
        level: (B, T) of acetylcholine.
        scale: Of the attention logits.
        sizes: Of tiles.
        temperature: Of their edges.
        recent: Newest positions that are read one by one, at least.
        pool: (B, G, T) logits of each position's share in its summary; None for equal shares.
        corrects: Whether a summary's logit gets the logarithm of its size.
    """
    length = query.shape[2]
    weights = tile_weights(level, sizes, temperature)
    means = [_summaries(key, value, pool, size) for size in sizes[1:]]
    logs = [_logarithm(w, temperature) for w in weights]
    extra = [math.log(size) if corrects else 0.0 for size in sizes]
    group = query.shape[1] // key.shape[1]
    outs = []
    for start in range(0, length, _AT_ONCE):
        stop = min(length, start + _AT_ONCE)
        positions = torch.arange(start, stop, device=query.device)
        edge = tiled_before(positions, recent)[:, None]  # (t, 1)
        furthest = int(edge[-1, 0])
        places = torch.arange(stop, device=query.device)
        near = (places >= edge) & (places <= positions[:, None])
        far = logs[0][:, None, :stop].masked_fill(places >= edge, -torch.inf)
        biases = [torch.where(near, 0.0, far)]
        keys, values = [key[:, :, :stop]], [value[:, :, :stop]]
        for size, log, more, (k, v) in zip(sizes[1:], logs[1:], extra[1:], means, strict=True):
            n = furthest // size
            if n == 0:
                continue
            stops = (torch.arange(n, device=query.device) + 1) * size
            biases.append((log[:, None, :n] + more).masked_fill(stops > edge, -torch.inf))
            keys.append(k[:, :, :n])
            values.append(v[:, :, :n])
        outs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                torch.cat(keys, 2).repeat_interleave(group, 1),
                torch.cat(values, 2).repeat_interleave(group, 1),
                attn_mask=torch.cat(biases, 2)[:, None].to(query.dtype),
                scale=scale,
            )
        )
    return SoftTiled(torch.cat(outs, 2), _reads(weights, sizes, length, recent))


def _summaries(key: Tensor, value: Tensor, pool: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """(B, G, N, K) keys and values of all tiles of a size."""
    n = key.shape[2] // LARGEST * LARGEST // size
    parts = [x[:, :, : n * size].unflatten(2, (n, size)) for x in (key, value)]
    if pool is None:
        return parts[0].mean(3), parts[1].mean(3)
    shares = pool[:, :, : n * size].unflatten(2, (n, size)).softmax(-1)[..., None]
    return (parts[0] * shares).sum(3), (parts[1] * shares).sum(3)


def _logarithm(weight: Tensor, temperature: float) -> Tensor:
    if temperature > 0:
        return weight.clamp(min=_LEAST).log()
    return torch.where(weight > 0, 0.0, -torch.inf)


def _reads(weights: list[Tensor], sizes: Sequence[int], length: int, recent: int) -> Tensor:
    """(B, T) what each query reads: the sum of weights before its edge, and all behind it."""
    n_blocks = length // LARGEST
    device = weights[0].device
    positions = torch.arange(length, device=device)
    edge = tiled_before(positions, recent)
    total = torch.zeros(weights[0].shape[0], n_blocks + 1, device=device, dtype=weights[0].dtype)
    for size, weight in zip(sizes, weights, strict=True):
        blocks = weight[:, : n_blocks * LARGEST // size].unflatten(1, (n_blocks, LARGEST // size))
        total = total + torch.nn.functional.pad(blocks.sum(2).cumsum(1), (1, 0))
    return total[:, edge // LARGEST] + (positions + 1 - edge)
