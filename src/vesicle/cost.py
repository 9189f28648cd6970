"""The ledger: what a Plan costs, in floating-point operations and in bytes.

`price` computes the cost of a Plan from its fields alone; the engine counts the same fields from
the operands that it really touches; a test holds the two equal. Conventions, the same for both and
for the dense model:

- A multiply and an add are two FLOPs. Counted: every projection, attention scores and values, block
  selection, small modules, the modulator's predictor and the language-model (LM) head. Not counted:
  norms, rotary phases, activations, softmax and residual sums (under 1 % of a decoder's
  arithmetic).
- Weight bytes are counted per token, as batch-1 decoding reads them; a pass over many tokens may
  serve several tokens from one read. A packed weight carries one bit of group scale and offset (two
  fp16 numbers for 32 weights) and is read in planes of four bits: 5 bits for the leading plane, 9
  for both. Of a dense weight, fewer than 16 bits are charged as b + 1.
- KV bytes read are the keys and values of visited blocks, with their scales, and the summaries read
  to choose them, head by head; KV bytes held are those of the whole cache after the last token.
  Entries that the Plan has forgotten, or a layer's window has left behind, are neither read nor
  held: a query visits and chooses among what is left, in each KV head.
- Where a forgetter reads attention, scores are worked out and keys read a second time. A query that
  it observes is charged, once it was asked, with scores against all entries that were held up to
  the query's own, and with their keys. Where it reads entries, those of each token are read a
  second time, once it was asked. What a forgetter makes of all that is its own affair.
- The LM head is paid for each position whose logits are asked for. With m survivors it reads the
  leading plane of all rows and the trailing plane of m, and multiplies those m again. With a
  preview of k directions it multiplies k (D + V) weights, and m rows.
- Small modules are stored like dense weights, and beside packed ones in fp32, or in 4-bit codes if
  they lie on such a grid.

With k channels read, width D, query width HK, key-value width GK and FFN width F, one token in one
layer costs 2 k (HK + 2 GK) + 2 k' D + 4 HK S for attention over S positions, and 2 k'' (1 or 2) F +
2 k''' D for a plain or gated FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import BLOCK, FFN_BIG, FFN_SMALL, Plan
from vesicle.plan.events import evict_after_of
from vesicle.plan.spread import as_array, blocks_of_heads
from vesicle.plan.windows import seen, visible_blocks, whole_blocks
from vesicle.shapes import ModelShape, Overhead


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Executed work, summed over the tokens it was counted for.

    Attributes:
        flops_linear: The model's own projections.
        flops_attention: Scores and weighted values.
        flops_selection: Choosing KV blocks.
        flops_evidence: Attention scores worked out again for a forgetter.
        flops_standin: Small modules in place of skipped ones.
        flops_modulator: The predictor.
        flops_head: The LM head.
        weight_bytes: Weights read, counted per token.
        kv_bytes_read: Keys, values and block summaries read.
        kv_bytes_held: Keys and values in the cache at the end.
    """

    flops_linear: int = 0
    flops_attention: int = 0
    flops_selection: int = 0
    flops_evidence: int = 0
    flops_standin: int = 0
    flops_modulator: int = 0
    flops_head: int = 0
    weight_bytes: int = 0
    kv_bytes_read: int = 0
    kv_bytes_held: int = 0

    @property
    def flops_total(self) -> int:
        """FLOPs of all seven kinds together: the sum of the `flops_` fields."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name.startswith("flops_"))

    @property
    def bytes_read(self) -> int:
        """Weights and KV read: what a memory-bound decode step waits for."""
        return self.weight_bytes + self.kv_bytes_read

    def __add__(self, other: Cost) -> Cost:
        """Work done first here, then there; the cache held is the larger."""
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        total["kv_bytes_held"] = max(self.kv_bytes_held, other.kv_bytes_held)
        return Cost(**total)

    def summary(self) -> dict[str, int]:
        """Every field and the totals, as JSON writes them."""
        return {**asdict(self), "flops_total": self.flops_total, "bytes_read": self.bytes_read}

    def ratio(self, dense: Cost) -> dict[str, float]:
        """Share of the dense cost, for the four quantities that reports show."""
        return {
            "flops": self.flops_total / max(dense.flops_total, 1),
            "weight_bytes": self.weight_bytes / max(dense.weight_bytes, 1),
            "kv_bytes_read": self.kv_bytes_read / max(dense.kv_bytes_read, 1),
            "kv_bytes_held": self.kv_bytes_held / max(dense.kv_bytes_held, 1),
            "bytes_read": self.bytes_read / max(dense.bytes_read, 1),
        }


def visited_positions(
    kv_blocks: NDArray[np.integer], positions: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Cached positions that a query at `positions` reads when it chooses `kv_blocks` blocks.

    All blocks but the query's own are complete, and its own is always among those visited. Where
    entries were forgotten, `positions` are slots: how many entries lie before the query's own. (In
    a windowed layer, who reads all that it sees reads `windows.seen`.)
    """
    return ((kv_blocks.astype(np.int64) - 1) * BLOCK + positions % BLOCK + 1).astype(np.int64)


def held_before(plan: Plan, shape: ModelShape, first_position: int = 0) -> NDArray[np.int64]:
    """(T, L, G or 1) entries of each KV head that are held when a token's own entry is added.

    Entries of before `first_position` are taken to be held. 1 where heads do not differ.
    """
    t = plan.n_tokens
    places = first_position + np.arange(t, dtype=np.int64)[:, None, None]
    held = np.broadcast_to(places, (*plan.ffn.shape, 1))
    return held - _forgotten(plan, shape, first_position)[:t] if plan.forgets else held


def _forgotten(plan: Plan, shape: ModelShape, first_position: int) -> NDArray[np.int64]:
    """(T + 1, L, G or 1) of the Plan's entries, those gone before each token and after the last."""
    size = plan.n_tokens, plan.n_layers, shape.n_kv_heads
    evict_after = evict_after_of(plan.events, *size).astype(np.int64)
    t, n_layers, heads = evict_after.shape
    # An entry is gone for the first query after the last that reads it.
    gone = np.clip(evict_after + 1 - first_position, 0, t + 1)
    ends = np.zeros((t + 2, n_layers, heads), np.int64)
    np.add.at(ends, (gone, np.arange(n_layers)[:, None], np.arange(heads)), 1)
    return ends[: t + 1].cumsum(0)


def _of_all_heads(counts: NDArray[np.int64], shape: ModelShape) -> NDArray[np.int64]:
    """(T,) or (T, L), of counts (T, ..., G or 1), the sum over all KV heads."""
    return counts.sum(-1) * (shape.n_kv_heads // counts.shape[-1])


def _told(overhead: Overhead, newest: int, first_position: int, n_tokens: int) -> NDArray[np.bool_]:
    """(T,) of which tokens a forgetter was told that is told of the `newest` when it is asked."""
    if not newest:
        return np.zeros(n_tokens, bool)
    positions = first_position + np.arange(n_tokens)
    asked = (positions // overhead.interval + 1) * overhead.interval
    return (asked - positions <= newest) & (asked <= first_position + n_tokens)


def price_tokens(
    plan: Plan,
    shape: ModelShape,
    overhead: Overhead | None = None,
    *,
    first_position: int = 0,
    with_logits: NDArray[np.bool_] | None = None,
    released: NDArray[np.bool_] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """The cost of each token of a Plan.

    Args:
        plan: T tokens in L layers.
        shape: The model's sizes.
        overhead: What the method adds; nothing by default.
        first_position: Position of the Plan's first token in its sequence.
        with_logits: (T,) which positions the LM head runs for; all by default.
        released: (T,) at which tokens the method's predictor runs; all by default.

    Returns:
        For each field of `Cost` but `kv_bytes_held`, an array (T,).
    """
    overhead = overhead or Overhead()
    t = plan.n_tokens
    heads = np.ones(t, bool) if with_logits is None else with_logits
    channels, runs = plan.channels.astype(np.int64), plan.attention.astype(np.int64)  # (T, L, 4)
    outputs = np.array(shape.site_outputs, np.int64)
    big, small = plan.ffn == FFN_BIG, plan.ffn == FFN_SMALL

    # A skipped attention layer still writes keys and values, so it reads their share of
    # attention_in.
    width = np.broadcast_to(outputs, channels.shape).copy()  # (T, L, 4) outputs fed per channel
    width[..., 0] = np.where(runs == 1, outputs[0], 2 * shape.kv_width)
    width[..., 1] *= runs
    width[..., 2] *= big
    width[..., 3] *= big
    weights = channels * width
    bits_read = (weights * shape.charged_bits(plan.bits)).sum((1, 2))
    # Where the head cannot be previewed or screened, the full one runs whatever the Plan says.
    asked = heads.astype(np.int64)
    exact = np.maximum(plan.likeliest, plan.logits) * asked * (overhead.head_rank > 0)
    survivors = plan.head * asked * shape.screens_head * (exact == 0)
    head_flops, head_bits = shape.price_head(overhead, asked, survivors, exact)
    bits_read += head_bits

    held = held_before(plan, shape, first_position)  # (T, L, G or 1)
    windows = shape.layer_windows[:, None]
    visible = visible_blocks(held, windows)
    blocks = blocks_of_heads(plan.kv_blocks[..., None], visible, as_array(overhead.spread))
    chooses = blocks < visible
    complete = np.where(chooses, whole_blocks(held, windows), 0)
    complete = _of_all_heads(complete, shape) * runs  # (T, L)
    visited = np.where(chooses, visited_positions(blocks, held), seen(held, windows))
    visited = _of_all_heads(visited, shape) * runs
    instead = small.sum(1) * overhead.small_ffn_weights
    coded = instead * int(overhead.small_ffn_coded and shape.stored_bits is not None)
    instead = instead + (1 - runs).sum(1) * overhead.small_attention_weights
    full = shape.layer_windows == 0  # layers whose forgetters are told
    vectors, told = overhead.selection_vectors, overhead.reads_attention * full
    observed = _told(overhead, overhead.observes, first_position, t)[:, None] & full
    entries = overhead.interval if overhead.reads_entries else 0
    again = _told(overhead, entries, first_position, t) * int(full.sum()) * shape.n_kv_heads
    rescored = (visited * told + _of_all_heads(held + 1, shape) * runs * observed).sum(1)
    releases = plan.n_layers * (np.ones(t, np.int64) if released is None else released)
    weight_bytes = (
        bits_read // 8
        + shape.small_module_bytes(instead, coded)
        + overhead.modulator_bytes * releases
    )
    return {
        "flops_linear": 2 * weights.sum((1, 2)),
        "flops_attention": 4 * shape.queries_of_a_head * visited.sum(1),
        "flops_selection": 2 * vectors * shape.queries_of_a_head * complete.sum(1),
        "flops_evidence": 2 * shape.queries_of_a_head * rescored,
        "flops_standin": 2 * instead,
        "flops_modulator": overhead.modulator_flops * releases,
        "flops_head": head_flops,
        "weight_bytes": weight_bytes,
        "kv_bytes_read": shape.entry_bytes * (visited.sum(1) + again)
        + shape.entry_bytes // 2 * rescored
        + shape.summary_vector_bytes * vectors * complete.sum(1),
    }


def price_dense_tokens(
    shape: ModelShape, first_position: int, with_logits: NDArray[np.bool_]
) -> dict[str, NDArray[np.int64]]:
    """The cost of each token of the dense model, from `first_position` on.

    Args:
        shape: The model's sizes.
        first_position: Of the first token.
        with_logits: (T,) at which of the tokens the LM head runs.
    """
    rest = Plan.rest(shape, first_position + len(with_logits)).tokens(first_position)
    return price_tokens(rest, shape, first_position=first_position, with_logits=with_logits)


def flops_of(costs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """(T,) all FLOPs of each token, from what `price_tokens` gives."""
    rows = [values for name, values in costs.items() if name.startswith("flops_")]
    return np.sum(rows, axis=0, dtype=np.int64) if rows else np.zeros(0, np.int64)


def price(
    plan: Plan,
    shape: ModelShape,
    overhead: Overhead | None = None,
    *,
    first_position: int = 0,
    with_logits: NDArray[np.bool_] | None = None,
    released: NDArray[np.bool_] | None = None,
) -> Cost:
    """The total cost of a Plan; arguments as in `price_tokens`."""
    tokens = price_tokens(
        plan,
        shape,
        overhead,
        first_position=first_position,
        with_logits=with_logits,
        released=released,
    )
    held = shape.entries_held(first_position + plan.n_tokens) * shape.n_kv_heads
    if plan.forgets:
        held -= int(_of_all_heads(_forgotten(plan, shape, first_position)[-1], shape).sum())
    return Cost(
        kv_bytes_held=held * shape.entry_bytes,
        **{name: int(v.sum()) for name, v in tokens.items()},
    )


def kv_bytes_peak(plan: Plan, shape: ModelShape) -> int:
    """The most bytes of keys and values that a Plan ever holds, from position 0 on."""
    held = seen(held_before(plan, shape), shape.layer_windows[:, None])  # with the token's own
    return int(_of_all_heads(held, shape).sum(1).max(initial=0)) * shape.entry_bytes


def price_dense(
    shape: ModelShape,
    n_tokens: int,
    *,
    first_position: int = 0,
    with_logits: NDArray[np.bool_] | None = None,
) -> Cost:
    """The cost of the dense model on the same tokens."""
    rest = Plan.rest(shape, first_position + n_tokens).tokens(first_position)
    return price(rest, shape, first_position=first_position, with_logits=with_logits)


@lru_cache(maxsize=4096)
def price_dense_span(shape: ModelShape, start: int, stop: int, head: int) -> Cost:
    """The cost of the dense model on tokens `start` to `stop`, with logits from `head` on."""
    if start == stop:
        return Cost()
    heads = np.arange(start, stop) >= head
    return price_dense(shape, stop - start, first_position=start, with_logits=heads)
