"""The engine: executes Plans by skipping work, and counts what it runs.

One pass serves tokens of one or several sequences, in prefill and in decode, whole or in chunks: a
*ragged batch* is a list of (sequence, its next tokens). Projections see all tokens side by side;
attention runs per sequence over its own cache. Each sequence has its own method, so budgets mix
freely in one pass.

Threads may share an engine: a pass is one thread's at a time, so each gets what it would get alone.
A sequence is for one thread; another may look at what it has cost so far.

Counting happens where operands are touched (rows of weights read, positions visited) and knows
nothing of the Plan's prices; `cost.price` of the recorded Plan must come to the same numbers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost, flops_of, price_dense_tokens
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
from vesicle.engine.generation import Generation
from vesicle.engine.linear import MANY, bulk_dtype, normalise, project, survivors
from vesicle.engine.packed import PackedHead
from vesicle.engine.pool import BlockPool, default_capacity, kv_dtype, with_kv
from vesicle.engine.prompt import Prompt, checked_count, checked_ends, is_chat, prompt_ids
from vesicle.engine.rotary import Rotary
from vesicle.engine.sampling import Sampling, not_finite
from vesicle.engine.weights import Weights, from_folder, from_model
from vesicle.errors import CacheFullError, ModelError, VesicleError
from vesicle.families.base import ACTIVATIONS
from vesicle.models.text import Text, end_ids, token_ids
from vesicle.modulator import Modulator, served
from vesicle.phases import ALL, GENERATED, PROMPT, Phases, Spans
from vesicle.plan import (
    BLOCK,
    FFN_BIG,
    FFN_SMALL,
    FOREVER,
    Author,
    Dense,
    FloatArray,
    IntArray,
    Method,
    Plan,
    PlanBuilder,
    Rows,
    check_rows,
    resting_rows,
)
from vesicle.plan.rows import bounds, check_kept, of_attention
from vesicle.retention import eviction_lengths, held_entries
from vesicle.shapes import ModelShape
from vesicle.transmitters import NAMES

CHUNK = 2048
"""Prompt tokens of a prefill pass, unless a caller says otherwise."""


MOST_THREADS = 512
"""CPU threads that may be asked for; PyTorch breaks down at some thousands."""


_T = TypeVar("_T")


class Sequence:
    """One text being processed.

    Its method's author, its cache, its Plan and its counted cost so far. Its cache is freed by
    `close`, or when the sequence is dropped.

    Attributes:
        prompts: Which of its tokens are prompt (see `vesicle.phases`).
        taken_over: Leading tokens that a fork has from another sequence, whose work they are.
        evicts_at: The next length at which entries of the cache are forgotten; `FOREVER` for none.
    """

    def __init__(self, engine: Engine, method: Method, author: Author | None = None) -> None:
        """Empty; use `Engine.start`, or `Engine.fork`, which brings an author."""
        shape = engine.shape
        self.engine = engine
        self.method = method
        self.equipment = method.equipment
        self.overhead = method.overhead(shape)
        self.author = author or method.author(shape)
        self.builder = PlanBuilder(shape, self.author.retained)
        self.cache = SequenceCache(engine.pool, shape.n_layers)
        self.prompts = Spans()
        self.taken_over = 0
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
            with self.engine.lock:
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
        with self.engine.lock:
            self.cache.free()

    @property
    def plan(self) -> Plan:
        """What was decided for every token."""
        with self.engine.lock:
            self.settle()
            return self.builder.build(self.author.turns(self.length))

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5); empty (0, L, 5) for methods that have none."""
        with self.engine.lock:
            self.settle()
            levels = self.author.levels
        return np.ones((0, self.cache.n_layers, len(NAMES))) if levels is None else levels

    @property
    def token_costs(self) -> dict[str, NDArray[np.int64]]:
        """Counted work of each token (T,), by field of `Cost`."""
        with self.engine.lock:
            self.settle()
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
            held = shape.n_layers * shape.position_bytes * self.length
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
Outcome = Tensor | Exception
"""What a pass computed for a sequence, or why it could not."""
Wanted = Literal["last", "all", "none", "likeliest"]


class Engine:
    """A decoder in the engine's layout.

    Attributes:
        lock: Held by whoever runs a pass. Take it around several calls that belong together.
    """

    def __init__(
        self,
        loaded: Weights,
        *,
        kv: str | None = None,
        kv_capacity: int | None = None,
        text: Text | None = None,
        folder: Path | None = None,
        ends: Collection[int] = (),
    ) -> None:
        """Wrap loaded weights; use `from_pretrained` or `from_model`, which describe the options.

        Args:
            loaded: The decoder.
            kv: How keys and values are stored.
            kv_capacity: Most bytes of them.
            text: The tokenizer; if None, that of the folder.
            folder: Where the model is from; None if it has none.
            ends: Token ids that end a text, beside those that the tokenizer names.

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
        self._text, self._folder, self._ends = text, folder, frozenset(ends)
        self.lock = threading.RLock()

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
        revision: str | None = None,
        token: str | bool | None = None,
        weights: str | None = None,
        dtype: torch.dtype | None = None,
        kv: str | None = None,
        kv_capacity: int | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load a model: a local folder, a GGUF file, a hub id, or the default model for None.

        Args:
            model: What to load.
            revision: Branch, tag or commit of a hub id; its main branch by default.
            token: For private and gated models on the hub; by default what its client has saved.
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
        folder = resolve_model(model, revision=revision, token=token)
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = from_folder(folder, dtype, weights)
        return cls(loaded, kv=kv, kv_capacity=kv_capacity, folder=folder)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        weights: str | None = None,
        dtype: torch.dtype | None = None,
        kv: str | None = None,
        kv_capacity: int | None = None,
        text: Text | None = None,
    ) -> Self:
        """Copy the weights of a Hugging Face causal LM; options as in `from_pretrained`.

        Args:
            model: The model; its configuration tells which tokens end a text.
            weights: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
            kv: As in `from_pretrained`.
            kv_capacity: As in `from_pretrained`.
            text: The tokenizer (`Text.from_pretrained`); without it prompts are token ids.
        """
        configs: tuple[Any, ...] = (model.config, getattr(model, "generation_config", None))
        ends = {i for c in configs for i in token_ids(getattr(c, "eos_token_id", None))}
        loaded = from_model(model, dtype, weights)
        return cls(loaded, kv=kv, kv_capacity=kv_capacity, text=text, ends=ends)

    @property
    def text(self) -> Text:
        """The model's tokenizer and chat template, read when they are first needed.

        Raises:
            ModelError: If the model's folder has none that can be read.
            VesicleError: If the engine was made from a model in memory, without `text`.
        """
        if self._text is None:
            if self._folder is None:
                raise VesicleError(
                    "this engine was made from a model in memory and has no tokenizer; give token "
                    "ids, or make it with Engine.from_model(model, text=Text.from_pretrained(...))"
                )
            self._text = Text.from_folder(self._folder)
        return self._text

    @property
    def ends(self) -> frozenset[int]:
        """Ids of the tokens that end a text, as the model's folder or configuration names them."""
        if self._text is None and self._folder is not None:
            try:
                return self.text.eos_ids
            except ModelError:  # token ids can be had without a tokenizer
                return frozenset(end_ids(self._folder))
        return self._ends if self._text is None else self._ends | self._text.eos_ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text to continue, or of a chat to answer.

        Args:
            prompt: A text, which is continued as it stands; messages (dicts with `role` and
                `content`), which go through the model's chat template; or token ids, as they are.

        Raises:
            VesicleError: If it is none of these, or there is no tokenizer, or no chat template.
        """
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        return self.text.chat(prompt) if is_chat(prompt) else prompt_ids(prompt)

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
            VesicleError: If the sequence is closed, shorter, of another engine, or its author
                cannot be forked there (see `Author.fork`: of a predictor that carries state, it is
                known at the end alone); or if entries that the fork would need were forgotten.
        """
        n = sequence.length if n_tokens is None else n_tokens
        if sequence.engine is not self:
            raise VesicleError("a sequence of another engine is to be forked; use that engine")
        with self.lock:
            sequence.settle()
            author = sequence.author.fork(n)
            try:
                cache = sequence.cache.fork(n)
            except ValueError as error:
                raise VesicleError(str(error)) from error
            fork = Sequence(self, sequence.method, author)
            fork.cache, fork.taken_over = cache, n
            fork.await_eviction()
            fork.prompts = sequence.prompts.opening(n)
            fork.token_ids = sequence.token_ids[:n]
            fork.builder = sequence.builder.opening(n)
            if sequence.counted:
                fork.counted = [dict.fromkeys(sequence.counted[0], np.zeros(n, np.int64))]
        return fork

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

        Where a call is refused for one of these, nothing has changed. What an author raises comes
        after the pass: its own sequence stands before the tokens that it was deciding about, the
        others have read theirs.
        """
        with self.lock:
            self._check(batch)
            return [_result(outcome) for outcome in self._read(dict(enumerate(batch)), logits)]

    def likeliest(self, batch: list[tuple[Sequence, list[int]]]) -> list[int]:
        """One pass over the next tokens of each sequence; the likeliest token to follow each.

        As the largest of `forward`'s last logits, but where a Plan screens the LM head only the
        survivors' logits are exact.

        Raises:
            VesicleError: As `forward`; or if a logit is not finite, when the pass has run.
        """
        with self.lock:
            self._check(batch)
            outcomes = self._read(dict(enumerate(batch)), "likeliest")
            return [int(_result(outcome)) for outcome in outcomes]

    def attempt(self, batch: list[Part], wants: Wanted = "last") -> list[Outcome]:
        """One pass like `forward` and `likeliest`, in which no sequence can fail another.

        What one gets does not depend on whether another fails. One that fails stands where it
        stood, as far as its author does (see `Author.rewind`).

        Args:
            batch: As for `forward`.
            wants: As `logits` of `forward`, or "likeliest".

        Returns:
            For each sequence what `forward` returns, or the likeliest id (); or the error.

        Raises:
            CacheFullError: If the pool has no room for all of them; nothing has changed then.
            VesicleError: If a sequence is given twice; likewise.
        """
        with self.lock:
            self._check_distinct(batch)
            refused = dict[int, Outcome]()
            for i, part in enumerate(batch):
                try:
                    self._check_part(*part)
                except VesicleError as error:
                    refused[i] = error
            left = {i: part for i, part in enumerate(batch) if i not in refused}
            self._check_room(list(left.values()))
            found = refused | dict(zip(left, self._read(left, wants), strict=True))
            return [found[i] for i in range(len(batch))]

    @torch.inference_mode()
    def _read(self, batch: dict[int, Part], wants: Wanted) -> list[Outcome]:
        """Read the parts of a batch, which have been checked, in as many passes as it takes."""
        left, outcomes = batch.copy(), dict[int, Outcome]()
        before = self._to_cuts(left, outcomes, "all" if wants == "all" else "none")
        outcomes |= zip(left, self._run(list(left.values()), wants), strict=True)
        for i, pieces in before.items():
            last = outcomes[i]
            if wants == "all" and isinstance(last, Tensor):
                outcomes[i] = torch.cat([*pieces, last])
        return [outcomes[i] for i in batch]

    def _to_cuts(
        self, left: dict[int, Part], outcomes: dict[int, Outcome], wants: Wanted
    ) -> dict[int, list[Tensor]]:
        """Run as much of each chunk as cannot be read together with what follows it.

        That is what lies before the last eviction or change of phase in it; and of tokens about
        which something is decided all but the last, where the native core takes them: they go
        through it one at a time, so that no decision depends on how a text is cut into passes.

        Args:
            left: By place in the batch, what is to be read; what is read is taken off, and at least
                one token of each stays. Those that fail are taken out.
            outcomes: Where their errors go.
            wants: Of what is read.

        Returns:
            The results, by place in the batch, of those that were cut.
        """
        before = dict[int, list[Tensor]]()
        while True:
            early = dict[int, Part]()
            for i, (sequence, ids) in list(left.items()):
                try:
                    n = self._reach(sequence, len(ids))
                except Exception as error:  # an author's, as in `_Pass.ask`
                    outcomes[i] = error
                    del left[i]
                    continue
                if n < len(ids):
                    early[i] = sequence, ids[:n]
                    left[i] = sequence, ids[n:]
            if not early:
                return before
            for i, outcome in zip(early, self._run(list(early.values()), wants), strict=True):
                if isinstance(outcome, Tensor):
                    before.setdefault(i, []).append(outcome)
                else:
                    outcomes[i] = outcome
                    del left[i]

    def _reach(self, sequence: Sequence, n_wanted: int) -> int:
        """How many of a sequence's next tokens one pass may read; `n_wanted` or more for all."""
        if n_wanted > 1 and self._decoder is not None and sequence.author.governs(sequence.length):
            if self._decoder.covers(sequence):
                return 1
        return sequence.cuts_at - sequence.length

    def _run(self, batch: list[Part], wants: Wanted) -> list[Outcome]:
        """One pass; sequences that have come to an eviction then forget."""
        decoder, found = self._decoder, dict[int, Outcome]()
        native, general = list[int](), list[int]()
        for i, (sequence, ids) in enumerate(batch):
            try:
                covered = decoder is not None and len(ids) == 1 and decoder.covers(sequence)
            except Exception as error:  # an author's, as in `_Pass.ask`
                found[i] = error
                continue
            (native if covered else general).append(i)
        # What may be broken off comes first, so that nothing has changed then.
        found |= zip(general, self._general([batch[i] for i in general], wants), strict=True)
        if decoder is not None:
            found |= self._native(decoder, batch, native, wants)
        for i, (sequence, _) in enumerate(batch):
            if sequence.length == sequence.evicts_at:
                try:
                    sequence.evict()
                except CacheFullError as error:
                    found[i] = error
        return [found[i] for i in range(len(batch))]

    def _native(
        self, decoder: Decoder, batch: list[Part], places: list[int], wanted: Wanted
    ) -> dict[int, Outcome]:
        """Run those places of a batch that the native decoder takes; outcomes by place."""
        found = dict[int, Outcome]()
        wants = {"none": NOTHING, "likeliest": LIKELIEST}.get(wanted, LOGITS)
        for start in range(0, len(places), MOST_TOKENS):
            part = places[start : start + MOST_TOKENS]
            for i in part:
                batch[i][0].cache.reserve(1)
            results = decoder.step([(batch[i][0], batch[i][1][0]) for i in part], wants)
            for i, result in zip(part, results, strict=True):
                sequence, ids = batch[i]
                sequence.cache.advance(1)
                sequence.token_ids += ids
                # The core gives no token where a logit is not finite.
                # Otherwise levels that are no numbers would be taken for rest.
                lost = int(result) < 0 if wants == LIKELIEST else not sequence.slot().sound()
                found[i] = not_finite(sequence.length - 1) if lost else result
        return found

    def _general(self, batch: list[Part], wants: Wanted) -> list[Outcome]:
        """Run any batch: for each sequence the logits (T, V) wanted, or the likeliest id ()."""
        if not batch:
            return []
        for sequence, ids in batch:
            sequence.settle()
            sequence.cache.reserve(len(ids))
        run = _Pass(self, batch)
        try:
            results = run.outcomes(wants)
        except BaseException:  # perhaps an interrupt
            for sequence, _ in batch:
                _broken_off(sequence)
            raise
        for i, ((sequence, ids), rows) in enumerate(zip(batch, run.rows, strict=True)):
            if i in run.failed:
                _broken_off(sequence)
                continue
            sequence.cache.advance(len(ids))
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

    def _check(self, batch: list[Part]) -> None:
        """Refuse what `forward` cannot do, before anything is touched."""
        self._check_distinct(batch)
        for part in batch:
            self._check_part(*part)
        self._check_room(batch)

    def _check_distinct(self, batch: list[Part]) -> None:
        if len({id(sequence) for sequence, _ in batch}) < len(batch):
            raise VesicleError("a sequence is given twice in one pass; join its tokens")

    def _check_part(self, sequence: Sequence, ids: list[int]) -> None:
        if not ids:
            raise VesicleError("a chunk has no tokens; give at least one")
        sequence.cache.check_open()
        self.check_tokens(ids)
        self._check_window(sequence.length + len(ids))
        sequence.author.check(sequence.length + len(ids))

    def _check_window(self, n_tokens: int) -> None:
        if n_tokens > self.config.context_window:
            raise VesicleError(
                f"{n_tokens} tokens exceed the model's context window of "
                f"{self.config.context_window}"
            )

    def _check_room(self, batch: list[Part]) -> None:
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
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Generate token by token.

        Args:
            sequence: From `start`; may hold earlier tokens already.
            prompt: What to read first: a text to continue, messages to answer, or token ids (see
                `encode`).
            max_new_tokens: Most tokens to yield.
            sampling: Greedy by default.
            stop: Ids of the tokens that end the text, which are not yielded: the model's own
                (`ends`) by default, none if empty.
            chunk: Prompt tokens per prefill pass.

        Yields:
            Token ids. The last one drawn is not fed back, so its own cost is not counted.

        Raises:
            VesicleError: If the prompt is empty, cannot be encoded or exceeds the context window,
                if `max_new_tokens` is no whole number from 0 on, or if logits are not finite.
        """
        prompt = self.encode(prompt)
        stop = self.ends if stop is None else checked_ends(stop)
        if not prompt:
            raise VesicleError("the prompt has no tokens; give at least one")
        max_new_tokens = checked_count("max_new_tokens", max_new_tokens)
        self._check_window(sequence.length + len(prompt))
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
        prompt: Prompt,
        method: Method | Modulator | None = None,
        budget: float | None = None,
        *,
        phases: Phases | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
    ) -> Generation:
        """Continue a text, or answer a chat; arguments as in `start` and `stream`.

        Returns:
            The new tokens, as ids and as text, and the sequence with its Plan, levels and cost.
        """
        sequence = self.start(method, budget, phases)
        tokens = self.stream(
            sequence, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return Generation(list(tokens), sequence)


def _result(outcome: Outcome) -> Tensor:
    """What was computed, if nothing went wrong."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _largest(logits: Tensor, position: int) -> Outcome:
    """The place () of the largest of logits (V,), or an error if one of them is not finite."""
    return logits.argmax() if bool(logits.isfinite().all()) else not_finite(position)


def _broken_off(sequence: Sequence) -> None:
    """Forget the pass that a sequence was in; its cache does so by itself."""
    sequence.builder.drop()
    sequence.author.rewind(sequence.length)


def _attention(number: int, positions: IntArray, rows: Rows, author: Author) -> None:
    author.attention(number, positions, rows)


class _Pass:
    """One forward pass over N tokens of a ragged batch."""

    def __init__(self, engine: Engine, batch: list[tuple[Sequence, list[int]]]) -> None:
        self.engine = engine
        self.batch = batch
        self.sequences = [sequence for sequence, _ in batch]
        self.authors = [sequence.author for sequence in self.sequences]
        self.failed: dict[int, Exception] = {}
        self.rows: list[slice] = []
        self.positions: list[IntArray] = []
        n = 0
        for sequence, ids in batch:
            self.rows.append(slice(n, n + len(ids)))
            n += len(ids)
            start = sequence.length
            self.positions.append(np.arange(start, start + len(ids), dtype=np.int32))
        self.all_positions = np.concatenate(self.positions)
        self.plan = resting_rows(engine.shape, self.all_positions)
        self.limits: tuple[IntArray, IntArray] | None = None  # of its numbers, once needed
        for sequence, rows in zip(self.sequences, self.rows, strict=True):
            sequence.builder.add(self.plan[rows])
        self.counters = Counters(engine.shape, n)
        self.rotation = engine._rotary.at(self.all_positions)
        self.masks = Masks()

    def outcomes(self, wants: Wanted) -> list[Outcome]:
        """Run; for each sequence the logits (T, V) wanted, or the likeliest id (), or an error."""
        ids = [i for _, part in self.batch for i in part]
        hidden = self.engine._weights.embed(torch.tensor(ids))
        for number in range(self.engine.shape.n_layers):
            hidden = self.layer(number, hidden)
            if len(self.failed) == len(self.batch):
                break
        self.screens = self.plan["head"][:, -1].copy()
        self.plan["head"] = 0  # unless it is screened below
        found: list[Outcome] = []
        for i in range(len(self.batch)):
            if i in self.failed:
                found.append(self.failed[i])
            elif wants == "likeliest":
                found.append(self.likeliest(i, hidden))
            else:
                found.append(self.logits(i, hidden, wants))
        return found

    def ask(self, i: int, number: int, question: Callable[[Author], None]) -> None:
        """Have an author write its rows of layer `number`, and check them.

        One that fails is at rest from then on, so that the others go on: nothing of another
        sequence depends on what it decides.
        """
        author, positions = self.authors[i], self.positions[i]
        try:
            question(author)
            if not author.bounded:
                self.check(i, number)
        except Exception as error:  # whatever an author of anyone's making may raise
            self.failed[i] = error
            self.authors[i] = Dense().author(self.engine.shape)
            self.plan[self.rows[i]] = resting_rows(self.engine.shape, positions)

    def check(self, i: int, number: int) -> None:
        """Refuse rows of layer `number` that sequence i may not have."""
        if self.limits is None:
            self.limits = bounds(self.engine.shape, self.all_positions)
        here = self.rows[i], slice(number, number + 1)
        low, high = (limit[here] for limit in self.limits)
        check_rows(
            self.plan[here], self.engine.shape, self.positions[i], [number], limits=(low, high)
        )

    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """One decoder layer, hidden (N, D)."""
        config = self.engine.config
        decided = self.plan[:, number]
        self.decide_attention(number)
        after = hidden + self.attention(number, hidden, decided)
        self.decide_ffn(number, after)
        before = hidden if config.parallel_residual else after
        return after + self.normed_ffn(number, before, decided)

    def logits(self, i: int, hidden: Tensor, wanted: Literal["last", "all", "none"]) -> Tensor:
        """Logits of sequence i's last, all or none of its tokens, from hidden (N, D)."""
        rows = self.rows[i]
        chosen = {"last": slice(rows.stop - 1, rows.stop), "all": rows, "none": slice(0, 0)}[wanted]
        self.counters.head(chosen)
        return self.engine._weights.logits(self.engine._final_norm(hidden[chosen]))

    def likeliest(self, i: int, hidden: Tensor) -> Outcome:
        """Id () of the word most likely to follow sequence i's last token, from hidden (N, D).

        Or the error, if a logit is not finite.
        """
        engine, stop = self.engine, self.rows[i].stop
        head, last = engine._weights.head, slice(stop - 1, stop)
        position = int(self.positions[i][-1])
        m = int(self.screens[stop - 1]) if engine.shape.screens_head else 0
        if m == 0 or not isinstance(head, PackedHead):
            return _largest(self.logits(i, hidden, "last")[0], position)
        self.plan["head"][stop - 1, -1] = m
        self.counters.head(last, m)
        ids, logits = survivors(engine._final_norm(hidden[last]), head, m)
        place = _largest(logits[0], position)
        return ids[0, place] if isinstance(place, Tensor) else place

    def bulk(self, x: Tensor, sites: slice, decided: Rows, whole: bool) -> Tensor:
        """Normed inputs (N, D) of a module, in the number format that computes it fastest.

        Many tokens that read all of a packed weight share one matrix product, which gains nothing
        from activations in fp32.

        Args:
            x: The inputs.
            sites: Of the module, in the order of `plan.SITES`.
            decided: (N,) rows of the layer.
            whole: Whether the module runs for all tokens.
        """
        shape = self.engine.shape
        if shape.stored_bits is None or len(x) < MANY or not whole:
            return x
        channels, bits = decided["channels"][:, sites], decided["bits"][:, sites]
        full = (channels >= shape.site_widths[sites]).all() and bits.min() >= shape.stored_bits
        return x.to(bulk_dtype()) if full else x

    def normed_ffn(self, number: int, hidden: Tensor, decided: Rows) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its input before the norm."""
        config, w = self.engine.config, self.engine._weights.layers[number]
        norm = w.ffn_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        big = bool((decided["ffn"] == FFN_BIG).all())
        x = self.bulk(x, slice(2, 4), decided, big)
        return self.ffn(number, x, decided)

    def attention(self, number: int, hidden: Tensor, decided: Rows) -> Tensor:
        """Attention's contribution to the residual stream, (N, D)."""
        engine = self.engine
        config, shape, w = engine.config, engine.shape, engine._weights.layers[number]
        norm = w.attention_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        runs = decided["attention"] == 1
        channels, bits = decided["channels"], decided["bits"]
        x = self.bulk(x, slice(0, 2), decided, bool(runs.all()))
        kv, n = shape.kv_width, len(runs)
        if runs.all():
            joint, read = project(x, w.attention_in, channels[:, 0], bits[:, 0])
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
                        channels[chosen, 0],
                        bits[chosen, 0],
                        columns,
                    )
                    joint[index, : part.shape[1]] = part
        outputs = (
            w.attention_in.n_out if runs.all() else np.where(runs, w.attention_in.n_out, 2 * kv)
        )
        self.counters.projection(0, number, read, outputs, bits[:, 0])

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
                decided["kv_blocks"][rows][active],
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
            out, read = project(mixed, w.attention_out, channels[:, 1], bits[:, 1])
            self.counters.projection(1, number, read, w.attention_out.n_out, bits[:, 1])
            return out
        result = torch.zeros_like(hidden)
        read = np.zeros(n, np.int32)
        if runs.any():
            index = torch.from_numpy(np.nonzero(runs)[0])
            result[index], read[runs] = project(
                mixed[index], w.attention_out, channels[runs, 1], bits[runs, 1]
            )
        self.counters.projection(1, number, read, w.attention_out.n_out, bits[:, 1])
        self.stand_in("attention", number, x, ~runs, result)
        return result

    def decide_attention(self, number: int) -> None:
        """Have the authors write their rows (N,) of a layer, as far as its attention goes."""
        for i, (rows, positions) in enumerate(zip(self.rows, self.positions, strict=True)):
            target = self.plan[rows, number]
            self.ask(i, number, partial(_attention, number, positions, target))

    def decide_ffn(self, number: int, hidden: Tensor) -> None:
        """Give the authors their hidden states, from (N, D), and have them write the rest."""
        for i in range(len(self.batch)):
            self.ask(i, number, partial(self.decide_one, number, hidden, i))

    def decide_one(self, number: int, hidden: Tensor, i: int, author: Author) -> None:
        """As `decide_ffn`, for sequence i; and count what its predictor does."""
        rows, positions = self.rows[i], self.positions[i]
        decided = self.plan[rows, number]
        before = None if author.bounded else of_attention(decided)
        author.ffn(number, hidden[rows], positions, decided)
        if before is not None:
            check_kept(decided, before, number)
        released = author.releases(positions)
        self.counters.modulator(rows, released, self.sequences[i].overhead)

    def ffn(self, number: int, x: Tensor, decided: Rows) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its normed input."""
        big = decided["ffn"] == FFN_BIG
        if big.all():
            return self.big_ffn(number, x, decided, None)
        result = torch.zeros_like(x)
        if big.any():
            rows = np.nonzero(big)[0].astype(np.int32)
            index = torch.from_numpy(rows)
            result[index] = self.big_ffn(number, x[index], decided, rows)
        self.stand_in("ffn", number, x, decided["ffn"] == FFN_SMALL, result)
        return result

    def big_ffn(self, number: int, x: Tensor, decided: Rows, rows: IntArray | None) -> Tensor:
        """The FFN itself on the tokens `rows` (all for None), x (len(rows), D)."""
        engine, w = self.engine, self.engine._weights.layers[number]
        tokens = slice(None) if rows is None else rows
        channels, bits = decided["channels"][tokens], decided["bits"][tokens]
        inner, read = project(x, w.ffn_in, channels[:, 2], bits[:, 2])
        self.counters.projection(2, number, read, w.ffn_in.n_out, bits[:, 2], tokens)
        if engine.shape.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = engine._activation(gate) * up
        else:
            inner = engine._activation(inner)
        out, read = project(inner, w.ffn_out, channels[:, 3], bits[:, 3])
        self.counters.projection(3, number, read, w.ffn_out.n_out, bits[:, 3], tokens)
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
