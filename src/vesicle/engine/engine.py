"""The engine: executes Plans by skipping work, and counts what it runs.

One pass serves tokens of one or several sequences, in prefill and in decode, whole or in chunks: a
*ragged batch* is a list of (sequence, its next tokens). Projections see all tokens side by side;
attention runs per sequence over its own cache. Each sequence has its own method, so budgets mix
freely in one pass.

Counting happens where operands are touched (rows of weights read, positions visited) and knows
nothing of the Plan's prices; `cost.price` of the recorded Plan must come to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost
from vesicle.engine.attention import Masks, attend
from vesicle.engine.cache import SequenceCache
from vesicle.engine.counters import Counters
from vesicle.engine.decode import (
    LIKELIEST,
    LOGITS,
    MOST_TOKENS,
    NOTHING,
    Decoder,
    Slot,
    uncovered,
)
from vesicle.engine.greedy import likeliest, not_finite
from vesicle.engine.linear import MANY, bulk_dtype, normalise, project, survivors
from vesicle.engine.packed import PackedHead
from vesicle.engine.pool import BlockPool, default_capacity, kv_dtype, with_kv
from vesicle.engine.rotary import Rotary
from vesicle.engine.sampling import Sampling
from vesicle.engine.weights import Weights, from_folder, from_model
from vesicle.errors import VesicleError
from vesicle.families.base import ACTIVATIONS
from vesicle.modulator import Modulator, ModulatorAuthor, served
from vesicle.phases import ALL, GENERATED, PROMPT, Phases, Spans
from vesicle.plan import (
    BLOCK,
    FFN_BIG,
    FFN_SMALL,
    FOREVER,
    AttentionDecision,
    Dense,
    FfnDecision,
    FloatArray,
    IntArray,
    Method,
    Plan,
    PlanBuilder,
    opening,
)
from vesicle.retention import eviction_lengths, held_entries
from vesicle.shapes import ModelShape

CHUNK = 2048
"""Prompt tokens of a prefill pass, unless a caller says otherwise."""


MOST_THREADS = 512
"""CPU threads that may be asked for; PyTorch breaks down at some thousands."""


class Sequence:
    """One text being processed.

    Its method's author, its cache, its Plan and its counted cost so far. Its cache is freed by
    `close`, or when the sequence is dropped.

    Attributes:
        prompts: Which of its tokens are prompt (see `vesicle.phases`).
        evicts_at: The next length at which entries of the cache are forgotten; `FOREVER` for none.
    """

    def __init__(self, engine: Engine, method: Method) -> None:
        """Empty; use `Engine.start`."""
        shape = engine.shape
        self.engine = engine
        self.method = method
        self.equipment = method.equipment
        self.overhead = method.overhead(shape)
        self.author = method.author(shape)
        self.builder = PlanBuilder(shape, self.author.retained)
        self.cache = SequenceCache(engine.pool, shape.n_layers)
        self.prompts = Spans()
        self.evicts_at = FOREVER
        self._evictions = eviction_lengths(self.author.retained)
        self._most_bytes = 0
        self.await_eviction()
        self.token_ids: list[int] = []
        self.counted: list[dict[str, NDArray[np.int64]]] = []
        self._slot: Slot | None = None

    def slot(self) -> Slot:
        """What the native decoder knows of this sequence."""
        if self._slot is None:
            self._slot = Slot(self)
        return self._slot

    def settle(self) -> None:
        """Bring Plan, levels and counts up to date with what the native decoder has run."""
        if self._slot is not None:
            self._slot.settle(self)

    def begin_prompt(self, n_tokens: int, *, scored: bool = True) -> None:
        """Say that the next `n_tokens` tokens are a prompt; the method decides what that changes.

        Args:
            n_tokens: Of the prompt.
            scored: Whether anybody asks what follows the prompt. Its last token is then the first
                of the generated ones.
        """
        self.settle()  # what was decided ahead may not hold any more
        stop = self.length + n_tokens - scored
        self.prompts.add(self.length, stop)
        self.author.prompt(self.length, stop)

    def phase(self, name: str) -> NDArray[np.bool_]:
        """(T,) which of its tokens are of a phase: `prompt`, `generated` or `all`."""
        prompt = self.prompts.contains(np.arange(self.length, dtype=np.int32))
        return {PROMPT: prompt, GENERATED: ~prompt, ALL: np.ones(self.length, bool)}[name]

    @property
    def released(self) -> NDArray[np.bool_]:
        """(T,) at which of its tokens the method's predictor ran."""
        return self.author.releases(np.arange(self.length, dtype=np.int32))

    @property
    def cuts_at(self) -> int:
        """The next length at which a pass must end; `FOREVER` for none."""
        return min(self.evicts_at, self.author.changes_after(self.length))

    def await_eviction(self) -> None:
        """Find the next length at which entries are forgotten."""
        later = (n for n in self._evictions if n > self.cache.length)
        self.evicts_at = next(later, FOREVER)

    def evict(self) -> None:
        """Forget the entries that no query from here on may read, and free their memory."""
        retained, length = self.author.retained, self.cache.length
        assert retained is not None
        self._most_bytes = self.kv_bytes_peak
        for layer in range(self.cache.n_layers):
            held = held_entries(retained, layer, length)
            complete = held[0] < length // BLOCK * BLOCK  # as many in each head
            self.cache.compact(layer, held[:, complete])
        self.await_eviction()

    @property
    def kv_bytes_peak(self) -> int:
        """The most bytes of keys and values that it ever held."""
        return max(self._most_bytes, self.cache.bytes_held)

    @property
    def length(self) -> int:
        """Tokens processed."""
        return self.cache.length

    def close(self) -> None:
        """Free its cache.

        Plan, levels and counted work stay; it takes no more tokens, and holds no bytes.
        """
        self.cache.free()

    @property
    def plan(self) -> Plan:
        """What was decided for every token."""
        self.settle()
        return self.builder.build()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5); empty (0, L, 5) for methods that have none."""
        self.settle()
        if isinstance(self.author, ModulatorAuthor):
            return self.author.levels
        return np.ones((0, self.cache.n_layers, 5))

    @property
    def token_costs(self) -> dict[str, NDArray[np.int64]]:
        """Counted work of each token (T,), by field of `Cost`."""
        self.settle()
        if not self.counted:
            return {}
        return {k: np.concatenate([c[k] for c in self.counted]) for k in self.counted[0]}

    @property
    def cost(self) -> Cost:
        """Counted work of all tokens, and the cache held now."""
        totals = {name: int(values.sum()) for name, values in self.token_costs.items()}
        return Cost(kv_bytes_held=self.cache.bytes_held, **totals)


Part = tuple[Sequence, list[int]]
"""A sequence and its next tokens."""
Wanted = Literal["last", "all", "none", "likeliest"]


class Engine:
    """A decoder in the engine's layout."""

    def __init__(
        self,
        loaded: Weights,
        *,
        kv: str | None = None,
        kv_capacity: int | None = None,
    ) -> None:
        """Wrap loaded weights; use `from_pretrained` or `from_model`, which describe the options.

        Raises:
            VesicleError: If an option's value is not allowed.
        """
        if kv is None:
            kv = "fp16" if loaded.packed else loaded.format
        shape = with_kv(loaded.config.shape, kv)
        self._weights = loaded
        self.config = replace(loaded.config, shape=shape)
        self.shape: ModelShape = shape
        self.dtype = loaded.dtype
        self.device = loaded.device
        if kv_capacity is None:
            kv_capacity = default_capacity(shape, kv, self.config.context_window)
        self.pool = BlockPool(shape, kv, kv_capacity, self.device)
        self._rotary = Rotary(loaded.config, self.dtype)
        self._scale = 1 / math.sqrt(shape.head_size)
        self._decoder = Decoder.build(loaded, self.config, self.pool, self._scale)
        self._activation = ACTIVATIONS[loaded.config.activation]

    @property
    def weights_format(self) -> str:
        """How weights are stored, one of `weights.FORMATS`."""
        return self._weights.format

    @property
    def uncovered(self) -> str | None:
        """Why single tokens are not decoded natively, in a few words; None where they are."""
        return uncovered(self._weights, self.config, self.pool)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self._weights.bytes_held

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str | None = None,
        *,
        weights: str | None = None,
        dtype: torch.dtype | None = None,
        kv: str | None = None,
        kv_capacity: int | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load a model: a local folder, a GGUF file, a hub id, or the default model for None.

        Args:
            model: What to load.
            weights: How weights are stored, one of `weights.FORMATS`. By default 4-bit codes if
                they lose nothing, as with models from a 4-bit file, else as the model has them.
            dtype: A dense store in this number format, in place of `weights`.
            kv: How keys and values are stored, one of `pool.FORMATS`. By default fp16 beside packed
                weights, else as the weights.
            kv_capacity: Most bytes that keys and values of all sequences together may take. By
                default what 16 sequences of full context take, at most half of the memory that is
                available. Memory is taken as it is needed.
            threads: CPU threads of this process; torch's own choice by default.

        Raises:
            ModelError: If the model cannot be found, read or supported.
            VesicleError: If an option's value is not allowed.
        """
        from vesicle.models import resolve_model

        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise VesicleError(f"threads is {threads}; allowed: 1 to {MOST_THREADS}")
        if kv is not None:
            kv_dtype(kv)  # refused before the model is fetched
        folder = resolve_model(None if model is None else str(model))
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(from_folder(folder, dtype, weights), kv=kv, kv_capacity=kv_capacity)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        weights: str | None = None,
        dtype: torch.dtype | None = None,
        kv: str | None = None,
        kv_capacity: int | None = None,
    ) -> Self:
        """Copy the weights of a Hugging Face causal LM; options as in `from_pretrained`."""
        return cls(from_model(model, dtype, weights), kv=kv, kv_capacity=kv_capacity)

    def start(
        self,
        method: Method | Modulator | None = None,
        budget: float | None = None,
        phases: Phases | None = None,
    ) -> Sequence:
        """A new sequence under a method, or a modulator at a budget; dense for None.

        Args:
            method: Who decides.
            budget: As `Modulator.at` has it.
            phases: On which tokens each transmitter of a modulator acts; generated ones by default.

        Raises:
            ModelError: If a modulator does not fit.
            VesicleError: If the budget is out of range, or it or phases are given without a
                modulator.
        """
        return Sequence(self, served(method, budget, phases) or Dense())

    def fork(self, sequence: Sequence, n_tokens: int | None = None) -> Sequence:
        """A new sequence that stands where another stood after `n_tokens`; both go on alone.

        So several continuations of one prompt are scored, and the prompt is read once. Complete
        blocks of keys and values, Plan rows and levels are shared; an incomplete last block is
        copied. The work on the tokens taken over is not counted as the fork's own, and its Plan has
        the whole head there.

        Args:
            sequence: Of this engine.
            n_tokens: Where to fork; by default where it stands.

        Raises:
            CacheFullError: If the pool has no room for the copy of the last block.
            VesicleError: If the sequence is closed, shorter, of another engine, or its predictor
                carries state, which is known at its end alone, and it is to be forked earlier; or
                if entries that the fork would need were forgotten.
        """
        n = sequence.length if n_tokens is None else n_tokens
        author = sequence.author
        if sequence.engine is not self:
            raise VesicleError("a sequence of another engine is to be forked; use that engine")
        if isinstance(author, ModulatorAuthor) and author.state and n != sequence.length:
            raise VesicleError(
                f"a {author.modulator.predictor.kind!r} predictor carries state from token to "
                f"token; fork after all {sequence.length} tokens, not after {n}"
            )
        sequence.settle()
        try:
            cache = sequence.cache.fork(n)
        except ValueError as error:
            raise VesicleError(str(error)) from error
        fork = self.start(sequence.method)
        fork.cache = cache
        fork.await_eviction()
        fork.prompts = sequence.prompts.opening(n)
        for span in fork.prompts:
            fork.author.prompt(*span)
        fork.token_ids = sequence.token_ids[:n]
        fork.builder = sequence.builder.opening(n)
        if isinstance(author, ModulatorAuthor) and isinstance(fork.author, ModulatorAuthor):
            for levels in opening(author._levels, n):
                fork.author.adopt(levels)
            fork.author.state.update({k: carried.clone() for k, carried in author.state.items()})
        if sequence.counted:
            fork.counted = [dict.fromkeys(sequence.counted[0], np.zeros(n, np.int64))]
        return fork

    @torch.inference_mode()
    def forward(
        self,
        batch: list[tuple[Sequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> list[Tensor]:
        """One pass over the next tokens of each sequence.

        Args:
            batch: Distinct sequences, each with at least one token id.
            logits: Which positions the LM head runs for.

        Returns:
            For each sequence, logits (1, V), (T, V) or (0, V).

        Raises:
            CacheFullError: If the pool has no room for the chunks.
            VesicleError: If a chunk is empty, a token id is out of range, the context window is
                exceeded, or a sequence is closed or given twice.

        Where a call is refused for one of these, nothing has changed.
        """
        self._check(batch)
        batch, before = self._to_cuts(batch, "all" if logits == "all" else "none")
        results = self._run(batch, logits)
        if logits == "all":
            for i, pieces in before.items():
                results[i] = torch.cat([*pieces, results[i]])
        return results

    @torch.inference_mode()
    def likeliest(self, batch: list[tuple[Sequence, list[int]]]) -> list[int]:
        """One pass over the next tokens of each sequence; the likeliest token to follow each.

        As the largest of `forward`'s last logits, but where a Plan screens the LM head only the
        survivors' logits are exact.

        Raises:
            VesicleError: As `forward`; or if a logit is not finite, when the pass has run.
        """
        self._check(batch)
        batch, _ = self._to_cuts(batch, "none")
        tokens = [int(token) for token in self._run(batch, "likeliest")]
        for (sequence, _), token in zip(batch, tokens, strict=True):
            if token < 0:
                raise not_finite(sequence.length - 1)
        return tokens

    def _to_cuts(
        self, batch: list[Part], wants: Wanted
    ) -> tuple[list[Part], dict[int, list[Tensor]]]:
        """Run as much of each chunk as lies before the last eviction or change of phase in it.

        Returns:
            The tokens that are left, at least one of each sequence; and the results, by place in
            the batch, of those that were cut.
        """
        before = dict[int, list[Tensor]]()
        while True:
            cut = [i for i, (s, ids) in enumerate(batch) if s.cuts_at < s.length + len(ids)]
            if not cut:
                return batch, before
            batch = batch.copy()
            early = list[Part]()
            for i in cut:
                sequence, ids = batch[i]
                n = sequence.cuts_at - sequence.length
                early.append((sequence, ids[:n]))
                batch[i] = sequence, ids[n:]
            for i, result in zip(cut, self._run(early, wants), strict=True):
                before.setdefault(i, []).append(result)

    def _run(self, batch: list[Part], wants: Wanted) -> list[Tensor]:
        """One pass; sequences that have come to an eviction then forget."""
        found = self._native(batch, {"none": NOTHING, "likeliest": LIKELIEST}.get(wants, LOGITS))
        left = [i for i in range(len(batch)) if i not in found]
        found |= zip(left, self._general([batch[i] for i in left], wants), strict=True)
        for sequence, _ in batch:
            if sequence.length == sequence.evicts_at:
                sequence.evict()
        return [found[i] for i in range(len(batch))]

    def _native(self, batch: list[Part], wants: int) -> dict[int, Tensor]:
        """Run what the native decoder takes; results by place in the batch."""
        decoder, found = self._decoder, dict[int, Tensor]()
        if decoder is None:
            return found
        singles = [i for i, (sequence, ids) in enumerate(batch) if len(ids) == 1]
        places = [i for i in singles if decoder.covers(batch[i][0])]
        for start in range(0, len(places), MOST_TOKENS):
            part = places[start : start + MOST_TOKENS]
            for i in part:
                batch[i][0].cache.reserve(1)
            results = decoder.step([(batch[i][0], batch[i][1][0]) for i in part], wants)
            for i, result in zip(part, results, strict=True):
                sequence, ids = batch[i]
                sequence.cache.advance(1)
                sequence.token_ids += ids
                found[i] = result
        return found

    def _general(self, batch: list[Part], wants: Wanted) -> list[Tensor]:
        """Run any batch: for each sequence the logits (T, V) wanted, or the likeliest id ()."""
        if not batch:
            return []
        for sequence, ids in batch:
            sequence.settle()
            sequence.cache.reserve(len(ids))
        run = _Pass(self, batch)
        hidden = self._weights.embed(torch.tensor([i for _, ids in batch for i in ids]))
        for number in range(self.shape.n_layers):
            hidden = run.layer(number, hidden)
        for sequence, ids in batch:
            sequence.cache.advance(len(ids))
        results = [
            run.likeliest(i, hidden) if wants == "likeliest" else run.logits(i, hidden, wants)
            for i in range(len(batch))
        ]
        for (sequence, ids), rows in zip(batch, run.rows, strict=True):
            sequence.token_ids += ids
            sequence.counted.append(run.counters.totals(rows))
        return results

    def check_tokens(self, ids: list[int]) -> None:
        """Refuse token ids that are not in the vocabulary.

        Raises:
            VesicleError: Naming the id.
        """
        if min(ids) < 0 or max(ids) >= self.shape.vocabulary:
            raise VesicleError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is out of range; "
                f"allowed: 0 to {self.shape.vocabulary - 1}"
            )

    def _check(self, batch: list[tuple[Sequence, list[int]]]) -> None:
        """Refuse what `forward` cannot do, before anything is touched."""
        if len({id(sequence) for sequence, _ in batch}) < len(batch):
            raise VesicleError("a sequence is given twice in one pass; join its tokens")
        for sequence, ids in batch:
            if not ids:
                raise VesicleError("a chunk has no tokens; give at least one")
            sequence.cache.check_open()
            self.check_tokens(ids)
            end = sequence.length + len(ids)
            if end > self.config.context_window:
                raise VesicleError(
                    f"{end} tokens exceed the model's context window of "
                    f"{self.config.context_window}"
                )
        needed = sum(sequence.cache.blocks_needed(len(ids)) for sequence, ids in batch)
        for sequence, ids in batch:
            if sequence.evicts_at <= sequence.length + len(ids):  # others need what it lets go of
                needed += sequence.cache.n_shared
        self.pool.require(needed)

    def _final_norm(self, hidden: Tensor) -> Tensor:
        norm, config = self._weights.final_norm, self.config
        return normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)

    def stream(
        self,
        sequence: Sequence,
        prompt: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Generate token by token.

        Args:
            sequence: From `start`; may hold earlier tokens already.
            prompt: Token ids to read first.
            max_new_tokens: Most tokens to yield.
            sampling: Greedy by default.
            stop: Tokens that end the text; they are not yielded.
            chunk: Prompt tokens per prefill pass.

        Yields:
            Token ids. The last one drawn is not fed back, so its own cost is not counted.

        Raises:
            VesicleError: If the prompt is empty, or the likeliest token is wanted and the logits
                are not finite.
        """
        if not prompt:
            raise VesicleError("the prompt has no tokens; give at least one")
        sampling = sampling or Sampling()
        generator = sampling.generator()
        sequence.begin_prompt(len(prompt), scored=max_new_tokens > 0)
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            last = start + chunk >= len(prompt)
            if not last or max_new_tokens < 1:
                self.forward([(sequence, part)], "none")
        for count in range(1, max_new_tokens + 1):
            if sampling.greedy:
                token = self.likeliest([(sequence, part)])[0]
            else:
                out = self.forward([(sequence, part)])
                token = sampling.draw(out[0][-1], generator)
            if token in stop:
                return
            yield token
            if count == max_new_tokens or sequence.length >= self.config.context_window:
                return
            part = [token]

    def generate(
        self,
        prompt: list[int],
        method: Method | Modulator | None = None,
        budget: float | None = None,
        *,
        phases: Phases | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> tuple[list[int], Sequence]:
        """The new token ids after `prompt`, and the sequence with its Plan, levels and cost."""
        sequence = self.start(method, budget, phases)
        tokens = self.stream(
            sequence, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return list(tokens), sequence


class _Pass:
    """One forward pass over N tokens of a ragged batch."""

    def __init__(self, engine: Engine, batch: list[tuple[Sequence, list[int]]]) -> None:
        self.engine = engine
        self.sequences = [sequence for sequence, _ in batch]
        self.rows: list[slice] = []
        self.positions: list[IntArray] = []
        n = 0
        for sequence, ids in batch:
            self.rows.append(slice(n, n + len(ids)))
            n += len(ids)
            start = sequence.length
            self.positions.append(np.arange(start, start + len(ids), dtype=np.int32))
            sequence.builder.chunk(len(ids))
        self.all_positions = np.concatenate(self.positions)
        self.counters = Counters(engine.shape, n)
        self.rotation = engine._rotary.at(self.all_positions)
        self.masks = Masks()

    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """One decoder layer, hidden (N, D)."""
        config = self.engine.config
        decision = self.decide(number)
        after = hidden + self.attention(number, hidden, decision)
        ffn = self.release(number, after)
        return after + self.normed_ffn(number, hidden if config.parallel_residual else after, ffn)

    def logits(self, i: int, hidden: Tensor, wanted: Literal["last", "all", "none"]) -> Tensor:
        """Logits of sequence i's last, all or none of its tokens, from hidden (N, D)."""
        rows = self.rows[i]
        chosen = {"last": slice(rows.stop - 1, rows.stop), "all": rows, "none": slice(0, 0)}[wanted]
        self.counters.head(chosen)
        return self.engine._weights.logits(self.engine._final_norm(hidden[chosen]))

    def likeliest(self, i: int, hidden: Tensor) -> Tensor:
        """Id () of the word most likely to follow sequence i's last token, from hidden (N, D).

        -1 where a logit is not finite.
        """
        engine, sequence, stop = self.engine, self.sequences[i], self.rows[i].stop
        head, last = engine._weights.head, slice(stop - 1, stop)
        m = 0
        if engine.shape.screens_head:
            m = int(sequence.author.head(hidden[last], self.positions[i][-1:])[0])
        if m == 0 or not isinstance(head, PackedHead):
            return likeliest(self.logits(i, hidden, "last")[0])
        ranked = np.zeros(len(self.positions[i]), np.int32)
        ranked[-1] = m
        sequence.builder.head(ranked)
        self.counters.head(last, m)
        ids, logits = survivors(engine._final_norm(hidden[last]), head, m)
        place = likeliest(logits[0])
        return place if place < 0 else ids[0, place]

    def bulk(
        self, x: Tensor, sites: slice, channels: IntArray, bits: IntArray, whole: bool
    ) -> Tensor:
        """Normed inputs (N, D) of a module, in the number format that computes it fastest.

        Many tokens that read all of a packed weight share one matrix product, which gains nothing
        from activations in fp32.

        Args:
            x: The inputs.
            sites: Of the module, in the order of `plan.SITES`.
            channels: (N, 2) read there.
            bits: (N, 2) likewise.
            whole: Whether the module runs for all tokens.
        """
        shape = self.engine.shape
        if shape.stored_bits is None or len(x) < MANY or not whole:
            return x
        full = (channels >= shape.site_widths[sites]).all() and bits.min() >= shape.stored_bits
        return x.to(bulk_dtype()) if full else x

    def normed_ffn(self, number: int, hidden: Tensor, decision: FfnDecision) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its input before the norm."""
        config, w = self.engine.config, self.engine._weights.layers[number]
        norm = w.ffn_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        big = bool((decision.module == FFN_BIG).all())
        x = self.bulk(x, slice(2, 4), decision.channels, decision.bits, big)
        return self.ffn(number, x, decision)

    def attention(self, number: int, hidden: Tensor, decision: AttentionDecision) -> Tensor:
        """Attention's contribution to the residual stream, (N, D)."""
        engine = self.engine
        config, shape, w = engine.config, engine.shape, engine._weights.layers[number]
        norm = w.attention_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        runs = decision.run == 1
        x = self.bulk(x, slice(0, 2), decision.channels, decision.bits, bool(runs.all()))
        kv, n = shape.kv_width, len(runs)
        if runs.all():
            joint, read = project(x, w.attention_in, decision.channels[:, 0], decision.bits[:, 0])
        else:
            # Skipped tokens compute values and keys alone: the leading outputs.
            joint = x.new_zeros(n, w.attention_in.n_out)
            read = np.zeros(n, np.int32)
            for chosen, columns in ((runs, None), (~runs, 2 * kv)):
                if chosen.any():
                    index = torch.from_numpy(np.nonzero(chosen)[0])
                    part, read[chosen] = project(
                        x[index],
                        w.attention_in,
                        decision.channels[chosen, 0],
                        decision.bits[chosen, 0],
                        columns,
                    )
                    joint[index, : part.shape[1]] = part
        outputs = (
            w.attention_in.n_out if runs.all() else np.where(runs, w.attention_in.n_out, 2 * kv)
        )
        self.counters.projection(0, number, read, outputs, decision.bits[:, 0])

        size = shape.head_size
        values = joint[:, :kv].view(n, shape.n_kv_heads, size)
        keys_queries = joint[:, kv:].view(n, shape.n_kv_heads + shape.n_heads, size)
        if w.query_norm is not None and w.key_norm is not None:
            keys_queries = keys_queries.to(hidden.dtype)
            keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)
            keys_queries = torch.cat(
                [
                    normalise(keys, w.key_norm.weight, None, config.norm_eps, True),
                    normalise(queries, w.query_norm.weight, None, config.norm_eps, True),
                ],
                dim=1,
            )
        if config.rotary_layers[number]:
            keys_queries = engine._rotary.rotate(keys_queries, self.rotation)
        keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)

        mixed = x.new_empty(n, shape.query_width)
        for sequence, rows, positions in zip(
            self.sequences, self.rows, self.positions, strict=True
        ):
            cache = sequence.cache
            cache.append(number, keys[rows].transpose(0, 1), values[rows].transpose(0, 1))
            active = runs[rows]
            if not active.any():
                continue
            whole = bool(active.all())
            index = np.arange(rows.start, rows.stop)[active]
            out, visited, compared = attend(
                (queries[rows] if whole else queries[torch.from_numpy(index)]).to(x.dtype),
                cache,
                number,
                positions[active],
                decision.kv_blocks[rows][active],
                engine._scale,
                sequence.equipment.summary,
                self.masks,
            )
            vectors = sequence.overhead.selection_vectors
            self.counters.attention(number, index, visited, compared, vectors)
            if whole:
                mixed[rows] = out
            else:
                mixed[torch.from_numpy(index)] = out
        if runs.all():
            out, read = project(
                mixed, w.attention_out, decision.channels[:, 1], decision.bits[:, 1]
            )
            self.counters.projection(1, number, read, w.attention_out.n_out, decision.bits[:, 1])
            return out
        result = torch.zeros_like(hidden)
        read = np.zeros(n, np.int32)
        if runs.any():
            index = torch.from_numpy(np.nonzero(runs)[0])
            result[index], read[runs] = project(
                mixed[index], w.attention_out, decision.channels[runs, 1], decision.bits[runs, 1]
            )
        self.counters.projection(1, number, read, w.attention_out.n_out, decision.bits[:, 1])
        self.stand_in("attention", number, x, ~runs, result)
        return result

    def decide(self, number: int) -> AttentionDecision:
        """Ask the authors, record, and join their decisions (N, ...)."""
        parts = []
        for sequence, positions in zip(self.sequences, self.positions, strict=True):
            part = sequence.author.attention(number, positions)
            sequence.builder.attention(number, part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return AttentionDecision(
            channels=np.concatenate([p.channels for p in parts]),
            bits=np.concatenate([p.bits for p in parts]),
            run=np.concatenate([p.run for p in parts]),
            kv_blocks=np.concatenate([p.kv_blocks for p in parts]),
            rest=all(p.rest for p in parts),
        )

    def release(self, number: int, hidden: Tensor) -> FfnDecision:
        """Give the authors their hidden states, record, and join their decisions."""
        parts = []
        for sequence, rows, positions in zip(
            self.sequences, self.rows, self.positions, strict=True
        ):
            part = sequence.author.release(number, hidden[rows], positions)
            sequence.builder.ffn(number, part)
            self.counters.modulator(rows, sequence.author.releases(positions), sequence.overhead)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return FfnDecision(
            channels=np.concatenate([p.channels for p in parts]),
            bits=np.concatenate([p.bits for p in parts]),
            module=np.concatenate([p.module for p in parts]),
            rest=all(p.rest for p in parts),
        )

    def ffn(self, number: int, x: Tensor, decision: FfnDecision) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its normed input."""
        big = decision.module == FFN_BIG
        if big.all():
            return self.big_ffn(number, x, decision, None)
        result = torch.zeros_like(x)
        if big.any():
            rows = np.nonzero(big)[0].astype(np.int32)
            index = torch.from_numpy(rows)
            result[index] = self.big_ffn(number, x[index], decision, rows)
        self.stand_in("ffn", number, x, decision.module == FFN_SMALL, result)
        return result

    def big_ffn(
        self, number: int, x: Tensor, decision: FfnDecision, rows: IntArray | None
    ) -> Tensor:
        """The FFN itself on the tokens `rows` (all for None), x (len(rows), D)."""
        engine, w = self.engine, self.engine._weights.layers[number]
        tokens = slice(None) if rows is None else rows
        channels, bits = decision.channels[tokens], decision.bits[tokens]
        inner, read = project(x, w.ffn_in, channels[:, 0], bits[:, 0])
        self.counters.projection(2, number, read, w.ffn_in.n_out, bits[:, 0], tokens)
        if engine.shape.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = engine._activation(gate) * up
        else:
            inner = engine._activation(inner)
        out, read = project(inner, w.ffn_out, channels[:, 1], bits[:, 1])
        self.counters.projection(3, number, read, w.ffn_out.n_out, bits[:, 1], tokens)
        return out

    def stand_in(
        self, kind: str, number: int, x: Tensor, chosen: NDArray[np.bool_], result: Tensor
    ) -> None:
        """Write the stand-ins' outputs for the chosen tokens into `result` (N, D)."""
        for sequence, rows in zip(self.sequences, self.rows, strict=True):
            index = np.arange(rows.start, rows.stop)[chosen[rows]]
            equipment = sequence.equipment
            standin = equipment.ffn_standin if kind == "ffn" else equipment.attention_standin
            if standin is None or not len(index):  # a method without stand-ins skips outright
                continue
            where = torch.from_numpy(index)
            result[where] = standin.apply_layer(number, x[where])
            self.counters.stand_in(index, standin.rank)
