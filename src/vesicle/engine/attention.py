"""Attention of new queries over a sequence's cache: all of it, or the blocks a Plan names.

`attend` returns what it read beside the output. What is read is gathered from the cache's pages
first. Blocks that no query chose are never touched: their keys and values are neither gathered nor
multiplied.

Places are counted in slots (see `engine.cache`): where blocks were evicted, a query sees those that
are left, and a Plan that asks for more of them reads them all. KV heads side by side that hold as
many blocks are worked out together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.blocks import rank_blocks
from vesicle.engine.cache import SequenceCache
from vesicle.plan import BLOCK, FloatArray, IntArray
from vesicle.plan.spread import blocks_of_heads
from vesicle.plan.windows import first_seen, seen, visible_blocks, whole_blocks


class Masks:
    """Additive causal masks of one pass; layers that hold the same positions share one."""

    def __init__(self) -> None:
        """Start without a mask; `at` makes the one asked for, and keeps the newest."""
        self._made: dict[bytes, Tensor] = {}

    def at(self, slots: IntArray, firsts: IntArray, length: int, dtype: torch.dtype) -> Tensor:
        """(T, length): 0 where queries look, from `firsts` to `slots` (T,), else minus infinity."""
        key = slots.tobytes() + firsts.tobytes()
        if key not in self._made:
            hidden = _hidden(slots, firsts, length)
            mask = torch.zeros(len(slots), length, dtype=dtype)
            self._made = {key: mask.masked_fill_(hidden, -torch.inf)}  # one at a time
        return self._made[key]


def attend(
    query: Tensor,
    cache: SequenceCache,
    layer: int,
    positions: IntArray,
    kv_blocks: IntArray,
    scale: float,
    summary: str,
    masks: Masks | None = None,
    received: FloatArray | None = None,
    window: int = 0,
    spread: NDArray[np.int64] | None = None,
    nearest: int = 1,
) -> tuple[Tensor, IntArray, IntArray]:
    """Attention over the cache, which already holds the queries' own keys.

    Args:
        query: (T, H, K), rotated.
        cache: Of one sequence.
        layer: Whose keys and values to read.
        positions: (T,) of the queries, rising.
        kv_blocks: (T,) blocks to read, of those that are held.
        scale: Of the attention logits.
        summary: How blocks are summarised, see `blocks.summarise`.
        masks: Of the pass, so that layers share them.
        received: (G, slots) to which the probability that each slot receives is added.
        window: Newest entries that a query sees; 0 for all.
        spread: (G,) of the layer, where KV heads read unequally.
        nearest: As `rank_blocks` takes it.

    Returns:
        (T, H K) output; (T,) entries read of all KV heads; (T,) block summaries of all KV heads
        read to choose, 0 where nothing was chosen.
    """
    ratio = query.shape[1] // cache.n_heads
    outs, visited, compared = [], np.zeros_like(positions), np.zeros_like(positions)
    # Heads that read alike are worked out together.
    alone = [slice(g, g + 1) for g in range(cache.n_heads)]
    for heads in cache.alike(layer) if spread is None else alone:
        blocks = kv_blocks
        if spread is not None:
            visible = visible_blocks(cache.slots(layer, heads.start, positions), window)
            blocks = blocks_of_heads(kv_blocks, visible, spread[heads]).astype(np.int32)
        out, read, among = _attend_alike(
            query[:, heads.start * ratio : heads.stop * ratio],
            cache,
            layer,
            heads,
            positions,
            blocks,
            scale,
            summary,
            masks,
            None if received is None else received[heads],
            window,
            nearest,
        )
        outs.append(out)
        n = heads.stop - heads.start
        visited, compared = visited + n * read, compared + n * among
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), visited, compared


def _attend_alike(
    query: Tensor,
    cache: SequenceCache,
    layer: int,
    heads: slice,
    positions: IntArray,
    kv_blocks: IntArray,
    scale: float,
    summary: str,
    masks: Masks | None,
    received: FloatArray | None,
    window: int,
    nearest: int,
) -> tuple[Tensor, IntArray, IntArray]:
    """`attend` of some KV heads, which hold as many blocks; counts are of each of them."""
    slots = cache.slots(layer, heads.start, positions)
    visible = visible_blocks(slots, window)
    chooses = kv_blocks < visible
    # Of those who choose, every chosen block but the own one is seen whole.
    firsts = np.where(chooses, 0, first_seen(slots, window)).astype(np.int32)
    if not chooses.any():
        out = _dense(query, cache, layer, heads, slots, firsts, scale, masks)
        if received is not None:
            _receive(query, cache, layer, heads, slots, scale, received)
        return out, seen(slots, window).astype(np.int32), np.zeros_like(slots)
    # Blocks are chosen and read in fp32, whatever they are stored in: that is what the kernels do.
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, n_blocks = query.to(exact), np.minimum(kv_blocks, visible)
    summaries = [cache.summaries(layer, g, summary) for g in range(heads.start, heads.stop)]
    rank = rank_blocks(
        q.transpose(0, 1)[None],
        torch.stack(summaries).to(exact)[None],
        torch.from_numpy(slots)[None],
        scale,
        window=window,
        begins=cache.begins(layer),
        nearest=nearest,
    )[0]  # (T, G, N)
    listed = _listed(rank, n_blocks)
    compared = np.where(chooses, whole_blocks(slots, window), 0).astype(np.int32)
    blocks, listed, slots, firsts = _used(listed, slots, firsts, n_blocks)
    keys, values = cache.read(layer, heads, blocks, exact)
    own = np.zeros((len(keys), len(blocks) * BLOCK), np.float64)
    out, visited = _blockwise(q, keys, values, listed, n_blocks, slots, firsts, scale, own)
    if received is not None:
        places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        received[:, places] += own
    return out.to(query.dtype), visited, compared


def _listed(rank: Tensor, n_blocks: IntArray) -> Tensor:
    """Blocks (T, G, most) int32 in rising order, the first n_blocks[t] valid."""
    chosen = rank <= torch.from_numpy(n_blocks)[:, None, None]
    number = torch.arange(rank.shape[-1]).expand_as(rank)
    listed = torch.where(chosen, number, 1 << 30).sort(-1).values[..., : int(n_blocks.max())]
    return listed.to(torch.int32).contiguous()


def _used(
    listed: Tensor, slots: IntArray, firsts: IntArray, n_blocks: IntArray
) -> tuple[IntArray, Tensor, IntArray, IntArray]:
    """The blocks that any query reads, and the lists, slots and firsts in terms of these."""
    held = int(slots[-1]) // BLOCK + 1
    if listed.numel() >= 4 * held:  # a chunk's queries together read about every block
        return np.arange(held, dtype=np.int32), listed, slots, firsts
    valid = torch.arange(listed.shape[2]) < torch.from_numpy(n_blocks)[:, None, None]
    lists = torch.where(valid, listed, int(slots[-1]) // BLOCK)
    blocks = np.unique(lists.numpy())
    listed = torch.from_numpy(np.searchsorted(blocks, lists.numpy()).astype(np.int32))

    def placed(x: IntArray) -> IntArray:
        return (np.searchsorted(blocks, x // BLOCK) * BLOCK + x % BLOCK).astype(np.int32)

    return blocks, listed, placed(slots), placed(firsts)


def _hidden(slots: IntArray, firsts: IntArray, length: int) -> Tensor:
    """(T, length) which slots queries do not see that see those from `firsts` to `slots` (T,)."""
    first, last = torch.from_numpy(firsts)[:, None], torch.from_numpy(slots)[:, None]
    place = torch.arange(length)
    return (place > last) | (place < first)


def _dense(
    query: Tensor,
    cache: SequenceCache,
    layer: int,
    heads: slice,
    slots: IntArray,
    firsts: IntArray,
    scale: float,
    masks: Masks | None,
) -> Tensor:
    t, h, k = query.shape
    # Queries of a chunk whose other tokens skip attention must not see those tokens' keys.
    start, stop = int(firsts.min()), int(slots[-1]) + 1
    blocks = np.arange(start // BLOCK, -(-stop // BLOCK))
    start -= start % BLOCK
    length, slots, firsts = stop - start, slots - start, firsts - start
    keys, values = (x[:, :length] for x in cache.read(layer, heads, blocks, query.dtype))
    q = query.transpose(0, 1)  # (H, T, K)
    if t == 1:
        # Query heads that share a KV head become its rows: no repeated keys, no mask.
        rows, first = q.reshape(keys.shape[0], -1, k)[None], int(firsts[0])
        out = nn.functional.scaled_dot_product_attention(
            rows, keys[None, :, first:], values[None, :, first:], scale=scale
        )
        return out.reshape(1, h * k)
    mask = None
    if t != length or firsts.any():
        mask = (masks or Masks()).at(slots, firsts, length, query.dtype)
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


def _receive(
    query: Tensor,
    cache: SequenceCache,
    layer: int,
    heads: slice,
    slots: IntArray,
    scale: float,
    received: FloatArray,
) -> None:
    """Add the probabilities of queries (T, H, K) that read all that they see."""
    length = int(slots[-1]) + 1
    keys = cache.read(layer, heads, np.arange(-(-length // BLOCK)), query.dtype)[0][:, :length]
    grouped = query.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)  # (G, R, T, K)
    scores = (grouped @ keys[:, None].transpose(2, 3)).to(_exact(query.dtype)) * scale
    hidden = torch.arange(length) > torch.from_numpy(slots)[:, None]
    chances = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    received[:, :length] += chances.sum((1, 2)).numpy()


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What probabilities are worked out in."""
    return torch.promote_types(dtype, torch.float32)


def _blockwise(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    listed: Tensor,
    n_blocks: IntArray,
    slots: IntArray,
    firsts: IntArray,
    scale: float,
    received: FloatArray,
) -> tuple[Tensor, IntArray]:
    """Attention over listed blocks (T, G, most), the first n_blocks[t] of them valid.

    What each slot of `keys` receives is added to `received` (G, slots).
    """
    t, h, k = query.shape
    g = listed.shape[1]
    out = query.new_empty(t, g, h // g, k)
    visited = np.empty(t, np.int32)
    within = torch.arange(BLOCK)
    for i in range(t):
        for head in range(g):
            blocks = listed[i, head, : int(n_blocks[i])].long()
            read = (blocks[:, None] * BLOCK + within).flatten()
            read = read[(read >= int(firsts[i])) & (read <= int(slots[i]))]
            q = query[i].view(g, h // g, k)[head]
            scores = (q @ keys[head, read].t()).to(_exact(q.dtype)) * scale
            chances = scores.softmax(-1)
            received[head, read.numpy()] += chances.sum(0).numpy()
            out[i, head] = chances.to(q.dtype) @ values[head, read]
            visited[i] = len(read)
    return out.reshape(t, h * k), visited
