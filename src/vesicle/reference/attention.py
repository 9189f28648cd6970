"""Masked attention, dense arithmetic: the reference's own attention functions.

`register` adds one named function per base implementation to transformers' registry
(`vesicle_sdpa`, `vesicle_eager`). Each one is its base, bit for bit, until a layer's hook passes a
`BlockRule` through the attention module's keyword arguments; nothing is patched and nothing is kept
between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.blocks import rank_blocks, selected_blocks, summarise
from vesicle.effectors import GabaSparsity
from vesicle.plan import BLOCK, visible_blocks
from vesicle.plan.spread import blocks_of_heads
from vesicle.reference.memory import Memory
from vesicle.retention import alike

PREFIX = "vesicle_"
BASES = ("sdpa", "eager")
RULE = "vesicle_rule"
"""Keyword under which the rule travels to the attention function."""

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """Which blocks each query reads.

    Attributes:
        positions: (B, T) of the queries.
        offsets: (B,) padding slots before each sequence's first token.
        kv_blocks: (B, T) blocks read; None for the soft rule.
        level: (B, T) GABA level, for the soft rule.
        temperature: Of the soft mask.
        effector: Names the summary, and makes the soft mask.
        memories: For each sequence what it still sees of the layer's entries, or None if all; None
            if no sequence forgets.
        attends: (B, T) the queries that run, whose attention counts as received; padding does not.
        window: Newest positions that a query sees; 0 for all.
        spread: (G,) of the layer, where KV heads read unequally.
        nearest: As `rank_blocks` takes it.
    """

    positions: Tensor
    offsets: tuple[int, ...]
    kv_blocks: Tensor | None
    level: Tensor | None
    temperature: float
    effector: GabaSparsity
    memories: list[Memory | None] | None = None
    attends: Tensor | None = None
    window: int = 0
    spread: NDArray[np.int64] | None = None
    nearest: int = 1

    def blocks(self, rows: slice, n_heads: int) -> Tensor:
        """(B, T, G) blocks that KV heads of some sequences read."""
        assert self.kv_blocks is not None
        wanted = self.kv_blocks[rows][..., None]
        if self.spread is None:
            return wanted.expand(-1, -1, n_heads)
        visible = visible_blocks(self.positions[rows].cpu().numpy(), self.window)[..., None]
        found = blocks_of_heads(wanted.cpu().numpy(), visible, self.spread)
        return torch.from_numpy(found).to(wanted.device)


def register() -> None:
    """Make the named functions known to transformers (idempotent)."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if PREFIX + BASES[0] in ALL_ATTENTION_FUNCTIONS:
        return
    for base in BASES:
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + base, _function(base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _function(base: str) -> AttentionFunction:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        rule: BlockRule | None = kwargs.pop(RULE, None)
        if rule is None:
            return _base(base, module)(module, query, key, value, attention_mask, **kwargs)
        scale = float(kwargs["scaling"])
        weights = None
        if base == "eager" and rule.memories is None:
            weights = _weights(query, key, rule, scale)
        return _blockwise(query, key, value, rule, scale), weights

    return attention


def _base(name: str, module: nn.Module) -> AttentionFunction:
    if name == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward
    # Every model file defines its own eager function beside its attention class.
    import sys

    eager: AttentionFunction = sys.modules[type(module).__module__].eager_attention_forward
    return eager


@torch.no_grad()
def _weights(query: Tensor, key: Tensor, rule: BlockRule, scale: float) -> Tensor:
    """(B, H, T, S) attention probabilities, which transformers' eager functions return.

    They are what attention gives where each key's value is its own unit vector.
    """
    b, g, s, _ = key.shape
    units = torch.eye(s, dtype=query.dtype, device=query.device).expand(b, g, s, s)
    return _blockwise(query, key, units, rule, scale).transpose(1, 2)


def _blockwise(query: Tensor, key: Tensor, value: Tensor, rule: BlockRule, scale: float) -> Tensor:
    """Attention over chosen blocks.

    Query (B, H, T, K), keys and values (B, G, S, K) to (B, T, H, K).
    """
    if rule.memories is None and len(set(rule.offsets)) == 1:
        return _one_offset(query, key, value, rule, scale, rule.offsets[0], slice(None))
    outs = []
    for b, offset in enumerate(rule.offsets):
        rows = slice(b, b + 1)
        memory = None if rule.memories is None else rule.memories[b]
        attend = _one_offset if memory is None else partial(_forgetful, memory=memory)
        outs.append(attend(query[rows], key[rows], value[rows], rule, scale, offset, rows))
    return torch.cat(outs)


def _forgetful(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: BlockRule,
    scale: float,
    offset: int,
    rows: slice,
    *,
    memory: Memory,
) -> Tensor:
    """`_one_offset` of one sequence that forgets entries.

    Queries between two lengths at which something is forgotten see the same entries; what is left
    of these takes the place of the sequence.
    """
    assert rule.kv_blocks is not None
    positions = rule.positions[rows][0]  # (T,), 0 and above but for padding
    key, value = key[:, :, offset:], value[:, :, offset:]
    out = torch.empty_like(query.transpose(1, 2))  # (1, T, H, K)
    if memory.reads_entries:
        memory.show(key[0], value[0])
    start, stop = int(positions.clamp(min=0).min()), int(positions.max()) + 1
    for first, last in memory.periods(start, stop):
        chosen = (positions.clamp(min=0) >= first) & (positions < last)
        later = torch.arange(first, last, device=positions.device)
        held = memory.held(first)
        ratio = query.shape[1] // len(held)
        for heads in alike([len(entries) for entries in held]):
            before = torch.from_numpy(np.stack(held[heads])).to(positions.device)
            entries = torch.cat([before, later.expand(len(before), -1)], dim=1)
            places = entries[None, :, :, None].expand(-1, -1, -1, key.shape[3]).long()
            slots = positions[chosen] - first + before.shape[1]
            part = replace(
                rule,
                positions=torch.where(positions[chosen] < 0, positions[chosen], slots)[None],
                kv_blocks=rule.kv_blocks[rows][:, chosen],
                spread=None if rule.spread is None else rule.spread[heads],
            )
            k, v = (x[:, heads].gather(2, places) for x in (key, value))
            asking = slice(heads.start * ratio, heads.stop * ratio)
            q = query[:, asking, chosen]
            out[:, chosen, asking] = _one_offset(q, k, v, part, scale, 0, slice(None))
            if memory.reads_attention:
                assert rule.attends is not None
                received = _received(q, k, part, scale, rule.attends[rows][:, chosen])
                memory.receive(heads, entries.cpu().numpy(), received.cpu().numpy())
        if memory.observes:
            assert rule.attends is not None
            told = chosen & (positions >= 0)
            memory.observe(query[0, :, told], rule.attends[rows][0, told], key[0], scale)
    return out


@torch.no_grad()
def _received(query: Tensor, key: Tensor, rule: BlockRule, scale: float, attends: Tensor) -> Tensor:
    """(G, S) attention probability that each key of one sequence receives, summed over queries."""
    b, h, t, k = query.shape
    g = key.shape[1]
    summaries = summarise(key, rule.effector.summary)
    rank = rank_blocks(query, summaries, rule.positions, scale, nearest=rule.nearest)
    blocks = rule.blocks(slice(None), g)
    allowed = _allowed(rank, blocks, rule.positions, key.shape[2], rule.window)
    grouped = query.reshape(b, g, h // g, t, k)
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)) * scale
    exact = torch.promote_types(scores.dtype, torch.float32)
    chances = scores.to(exact).masked_fill(~allowed, -torch.inf).softmax(-1)
    return (chances * attends[:, None, None, :, None]).sum((0, 2, 3))


def _allowed(
    rank: Tensor, kv_blocks: Tensor, positions: Tensor, length: int, window: int
) -> Tensor:
    """(B, G, 1, T, S) which of the first S keys each query reads.

    Args:
        rank: (B, T, G, N) of blocks, see `blocks.rank_blocks`.
        kv_blocks: (B, T, G) blocks read.
        positions: (B, T) of the queries.
        length: S.
        window: Newest positions that a query sees; 0 for all.
    """
    slots = torch.arange(length, device=rank.device)
    blocks = selected_blocks(rank, kv_blocks)  # (B, T, G, N)
    shown = _shown(slots, positions, window)
    allowed = blocks.permute(0, 2, 1, 3)[:, :, None, :, slots // BLOCK] & shown
    # Padding queries have no position of their own; let them see slot 0 rather than nothing.
    return allowed | ((slots == 0) & (positions[:, None, None, :, None] <= 0))


def _shown(slots: Tensor, positions: Tensor, window: int) -> Tensor:
    """(B, 1, 1, T, S) which of slots (S,) causality and the window show queries (B, T)."""
    places = positions[:, None, None, :, None]
    shown = slots <= places
    return shown & (slots > places - window) if window else shown


def _one_offset(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: BlockRule,
    scale: float,
    offset: int,
    rows: slice,
) -> Tensor:
    b, h, t, k = query.shape
    g = key.shape[1]
    positions = rule.positions[rows]
    length = int(positions.max()) + 1  # a static cache is longer than what was written
    gone = offset + length - key.shape[2]
    if gone > 0:  # the cache of a windowed layer keeps the newest entries; no query sees the others
        key, value = (nn.functional.pad(x, (0, 0, gone, 0)) for x in (key, value))
    key, value = key[:, :, offset : offset + length], value[:, :, offset : offset + length]
    with torch.no_grad():
        summaries = summarise(key, rule.effector.summary)
        rank = rank_blocks(
            query, summaries, positions, scale, window=rule.window, nearest=rule.nearest
        )
    if rule.kv_blocks is not None:
        allowed = _allowed(rank, rule.blocks(rows, g), positions, length, rule.window)
        # Query heads that share a KV head become the heads of one batch entry: no repeated keys.
        shared = (b * g, h // g, length, k)
        out = nn.functional.scaled_dot_product_attention(
            query.reshape(b * g, h // g, t, k),
            key.reshape(b * g, 1, length, k).expand(shared),
            value.reshape(b * g, 1, length, -1).expand(*shared[:3], -1),
            attn_mask=allowed.reshape(b * g, 1, t, length),
            scale=scale,
        ).reshape(b, h, t, -1)
        return out.transpose(1, 2).contiguous()
    assert rule.level is not None
    slots = torch.arange(length, device=query.device)
    shown = _shown(slots, positions, rule.window)
    grouped = query.reshape(b, g, h // g, t, k)
    seen = visible_blocks(positions.cpu().numpy(), rule.window)
    visible = torch.from_numpy(seen).to(positions.device)
    mask = rule.effector.mask(rule.level[rows], rank, visible, rule.temperature)
    weights = mask.permute(0, 2, 1, 3)[:, :, None, :, slots // BLOCK]  # (B, G, 1, T, S)
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)) * scale
    scores = scores.masked_fill(~shown, -torch.inf)
    # Weights act after the softmax, so that a block of weight 0 still has a gradient towards being
    # read.
    chances = scores.softmax(-1, dtype=torch.float32).to(value.dtype) * weights.to(value.dtype)
    total = chances.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=1e-9)
    out = (chances @ value.unsqueeze(2)) / total.to(value.dtype)  # (B, G, R, T, K)
    return out.reshape(b, h, t, -1).transpose(1, 2).contiguous()
