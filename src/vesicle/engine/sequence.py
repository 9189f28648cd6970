"""One text being processed: its author, its cache, its Plan and what it has cost so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.cost import Cost, flops_of, price_dense_tokens
from vesicle.engine.cache import SequenceCache
from vesicle.engine.chunk import ChunkBuffer
from vesicle.engine.counters import reread, rescored
from vesicle.engine.observed import Observed
from vesicle.engine.received import Received
from vesicle.errors import VesicleError
from vesicle.phases import ALL, GENERATED, PROMPT, Spans
from vesicle.plan import BLOCK, FOREVER, Author, FloatArray, IntArray, Method, Plan, PlanBuilder
from vesicle.plan.events import Events
from vesicle.plan.forgetting import Entries, ask, forgetter_of, with_evidence
from vesicle.retention import eviction_lengths, held_entries
from vesicle.transmitters import NAMES

if TYPE_CHECKING:
    from vesicle.engine.engine import Engine


class Sequence:
    """One text being processed.

    Its method's author, its cache, its Plan and its counted cost so far. Its cache is freed by
    `close`, or when the sequence is dropped.

    Attributes:
        prompts: Which of its tokens are prompt (see `vesicle.phases`).
        taken_over: Leading tokens that a fork has from another sequence, whose work they are.
        evicts_at: The next length at which entries of the cache are forgotten, or a forgetter is
            asked which; `FOREVER` for none.
        received: What attention the entries received, where a forgetter wants to know.
        observed: The newest queries, where it wants to know what attention these pay.
        asking: Whether its forgetter is being asked.
        noise: (V,) fp32 by which the pass under way moves its logits where the likeliest token is
            asked for; or None.
    """

    def __init__(self, engine: Engine, method: Method, author: Author | None = None) -> None:
        """Empty; use `Engine.start`, or `Engine.fork`, which brings an author."""
        shape = engine.shape
        self.engine = engine
        self.method = method
        self.stand_ins = method.stand_ins
        self.author = author or method.author(shape)
        self.stand_ins.check(shape)
        self.forgetter = forgetter_of(self.author)
        self.overhead = with_evidence(method.overhead(shape), self.author)
        self.received: Received | None = None
        self.observed: Observed | None = None
        # Of the forgetter, who may not change them any more.
        self._interval, self._reads_entries = 0, False
        self._told = 0  # tokens whose entries it has been told of
        if self.forgetter is not None:
            self._interval = self.forgetter.interval
            if self.forgetter.reads_attention:
                self.received = Received(shape)
            if self.forgetter.observes:
                self.observed = Observed(shape, self.forgetter.observes)
            self._reads_entries = self.forgetter.reads_entries
        # Of the first of them, at this length.
        self._answers: list[tuple[Events, list[IntArray]]] = []
        # (n,) of each KV head of each of them, told but not done yet.
        self._left: list[list[IntArray]] | None = None
        self.asking = False
        self.noise: Tensor | None = None
        self.builder = PlanBuilder(shape, self.author.evict_after)
        self.cache = SequenceCache(
            engine.pool, shape.n_layers, shape.n_kv_heads, shape.layer_windows
        )
        self._full = np.nonzero(shape.layer_windows == 0)[0].tolist()  # layers that may forget
        self.prompts = Spans()
        self.taken_over = 0
        self.evicts_at = FOREVER
        self._evictions = eviction_lengths(self.author.evict_after)
        self._most_bytes = 0
        self.await_eviction()
        self.token_ids: list[int] = []
        self.counted: list[dict[str, NDArray[np.int64]]] = []
        self._buffer: ChunkBuffer | None = None

    def buffer(self) -> ChunkBuffer:
        """What the native core is handed of this sequence."""
        if self._buffer is None:
            self._buffer = ChunkBuffer(self)
        return self._buffer

    def flush(self) -> None:
        """Bring Plan, levels and counts up to date with what the native core has run."""
        if self._buffer is not None:
            with self.engine.lock:
                self._buffer.flush(self)

    def reserve(self, n_tokens: int) -> None:
        """Make room for a pass over exactly `n_tokens` more.

        Raises:
            CacheFullError: If the pool has too few free blocks; nothing has changed then.
        """
        self.cache.reserve(n_tokens)
        if self.received is not None:
            self.received.begin(int(self.cache.n_blocks.max()))

    def advance(self, ids: list[int]) -> None:
        """Count the tokens of a pass that has run."""
        self.cache.advance(len(ids))
        self.token_ids += ids

    def break_off(self) -> None:
        """Forget the pass that it was in; its cache does so by itself."""
        if self.received is not None:
            self.received.undo()
        self.author.rewind(self.length)

    def begin_prompt(self, n_tokens: int, *, scored: bool = True) -> None:
        """Say that the next `n_tokens` tokens are a prompt; the method decides what that changes.

        Args:
            n_tokens: Of the prompt.
            scored: Whether anybody asks what follows the prompt. Its last token is then the first
                of the generated ones.
        """
        self.flush()  # what was decided ahead may not hold any more
        stop = self.length + n_tokens - scored
        self.prompts.add(self.length, stop)
        self.author.prompt(self.length, stop)
        if self.forgetter is not None:
            self.forgetter.prompt(self.length, stop)

    def phase(self, name: str) -> NDArray[np.bool_]:
        """(T,) which of its tokens are of a phase: `prompt`, `generated` or `all`."""
        prompt = self.prompts.contains(np.arange(self.length, dtype=np.int32))
        return {PROMPT: prompt, GENERATED: ~prompt, ALL: np.ones(self.length, bool)}[name]

    @property
    def released(self) -> NDArray[np.bool_]:
        """(T,) at which of its tokens the method's predictor ran."""
        return self.author.releases(np.arange(self.length, dtype=np.int32))

    def await_eviction(self) -> None:
        """Find the next length at which entries are forgotten."""
        length = self.cache.length
        later = (n for n in self._evictions if n > length)
        self.evicts_at = next(later, FOREVER)
        if self.forgetter is not None:
            self.evicts_at = (length // self._interval + 1) * self._interval

    def evict(self) -> None:
        """Forget the entries that no query from here on may read, and free their memory.

        Raises:
            CacheFullError: If the pool has no room for copies of shared blocks. Doing it again goes
                on with it.
            Exception: Whatever its forgetter may raise, who is asked again then.
        """
        if self._left is None:
            self._left = self._known() if self.forgetter is None else self._asked()
        self.cache.check_open()  # perhaps its forgetter has closed it
        self._most_bytes = self.kv_bytes_peak
        for layer, left in zip(self._full, self._left, strict=True):
            self.cache.compact(layer, left)
        self._left = None
        if self.received is not None:
            self.received.clear()
        self.await_eviction()

    def _known(self) -> list[list[IntArray]]:
        """(n,) positions of complete blocks that heads of layers keep, as known beforehand."""
        evict_after, length = self.author.evict_after, self.cache.length
        assert evict_after is not None
        held = [held_entries(evict_after, layer, length) for layer in self._full]
        complete = length // BLOCK * BLOCK
        return [[entries[entries < complete] for entries in heads] for heads in held]

    def _asked(self) -> list[list[IntArray]]:
        """(n,) positions that heads of layers keep, as the forgetter decides; the Plan is told."""
        assert self.forgetter is not None
        self.check_not_asking("read")
        self.flush()
        n_observed = 0 if self.observed is None else self.observed.queries.shape[1]
        runs = self.builder.newest(n_observed)["attention"] == 1  # (w, L)
        scale = self.engine.config.attention_scale
        self.asking = True
        try:
            for layer in self._full[len(self._answers) :]:
                held, received, attention = self.cache.held(layer), None, None
                if self.received is not None:
                    sums = self.received.sums[layer]
                    received = [row[: len(head)] for row, head in zip(sums, held, strict=True)]
                if self.observed is not None:
                    attention = self.observed.attention(self.cache, layer, runs[:, layer], scale)
                entries = self._untold(layer, held) if self._reads_entries else None
                answer = ask(self.forgetter, layer, self.length, held, received, attention, entries)
                self._answers.append(answer)
        finally:
            self.asking = False
        shape = self.engine.shape
        if self.observed is not None:
            self._charge(rescored(shape, self.observed.entries.sum(0)))
        if self._reads_entries:
            each = len(self._full) * shape.n_kv_heads
            self._charge(reread(shape, np.full(self._interval, each, np.int64)))
        self._told = self.length
        answers, self._answers = self._answers, []
        for events, _ in answers:
            self.builder.forget(events)
        return [left for _, left in answers]

    def newest_entries(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """Keys, before rotary phases, and values (G, n, K) of the entries that came last.

        Args:
            layer: Whose.
            n: How many, a multiple of 16 as the sequence's length is; none of them forgotten.
        """
        last = self.cache.n_blocks[layer] - np.arange(n // BLOCK, 0, -1)[:, None]  # (N, G)
        blocks = np.take_along_axis(self.cache.tables[layer], last.T, axis=1)
        return self._read(layer, blocks, np.arange(self.length - n, self.length, dtype=np.int32))

    def _untold(self, layer: int, held: list[IntArray]) -> Entries:
        """Keys, before rotary phases, and values (m, K) of entries that its forgetter is to see.

        Args:
            layer: Whose.
            held: (n,) positions of each KV head's.
        """
        counts = [len(head) - int(np.searchsorted(head, self._told)) for head in held]
        if all(count == self.length - self._told for count in counts):
            keys, values = self.newest_entries(layer, self.length - self._told)
            return list(keys.numpy()), list(values.numpy())
        found = []  # taken over from another forgetter
        for head, (positions, count) in enumerate(zip(held, counts, strict=True)):
            n = len(positions) // BLOCK
            blocks = self.cache.tables[layer, head, n - count // BLOCK : n]
            found.append(self._read(layer, blocks, positions[len(positions) - count :]))
        return [keys.numpy() for keys, _ in found], [values.numpy() for _, values in found]

    def _read(self, layer: int, blocks: IntArray, positions: IntArray) -> tuple[Tensor, Tensor]:
        """Keys, before rotary phases, and values (..., n, K) of blocks (..., n / 16)."""
        pool, dtype = self.engine.pool, torch.promote_types(self.engine.dtype, torch.float32)
        keys, values = pool.read_keys(blocks, dtype), pool.read_values(blocks, dtype)
        config = self.engine.config
        which = config.rotary_layers[layer]
        if which is not None:
            keys = config.rotaries[which].undone(keys, torch.from_numpy(positions))
        return keys, values

    def _charge(self, costs: Mapping[str, NDArray[np.int64]]) -> None:
        """Add the work of telling of the newest w tokens to what these have cost.

        But to none that were taken over: what concerns these is not counted as its own.

        Args:
            costs: (w,) by field of `Cost`.
        """
        self.counted = [self.token_costs]
        for name, more in costs.items():
            own = min(len(more), self.length - self.taken_over)
            self.counted[0][name][self.length - own :] += more[len(more) - own :]

    def check_not_asking(self, what: str) -> None:
        """Refuse what cannot be done with it while its forgetter is asked.

        Raises:
            VesicleError: If it is being asked.
        """
        if self.asking:
            raise VesicleError(f"a sequence is to be {what} whose forgetter is being asked")

    def follow(self, other: Sequence) -> None:
        """Forget as the sequence of which it is a fork, and stand there if that has yet to."""
        self._interval, self.overhead = other._interval, other.overhead
        self._reads_entries = other._reads_entries
        if self._reads_entries:  # what it was told of later is not there yet
            self._told = min(other._told, self.length // self._interval * self._interval)
        self.received = None if other.received is None else other.received.fork()
        self.observed = None if other.observed is None else other.observed.fork()
        self.await_eviction()
        if self.length == other.length >= other.evicts_at:  # it could not when it came here
            self.evicts_at, self._left = other.evicts_at, other._left
            self._answers = list(other._answers)

    @property
    def kv_bytes_peak(self) -> int:
        """The most bytes of keys and values that it ever held."""
        return max(self._most_bytes, self.cache.bytes_held)

    @property
    def length(self) -> int:
        """T, the tokens processed so far, those taken over included."""
        return self.cache.length

    def close(self) -> None:
        """Free its cache.

        Plan, levels and counted work stay; it takes no more tokens, and holds no bytes.
        """
        with self.engine.lock:
            self.cache.free()

    @property
    def plan(self) -> Plan:
        """What was decided for every token."""
        with self.engine.lock:
            self.flush()
            return self.builder.build()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5); empty (0, L, 5) for methods that have none."""
        with self.engine.lock:
            self.flush()
            levels = self.author.levels
        return np.ones((0, self.cache.n_layers, len(NAMES))) if levels is None else levels

    @property
    def token_costs(self) -> dict[str, NDArray[np.int64]]:
        """Counted work of each token (T,), by field of `Cost`."""
        with self.engine.lock:
            self.flush()
            if not self.counted:
                return {}
            return {k: np.concatenate([c[k] for c in self.counted]) for k in self.counted[0]}

    @property
    def dense_token_costs(self) -> dict[str, NDArray[np.int64]]:
        """What the same work on each token (T,) costs the dense model, by field of `Cost`.

        The LM head is priced where it ran. Tokens taken over cost nothing, here as there.
        """
        counted, n = self.token_costs, self.taken_over
        if not counted:
            return {}
        ran = counted["flops_head"][n:] > 0  # a head that runs multiplies something
        dense = price_dense_tokens(self.engine.shape, n, ran)
        return {k: np.concatenate([np.zeros(n, np.int64), v]) for k, v in dense.items()}

    @property
    def token_shares(self) -> FloatArray:
        """(T,) FLOPs of each token over the dense model's; NaN for tokens taken over."""
        with self.engine.lock:  # both of the same tokens
            executed, dense = flops_of(self.token_costs), flops_of(self.dense_token_costs)
        shares = np.full(len(dense), np.nan)
        return np.divide(executed, dense, out=shares, where=dense > 0)

    def cost_of(self, tokens: slice | NDArray[np.bool_]) -> Cost:
        """Counted work of some of the tokens, without the cache held."""
        return Cost(**{name: int(v[tokens].sum()) for name, v in self.token_costs.items()})

    @property
    def cost(self) -> Cost:
        """Counted work of all tokens, and the cache held now."""
        with self.engine.lock:
            return replace(self.cost_of(slice(None)), kv_bytes_held=self.cache.bytes_held)

    def dense_cost_of(self, tokens: slice | NDArray[np.bool_]) -> Cost:
        """What the same work on some of the tokens costs the dense model, without the cache."""
        return Cost(**{name: int(v[tokens].sum()) for name, v in self.dense_token_costs.items()})

    @property
    def dense_cost(self) -> Cost:
        """What the same work on all tokens costs the dense model, and the cache that it holds.

        `cost.ratio(dense_cost)` gives the share of each quantity.
        """
        shape = self.engine.shape
        with self.engine.lock:
            held = shape.entries_held(self.length) * shape.position_bytes
            return replace(self.dense_cost_of(slice(None)), kv_bytes_held=held)

    @property
    def share(self) -> float:
        """Executed FLOPs over the dense model's for the same work; 1 before the first token.

        Exactly 1 at rest, whatever logits were asked for and however passes were cut.
        """
        with self.engine.lock:  # both of the same tokens
            executed, dense = self.cost.flops_total, self.dense_cost.flops_total
        return executed / dense if dense else 1.0


Part = tuple[Sequence, list[int]]
"""A sequence and its next tokens."""
Outcome = Tensor | int | Exception
"""What a pass computed for a sequence, or why it could not."""
Wanted = Literal["last", "whole", "all", "none", "likeliest"]
