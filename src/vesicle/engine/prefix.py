"""Prefix reuse: a request starts from blocks that an earlier one with the same opening computed.

Keys, values, levels and Plan rows of a token depend on the tokens up to it, on the method and,
where that minds, on which of them were prompt. They depend on nothing else, so two requests under
one method whose texts begin alike have the same cache there.
The index keeps *snapshots*: sequences forked at whole blocks of 16 tokens, which share their blocks
with whoever computed them by reference count. A snapshot that a longer one continues is dropped,
for the longer one serves the same readers. Windowed layers hold what follows a snapshot's end alone
sees: there a snapshot serves those who go on from its end, and the shorter one stays. Under a byte
limit, or when the pool runs short, the least recently used snapshot goes first.

Reused are sequences of `Dense` and of modulators (trained or controls) at one position of the dial.
A modulator is known by identity, so one that is trained further in place needs a `clear`. Not
reused are methods that carry state from token to token (a recurrent predictor), whose state at an
earlier block is gone; sequences that have forgotten entries; and methods of other kinds (retention
among them), of which it is not known when two are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vesicle.engine.engine import Engine
from vesicle.engine.sequence import Sequence
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.plan import BLOCK, Dense, IntArray, Method


@dataclass(frozen=True, eq=False)
class _Snapshot:
    identity: Hashable
    ids: IntArray
    sequence: Sequence


class PrefixIndex:
    """Snapshots of one engine's sequences, found by method and opening tokens."""

    def __init__(self, engine: Engine, limit_bytes: int | None = None) -> None:
        """Empty.

        Args:
            engine: Whose sequences are kept.
            limit_bytes: Most bytes of keys and values to hold; None for what the pool can spare.

        Raises:
            VesicleError: If the limit is negative.
        """
        if limit_bytes is not None and limit_bytes < 0:
            raise VesicleError(f"prefix cache limit is {limit_bytes} bytes; allowed: 0 and above")
        self.engine = engine
        self.limit_bytes = limit_bytes
        self._snapshots: list[_Snapshot] = []  # least recently used first
        self._holders: Counter[int] = Counter()  # block to the snapshots that share it

    def __len__(self) -> int:
        """Snapshots held."""
        return len(self._snapshots)

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values of all snapshots; a block that several share counts once."""
        return len(self._holders) * self.engine.pool.bytes_per_block

    def start(self, method: Method, prompt: ArrayLike, beyond: int = 0) -> Sequence | None:
        """A sequence that has already read the longest known opening of a prompt.

        At least the prompt's last token is left to be read, for its logits.

        Args:
            method: Of the new sequence.
            prompt: (T,) token ids.
            beyond: Tokens that a match must exceed to be worth having.

        Returns:
            A sequence of its own, or None where nothing matches.
        """
        key, ids = _identity(method), np.asarray(prompt)
        if key is None:
            return None
        ids = ids[: (len(ids) - 1) // BLOCK * BLOCK]
        found, n = None, beyond
        for snapshot in reversed(self._snapshots):  # of equals the newest, so that others may age
            if snapshot.identity != key or (m := _common(snapshot.ids, ids)) <= n:
                continue
            if snapshot.sequence.cache.reaches(m):
                found, n = snapshot, m
        if found is None:
            return None
        self._touch(found)
        return self.engine.fork(found.sequence, n)

    def add(self, sequence: Sequence) -> None:
        """Keep what a sequence has read, in whole blocks, as far as the limit allows.

        Nothing is copied, and the sequence may go on or be closed.
        """
        key, n = _identity(sequence.method), _alike(sequence) // BLOCK
        if self.limit_bytes is not None:
            shape = self.engine.shape
            column = shape.n_layers * shape.n_kv_heads * self.engine.pool.bytes_per_block
            n = min(n, self.limit_bytes // column)
        cache = sequence.cache
        if key is None or not n or not _whole(sequence) or not cache.reaches(n * BLOCK):
            return
        ids = np.array(sequence.token_ids[: n * BLOCK])
        for snapshot in [s for s in self._snapshots if s.identity == key]:
            common = _common(snapshot.ids, ids)
            if common == len(ids):
                return self._touch(snapshot)
            if common == len(snapshot.ids) and cache.reaches(common):
                self._drop(snapshot)
        snapshot = _Snapshot(key, ids, self.engine.fork(sequence, len(ids)))
        self._snapshots.append(snapshot)
        self._holders.update(_blocks(snapshot.sequence))
        while self.limit_bytes is not None and self.bytes_held > self.limit_bytes:
            self.evict()

    def evict(self) -> bool:
        """Give up the least recently used snapshot; False if there is none.

        Blocks that other sequences share stay with them.
        """
        if self._snapshots:
            self._drop(self._snapshots[0])
            return True
        return False

    def clear(self) -> None:
        """Give up all snapshots; blocks that other sequences share stay with them."""
        while self.evict():
            pass

    def _touch(self, snapshot: _Snapshot) -> None:
        self._snapshots.remove(snapshot)
        self._snapshots.append(snapshot)

    def _drop(self, snapshot: _Snapshot) -> None:
        self._snapshots.remove(snapshot)
        self._holders -= Counter(_blocks(snapshot.sequence))  # keeps what is above zero
        snapshot.sequence.close()


def _identity(method: Method) -> Hashable | None:
    """Equal for methods that decide alike; None where that is not known."""
    match method:
        case ModulatorMethod():
            return method.modulator, method.dial, method.phases, method.reading
        case Dense() if type(method) is Dense:  # what is made of it may decide otherwise
            return Dense
    return None


def _alike(sequence: Sequence) -> int:
    """Tokens from the beginning that the prompt of another request would have treated alike.

    Where a prompt is decided in another way than what is generated after it, its own tokens only.
    """
    method = sequence.method
    minds = isinstance(method, ModulatorMethod) and not (method.at_rest or method.counts_prompt)
    return min(sequence.length, sequence.prompts.opening_prompt) if minds else sequence.length


def _whole(sequence: Sequence) -> bool:
    """Whether all that a sequence was at its earlier tokens is still there.

    Neither entries forgotten nor a predictor's state carried on.
    """
    cache = sequence.cache
    return not sequence.author.carries_state and bool(
        (cache.n_blocks + cache.left[:, None] == -(-sequence.length // BLOCK)).all()
    )


def _common(first: IntArray, second: IntArray) -> int:
    """Length of the common opening, in whole blocks."""
    n = min(len(first), len(second))
    same = first[:n] == second[:n]
    return (n if same.all() else int(same.argmin())) // BLOCK * BLOCK


def _blocks(sequence: Sequence) -> list[int]:
    """The numbers of its blocks in the pool, of all layers."""
    cache = sequence.cache
    held = np.arange(cache.tables.shape[2]) < cache.n_blocks[..., None]
    return cache.tables[held].tolist()
