"""Attention of new queries over a sequence's cache: all of it, or the blocks a Plan names.

`attend` returns what it read beside the output. Blocks that are not chosen are never touched: their
keys and values are neither multiplied nor masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.blocks import rank_blocks
from vesicle.engine.cache import LayerCache
from vesicle.engine.native import library
from vesicle.plan import BLOCK, IntArray, visible_blocks


def attend(
    query: Tensor,
    cache: LayerCache,
    positions: IntArray,
    kv_blocks: IntArray,
    scale: float,
    summary: str,
) -> tuple[Tensor, IntArray, IntArray]:
    """Attention over the cache, which already holds the queries' own keys.

    Args:
        query: (T, H, K), rotated.
        cache: Of one layer of one sequence.
        positions: (T,) of the queries, rising.
        kv_blocks: (T,) blocks to read.
        scale: Of the attention logits.
        summary: How blocks are summarised, see `blocks.summarise`.

    Returns:
        (T, H K) output; (T,) positions read; (T,) block summaries read to choose, 0 where nothing
        was chosen.
    """
    visible = visible_blocks(positions)
    if (kv_blocks >= visible).all():
        return _dense(query, cache, positions, scale), positions + 1, np.zeros_like(positions)
    listed, compared = _choose(query, cache, positions, kv_blocks, scale, summary)
    out, visited = _blockwise(query, cache, listed, kv_blocks, positions, scale)
    return out, visited, compared


def _choose(
    query: Tensor,
    cache: LayerCache,
    positions: IntArray,
    kv_blocks: IntArray,
    scale: float,
    summary: str,
) -> tuple[Tensor, IntArray]:
    """Blocks (T, G, most) int32 in rising order, the first kv_blocks[t] valid.

    (T,) summaries compared.
    """
    t, h, k = query.shape
    summaries = cache.summaries(summary)
    most = int(kv_blocks.max())
    kernels = library()
    if kernels is None or query.dtype != torch.float32 or query.is_cuda:
        rank = rank_blocks(
            query.transpose(0, 1)[None], summaries[None], torch.from_numpy(positions)[None], scale
        )[0]  # (T, G, N)
        chosen = rank <= torch.from_numpy(kv_blocks)[:, None, None]
        number = torch.arange(rank.shape[-1]).expand_as(rank)
        listed = torch.where(chosen, number, 1 << 30).sort(-1).values[..., :most]
        compared = np.where(kv_blocks < visible_blocks(positions), positions // BLOCK, 0)
        return listed.to(torch.int32).contiguous(), compared.astype(np.int32)
    query = query.contiguous()
    g, _, vectors, _ = summaries.shape
    listed = torch.empty(t, g, most, dtype=torch.int32)
    compared = np.empty(t, np.int32)
    kv_blocks = np.ascontiguousarray(kv_blocks, np.int32)
    positions = np.ascontiguousarray(positions, np.int32)
    kernels.vesicle_choose_blocks_f32(
        query.data_ptr(),
        summaries.data_ptr(),
        kv_blocks.ctypes.data,
        positions.ctypes.data,
        t,
        h,
        g,
        k,
        summaries.stride(0) // (vectors * k),
        vectors,
        most,
        scale,
        listed.data_ptr(),
        compared.ctypes.data,
    )
    return listed, compared


def _dense(query: Tensor, cache: LayerCache, positions: IntArray, scale: float) -> Tensor:
    t, h, k = query.shape
    # Queries of a chunk whose other tokens skip attention must not see those tokens' keys.
    length = int(positions[-1]) + 1
    keys, values = cache.keys[:, :length], cache.values[:, :length]
    q = query.transpose(0, 1)  # (H, T, K)
    if t == 1:
        # Query heads that share a KV head become its rows: no repeated keys, no mask.
        rows = q.reshape(keys.shape[0], -1, k)[None]
        out = nn.functional.scaled_dot_product_attention(
            rows, keys[None], values[None], scale=scale
        )
        return out.reshape(1, h * k)
    mask = None if t == length else torch.arange(length) <= torch.from_numpy(positions)[:, None]
    out = nn.functional.scaled_dot_product_attention(
        q[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(t, h * k)


def _blockwise(
    query: Tensor,
    cache: LayerCache,
    listed: Tensor,
    n_blocks: IntArray,
    positions: IntArray,
    scale: float,
) -> tuple[Tensor, IntArray]:
    """Attention over listed blocks (T, G, most), the first n_blocks[t] of them valid."""
    t, h, k = query.shape
    kernels = library()
    if kernels is None or query.dtype != torch.float32 or query.is_cuda:
        return _blockwise_torch(query, cache, listed, n_blocks, positions, scale)
    query = query.contiguous()
    out = torch.empty(t, h * k)
    visited = np.empty(t, np.int32)
    n_blocks = np.ascontiguousarray(n_blocks, np.int32)
    positions = np.ascontiguousarray(positions, np.int32)
    kernels.vesicle_block_attention_f32(
        query.data_ptr(),
        cache.keys.data_ptr(),
        cache.values.data_ptr(),
        listed.data_ptr(),
        n_blocks.ctypes.data,
        positions.ctypes.data,
        t,
        h,
        listed.shape[1],
        k,
        cache.keys.shape[1],
        listed.shape[2],
        scale,
        out.data_ptr(),
        visited.ctypes.data,
    )
    return out, visited


def _blockwise_torch(
    query: Tensor,
    cache: LayerCache,
    listed: Tensor,
    n_blocks: IntArray,
    positions: IntArray,
    scale: float,
) -> tuple[Tensor, IntArray]:
    t, h, k = query.shape
    g = listed.shape[1]
    out = query.new_empty(t, g, h // g, k)
    visited = np.empty(t, np.int32)
    within = torch.arange(BLOCK)
    for i in range(t):
        for head in range(g):
            blocks = listed[i, head, : int(n_blocks[i])].long()
            slots = (blocks[:, None] * BLOCK + within).flatten()
            slots = slots[slots <= int(positions[i])]
            q = query[i].view(g, h // g, k)[head]
            scores = (q @ cache.keys[head, slots].t()).float() * scale
            out[i, head] = scores.softmax(-1).to(q.dtype) @ cache.values[head, slots]
            visited[i] = len(slots)
    return out.reshape(t, h * k), visited
