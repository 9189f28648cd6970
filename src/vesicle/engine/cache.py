"""The key-value cache of one sequence: for each layer and KV head, a list of blocks of 16 entries.

The blocks lie in the engine's pool (`engine.pool`). Each head has its own list, because what is
forgotten in one may be kept in another, and one may hold more than another. Compacting keeps chosen
positions: they are copied, as they are stored, into as few blocks. Keys keep the rotary phases of
their own positions.

A windowed layer holds what its window shows, and lets go of a block when no later query sees it.
Its list then begins at a later position.

A block's place in the list is its *index*; index * 16 + offset is a *slot*. Where nothing was
forgotten a slot is a position; elsewhere it means another position in each head. Slots keep the
order of positions, so causality can be judged by either, and what reads a cache may think in slots
throughout.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.blocks import summarise
from vesicle.engine.core import MOST_TOKENS
from vesicle.engine.pool import BlockPool, summary_dtype
from vesicle.errors import VesicleError
from vesicle.plan import BLOCK, IntArray
from vesicle.retention import alike

_ROOM = 16
"""Entries by which a list grows at least. Room doubles, so that growth is linear on the whole."""


@dataclass
class _Lists:
    """The lists of all heads, kept apart from the cache so that they can be freed after it."""

    tables: IntArray  # (L, G, room) block numbers
    starts: IntArray  # (L, G, room) first position of each block
    n_blocks: IntArray  # (L, G) entries of each list


@dataclass
class _Summaries:
    """Summaries (room, V, K) of the complete blocks of one head, the first `count` made."""

    kind: str
    room: Tensor
    count: int


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """How the complete blocks of one head are compacted."""

    old: IntArray  # what was listed
    new: IntArray  # (n,) what is listed in its place; those that are `moved` are to be named yet
    moved: NDArray[np.intp]  # which of the new ones are filled with entries from several
    mine: IntArray  # blocks that nobody else holds, to be filled
    more: int  # blocks needed beside these
    blocks: IntArray  # (16 moved) where their entries lie
    places: NDArray[np.int64]  # (16 moved) in these blocks


class SequenceCache:
    """Keys and values of all layers of one sequence.

    A pass calls `reserve`, then `append` for each layer, then `advance`. The native core writes
    into the pages itself between `reserve` and `advance`.

    Attributes:
        pool: Where the blocks lie.
        length: Positions that the sequence has passed; the next token's position.
        windows: (L,) newest positions that queries of each layer see; 0 for all.
        evictions: Times that something was evicted, for those who keep what they looked up.
    """

    def __init__(
        self,
        pool: BlockPool,
        n_layers: int,
        n_heads: int,
        windows: NDArray[np.int64] | None = None,
    ) -> None:
        """Start at length 0 in all layers, without any block of `pool`.

        Args:
            pool: Of the engine.
            n_layers: L.
            n_heads: G, KV heads.
            windows: (L,) newest positions that queries of each layer see; 0 for all, as by default.
        """
        self.pool = pool
        self.length = 0
        self.windows = np.zeros(n_layers, np.int64) if windows is None else windows
        self._windowed = np.nonzero(self.windows)[0]
        self._lists = _Lists(
            tables=np.zeros((n_layers, n_heads, _ROOM), np.int32),
            starts=np.zeros((n_layers, n_heads, _ROOM), np.int32),
            n_blocks=np.zeros((n_layers, n_heads), np.int32),
        )
        self._room_end = 0  # a multiple of 16: positions below it have, or had, a block
        self._ends = np.zeros(n_layers, np.int64)  # positions written; ahead of `length` in a pass
        self._evicted = np.zeros((n_layers, n_heads), np.int64)  # blocks
        # (16 n,) of the first n blocks of each head
        self._chosen: list[list[IntArray | None] | None] = [None] * n_layers
        self._compacted = 0  # length at which positions were last chosen
        self._left = np.zeros(n_layers, np.int64)  # blocks that a window has left behind
        self._summaries: list[list[_Summaries | None]] = [[None] * n_heads] * n_layers
        self.evictions = 0
        self._open = True
        self._freer = weakref.finalize(self, _release, pool, self._lists)
        self._freer.atexit = False

    @property
    def n_layers(self) -> int:
        """L, the layers whose keys and values are held."""
        return len(self._ends)

    @property
    def n_heads(self) -> int:
        """G, the KV heads of each layer."""
        return self._evicted.shape[1]

    @property
    def tables(self) -> IntArray:
        """(L, G, room) numbers of the blocks in the pool, in the order of positions.

        The array is replaced when room grows, which only `reserve` does.
        """
        return self._lists.tables

    @property
    def starts(self) -> IntArray:
        """(L, G, room) first position of each block, a multiple of 16, rising.

        Of blocks that hold chosen positions, any such numbers below those of the others.
        """
        return self._lists.starts

    @property
    def n_blocks(self) -> IntArray:
        """(L, G) blocks in each head's list.

        After `reserve(n)` the last is the one of position length + n - 1.
        """
        return self._lists.n_blocks

    def check_open(self) -> None:
        """Refuse to go on once freed.

        Raises:
            VesicleError: If the cache was freed.
        """
        if not self._open:
            raise VesicleError("the sequence is closed; start a new one")

    def blocks_needed(self, n_tokens: int) -> int:
        """Blocks of the pool that reading `n_tokens` more takes, in passes of 128 at most.

        Of one such pass it is what `reserve(n_tokens)` takes. A windowed layer lets go of blocks
        between passes.
        """
        more = max(0, _blocks(self.length + n_tokens) - self._room_end // BLOCK)
        if n_tokens <= MOST_TOKENS or not len(self._windowed):
            return self.n_layers * self.n_heads * more
        # Those of a window, of a pass, and the edges of both. Heads of windowed layers are alike.
        listed = self._lists.n_blocks[:, 0]
        most = (self.windows - 1) // BLOCK + MOST_TOKENS // BLOCK + 3 - listed
        each = np.where(self.windows > 0, np.clip(most, 0, more), more)
        return int(each.sum()) * self.n_heads

    def reserve(self, n_tokens: int) -> None:
        """Make room in every head for exactly `n_tokens` more, or in none.

        Room left over from a pass that was broken off goes back, and so does what it wrote.

        Raises:
            CacheFullError: If the pool has too few free blocks; nothing has changed then.
            VesicleError: If the cache was freed.
        """
        self.check_open()
        if (self._ends != self.length).any():
            self._rewind()
        end = _blocks(self.length + n_tokens) * BLOCK
        n = (end - self._room_end) // BLOCK
        if n == 0:
            return
        lists = self._lists
        if n > 0:
            # A layer's blocks lie side by side, and within it those of one block of tokens: that is
            # how they are read while nothing is forgotten.
            blocks = self.pool.allocate(self.n_layers * self.n_heads * n)
            blocks = blocks.reshape(self.n_layers, n, self.n_heads).swapaxes(1, 2)
            self._grow(int(lists.n_blocks.max()) + n)
            places = lists.n_blocks[..., None] + np.arange(n)
            np.put_along_axis(lists.tables, places, blocks, axis=2)
            starts = (self._room_end + BLOCK * np.arange(n, dtype=np.int32))[None, None]
            np.put_along_axis(lists.starts, places, starts, axis=2)
            lists.n_blocks += n
        else:
            places = lists.n_blocks[..., None] + np.arange(n, 0)
            lists.n_blocks += n
            self.pool.release(np.take_along_axis(lists.tables, places, axis=2).ravel())
        self._room_end = end

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (G, T, K), any float dtype, at positions `length` and on.

        Raises:
            ValueError: If no room was reserved for them.
        """
        first, end = self.length, self.length + keys.shape[1]
        if end > self._room_end:
            raise ValueError(f"room ends at position {self._room_end}; {end} are to be written")
        table, pool = self.tables[layer], self.pool
        heads = np.arange(len(table))
        index = self.n_blocks[layer] - (self._room_end // BLOCK - first // BLOCK)
        at = 0
        while at < end - first:
            offset, left = (first + at) % BLOCK, end - first - at
            whole = left // BLOCK if offset == 0 else 0
            if whole:
                n = whole * BLOCK
                part = slice(at, at + n)
                blocks = table[heads[:, None], index[:, None] + np.arange(whole)]
                pool.write(blocks, keys[:, part], values[:, part])
                index = index + whole
            else:
                n = min(left, BLOCK - offset)
                part = slice(at, at + n)
                pool.write_part(table[heads, index], offset, keys[:, part], values[:, part])
                index = index + 1
            at += n
        self._ends[layer] = end

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` that were written in every layer.

        Raises:
            ValueError: If no room was reserved for them.
        """
        end = self.length + n_tokens
        if end > self._room_end:
            raise ValueError(f"room ends at position {self._room_end}; {end} are to be counted")
        completes = end // BLOCK > self.length // BLOCK
        self.length = end
        self._ends[:] = end
        if completes and len(self._windowed):
            self._leave_behind()

    def _leave_behind(self) -> None:
        """Let go of blocks that no query from the newest whole block on sees.

        Those of the last block that is not whole see no more, and whoever forks there has all.
        """
        lists, whole = self._lists, self.length // BLOCK * BLOCK
        for layer in self._windowed.tolist():
            first = max(0, whole - int(self.windows[layer]) + 1) // BLOCK
            gone, n = first - int(self._left[layer]), int(lists.n_blocks[layer, 0])
            if gone <= 0:
                continue
            self.pool.release(lists.tables[layer, :, :gone].ravel())
            for column in (lists.tables, lists.starts):
                column[layer, :, : n - gone] = column[layer, :, gone:n].copy()
            lists.n_blocks[layer] -= gone
            self._evicted[layer] += gone
            self._left[layer] = first
            self._forget_summaries(layer, gone)

    def _forget_summaries(self, layer: int, gone: int) -> None:
        """Drop the first `gone` of a layer's summaries."""
        for made in self._summaries[layer]:
            if made is not None:
                kept = max(0, made.count - gone)
                made.room[:kept] = made.room[gone : gone + kept].clone()
                made.count = kept

    def begins(self, layer: int) -> bool:
        """Whether a layer's list begins where the text does."""
        return not self._left[layer]

    @property
    def left(self) -> NDArray[np.int64]:
        """(L,) blocks at the beginning that windows have left behind."""
        return self._left

    def held(self, layer: int) -> list[IntArray]:
        """For each KV head of a layer the positions (n,) that it holds in its blocks, rising."""
        chosen = self._chosen[layer] or [None] * self.n_heads
        found: list[IntArray] = []
        for head, (n, first) in enumerate(zip(self._held(layer).tolist(), chosen, strict=True)):
            begin = 0 if first is None else len(first) // BLOCK
            starts = self.starts[layer, head, begin : _blocks(n), None]
            places = (starts + np.arange(BLOCK, dtype=np.int32)).ravel()
            whole = places[: n - begin * BLOCK].astype(np.int32)
            found.append(whole if first is None else np.concatenate([first, whole]))
        return found

    def alike(self, layer: int) -> list[slice]:
        """The KV heads of a layer, those side by side that hold as many blocks together."""
        return alike(self.n_blocks[layer])

    def slots(self, layer: int, head: int, positions: IntArray) -> IntArray:
        """Slots of positions (T,) in blocks of 16 positions that a head holds."""
        if not self._evicted[layer, head]:
            return positions
        starts = self.starts[layer, head, : self.n_blocks[layer, head]]
        index = np.searchsorted(starts, positions // BLOCK * BLOCK)
        return (index * BLOCK + positions % BLOCK).astype(np.int32)

    def read(
        self, layer: int, heads: slice, blocks: NDArray[np.integer], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, 16 N, K) of some KV heads' blocks at N indices, contiguous.

        Positions of a block that were not written hold anything.
        """
        numbers = self.tables[layer, heads][:, blocks]
        return self.pool.read_keys(numbers, dtype), self.pool.read_values(numbers, dtype)

    def summaries(self, layer: int, head: int, summary: str) -> Tensor:
        """Summaries (N, V, K) of the N complete blocks of a head.

        They are made once, as blocks complete, from the keys as they are read back.
        """
        complete, made = int(self._complete(layer)[head]), self._summaries[layer][head]
        most = max(_ROOM, int(self._ends.max()) // BLOCK - int(self._evicted.min()))
        room = 1 << (most - 1).bit_length()
        if made is None or made.kind != summary:
            made = _Summaries(summary, self._summary_room(summary, room), 0)
        if room != len(made.room):
            moved = self._summary_room(summary, room)
            moved[: made.count] = made.room[: made.count]
            made.room = moved
        if complete > made.count:
            fresh = self.tables[layer, head, made.count : complete]
            keys = self.pool.read_keys(fresh, _exact(made.room.dtype))
            made.room[made.count : complete] = summarise(keys, summary)
            made.count = complete
        if self._summaries[layer][head] is not made:
            others = self._summaries[layer]
            self._summaries[layer] = [*others[:head], made, *others[head + 1 :]]
        return made.room[:complete]

    def compact(self, layer: int, kept: Sequence[IntArray]) -> None:
        """Keep chosen positions of a layer's complete blocks and let go of the others for good.

        Blocks that stay as they are stay where they are; the others' entries are copied as they are
        stored, into blocks that were this sequence's own, and into new ones where too many are
        shared. The incomplete last block stays.

        Args:
            layer: Whose lists.
            kept: For each of G KV heads the positions (n,) that it keeps, rising; n a multiple
                of 16, another one for each head.

        Raises:
            CacheFullError: If the pool has no room for the copies of shared blocks, of which at
                most `n_shared` are needed; nothing has changed then.
            ValueError: If n is no multiple of 16, a position is not held in a complete block, or
                the layer is windowed: its window alone says what it holds.
        """
        if self.windows[layer]:
            raise ValueError(f"layer {layer} is windowed, and positions of it are to be kept")
        held, complete = self.held(layer), self._evictable(layer).tolist()
        if len(kept) != len(held):
            raise ValueError(f"{len(kept)} KV heads are to keep positions; allowed: {len(held)}")
        slots = [
            self._slots_of(stays, entries[: n * BLOCK], layer)
            for stays, entries, n in zip(kept, held, complete, strict=True)
        ]
        changed = [g for g, n in enumerate(complete) if len(slots[g]) != n * BLOCK]
        if not changed:
            return
        lists = self._lists
        moves = [self._moves(lists.tables[layer, g, : complete[g]], slots[g]) for g in changed]
        # All that are needed, or none.
        more = self.pool.allocate(sum(move.more for move in moves))
        for move in moves:
            taken, more = more[: move.more], more[move.more :]
            move.new[move.moved] = np.concatenate([move.mine[: len(move.moved)], taken])
        self.pool.regroup(
            np.concatenate([move.blocks for move in moves]),
            np.concatenate([move.places for move in moves]),
            np.concatenate([move.new[move.moved] for move in moves]),
        )
        for g, move in zip(changed, moves, strict=True):
            self._relist(layer, g, complete[g], move.new)
            self.pool.release(np.setdiff1d(move.old, move.new))
        chosen = self._chosen[layer]
        before = [None] * len(held) if chosen is None else chosen
        self._chosen[layer] = [
            kept[g].astype(np.int32) if g in changed else before[g] for g in range(len(held))
        ]
        self._compacted = self.length
        self._summaries[layer] = [None] * len(held)
        self.evictions += 1

    def _slots_of(self, positions: IntArray, entries: IntArray, layer: int) -> NDArray[np.int64]:
        """Where the entries (n,) of one head that are to stay lie among those held, rising.

        Raises:
            ValueError: If they are no whole blocks, not held, or do not rise.
        """
        if positions.ndim != 1 or len(positions) % BLOCK:
            raise ValueError(
                f"positions of shape {positions.shape} are to be kept; allowed: (n,), n a multiple "
                f"of {BLOCK}"
            )
        slots = np.searchsorted(entries, positions)
        there = slots < len(entries)
        if not there.all() or (entries[slots] != positions).any() or (np.diff(slots) <= 0).any():
            raise ValueError(
                f"positions that layer {layer} does not hold in complete blocks are to be kept, or "
                "they do not rise"
            )
        return slots

    def _moves(self, blocks: IntArray, slots: NDArray[np.int64]) -> _Moves:
        """How one head's complete `blocks` come to hold the entries of some slots alone."""
        old = blocks.copy()
        # A block all of whose entries stay together is not touched, and may be shared.
        pages = slots.reshape(-1, BLOCK)
        first = pages[:, 0]
        same = (first % BLOCK == 0) & (pages == first[:, None] + np.arange(BLOCK)).all(1)
        new = old[first // BLOCK]
        moved = np.nonzero(~same)[0]
        places = pages[moved].ravel()
        mine = np.setdiff1d(old[self.pool.holders(old) == 1], new[same])
        return _Moves(
            old=old,
            new=new,
            moved=moved,
            mine=mine,
            more=max(0, len(moved) - len(mine)),
            blocks=old[places // BLOCK],
            places=places % BLOCK,
        )

    def _relist(self, layer: int, head: int, complete: int, new: IntArray) -> None:
        """Put `new` blocks in the place of the first, complete ones of a list."""
        lists, n = self._lists, len(new)
        total = int(lists.n_blocks[layer, head])
        left = total - complete + n
        for column in (lists.tables, lists.starts):
            column[layer, head, n:left] = column[layer, head, complete:total].copy()
        lists.tables[layer, head, :n] = new
        lists.starts[layer, head, :n] = BLOCK * np.arange(n)
        lists.n_blocks[layer, head] = left
        self._evicted[layer, head] += complete - n

    @property
    def n_shared(self) -> int:
        """Blocks that other sequences hold as well."""
        lists = self._lists
        listed = np.arange(lists.tables.shape[2]) < lists.n_blocks[..., None]
        return int((self.pool.holders(lists.tables[listed]) > 1).sum())

    def fork(self, n_tokens: int) -> SequenceCache:
        """A cache of the first `n_tokens` positions, as far as they are held.

        Complete blocks are shared, an incomplete last one is copied. Neither sequence ever writes
        into a complete block, so both go on as they like.

        Raises:
            CacheFullError: If the pool has no room for the copy.
            ValueError: If this cache is shorter, or compacted later on, or a part of an evicted
                block would be needed.
        """
        self.check_open()
        if not 0 <= n_tokens <= self.length:
            raise ValueError(f"{n_tokens} tokens are to be shared; allowed: {self._shareable}")
        if n_tokens < self._compacted:
            raise ValueError(
                f"{n_tokens} tokens are to be shared, but entries were forgotten after "
                f"{self._compacted}"
            )
        if not self.reaches(n_tokens):
            raise ValueError(
                f"{n_tokens} tokens are to be shared, and a window has left behind what the "
                f"next sees; allowed: {self._shareable}"
            )
        lists, edge = self._lists, n_tokens // BLOCK * BLOCK
        places = np.arange(lists.starts.shape[2])
        held = places < lists.n_blocks[..., None]
        shared = (held & (lists.starts < edge)).sum(2)  # (L, G) leading entries
        fork = SequenceCache(self.pool, self.n_layers, self.n_heads, self.windows)
        n = int(shared.max())
        fork._grow(n + 1)
        mine = fork._lists
        mine.tables[..., :n], mine.starts[..., :n] = lists.tables[..., :n], lists.starts[..., :n]
        if n_tokens > edge:
            there = (held & (lists.starts == edge)).any(2)
            if not there.all():
                raise ValueError(
                    f"{n_tokens} tokens are to be shared, but layer {np.argmin(there.all(1))} has "
                    f"evicted the block of positions {edge} to {edge + BLOCK - 1}"
                )
            tail, last = self.pool.allocate(shared.size), shared[..., None]
            self.pool.copy(np.take_along_axis(lists.tables, last, axis=2).ravel(), tail)
            np.put_along_axis(mine.tables, last, tail.reshape(last.shape), axis=2)
            np.put_along_axis(mine.starts, last, edge, axis=2)
        self.pool.retain(lists.tables[places < shared[..., None]])
        mine.n_blocks[:] = shared + (n_tokens > edge)
        fork.length, fork._room_end = n_tokens, _blocks(n_tokens) * BLOCK
        fork._ends[:] = n_tokens
        fork._evicted[:] = edge // BLOCK - shared
        fork._chosen, fork._compacted = list(self._chosen), self._compacted
        fork._left = np.minimum(self._left, edge // BLOCK)
        return fork

    def reaches(self, n_tokens: int) -> bool:
        """Whether windowed layers hold all that the query at position `n_tokens` sees."""
        return n_tokens == 0 or n_tokens >= self._reached_from

    @property
    def _reached_from(self) -> int:
        """The least length but 0 whose next query sees nothing that a window has left behind."""
        passed = self._left > 0
        return int((self._left * BLOCK + self.windows - 1)[passed].max(initial=0))

    @property
    def _shareable(self) -> str:
        """The lengths at which a fork can begin, for messages."""
        least = max(self._reached_from, self._compacted)
        if not least:
            return f"0 to {self.length}"
        return f"{'' if self._compacted else '0, or '}{least} to {self.length}"

    def free(self) -> None:
        """Let go of every block; doing it again does nothing.

        It also happens when the cache is dropped.
        """
        self._open = False
        self._freer()
        self._summaries = [[None] * self.n_heads] * self.n_layers

    @property
    def bytes_held(self) -> int:
        """Bytes of the positions held, as `cost.Cost` prices them."""
        if not self._open:
            return 0
        forgotten = BLOCK * (self._evicted - self._left[:, None])
        seen = np.where(self.windows > 0, np.minimum(self.windows, self.length), self.length)
        return int((seen[:, None] - forgotten).sum()) * self.pool.bytes_per_block // BLOCK

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the blocks in the lists, filled or not, shared or not."""
        return int(self.n_blocks.sum()) * self.pool.bytes_per_block

    @property
    def summary_bytes(self) -> int:
        """Bytes that the summaries take, room to grow included."""
        every = (made for heads in self._summaries for made in heads)
        return sum(made.room.nbytes for made in every if made is not None)

    def _held(self, layer: int) -> NDArray[np.int64]:
        """(G,) positions that heads hold."""
        return (self._ends[layer] - BLOCK * self._evicted[layer]) * self._open

    def _complete(self, layer: int) -> NDArray[np.int64]:
        """(G,) complete blocks in lists."""
        return self._held(layer) // BLOCK

    def _evictable(self, layer: int) -> NDArray[np.int64]:
        """(G,) complete blocks but for those that a pass under way has written.

        It may be broken off.
        """
        return np.minimum(self._complete(layer), self.length // BLOCK - self._evicted[layer])

    def _grow(self, n: int) -> None:
        """Make room for `n` entries in each list."""
        lists, room = self._lists, self._lists.tables.shape[2]
        if n <= room:
            return
        more = np.zeros((self.n_layers, self.n_heads, max(n, 2 * room) - room), np.int32)
        lists.tables = np.concatenate([lists.tables, more], axis=2)
        lists.starts = np.concatenate([lists.starts, more], axis=2)

    def _rewind(self) -> None:
        """Forget what a pass that was broken off has written beyond `length`."""
        self._ends[:] = self.length
        for layer, heads in enumerate(self._summaries):
            for made, complete in zip(heads, self._complete(layer).tolist(), strict=True):
                if made is not None:
                    made.count = min(made.count, complete)

    def _summary_room(self, summary: str, n: int) -> Tensor:
        pool, vectors = self.pool, 1 if summary == "mean" else 2
        with torch.inference_mode(False):
            size = (n, vectors, pool.values.shape[2])
            return torch.empty(size, dtype=summary_dtype(pool.kv), device=pool.values.device)


def _blocks(n_positions: int) -> int:
    """Blocks that hold `n_positions`."""
    return -(-n_positions // BLOCK)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What summaries of a dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _release(pool: BlockPool, lists: _Lists) -> None:
    pool.release(lists.tables[np.arange(lists.tables.shape[2]) < lists.n_blocks[..., None]])
    lists.n_blocks[:] = 0
