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

import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from vesicle import processors
from vesicle.activations import ACTIVATIONS
from vesicle.engine.generation import Generation
from vesicle.engine.linear import normalise
from vesicle.engine.native import MOST_TOKENS, NativeCore, uncovered
from vesicle.engine.pool import BlockPool, default_capacity, kv_dtype, with_kv
from vesicle.engine.previewed import Previews
from vesicle.engine.prompt import Prompt, checked_count, checked_ends, is_chat, prompt_ids
from vesicle.engine.rotary import Rotary
from vesicle.engine.sampling import Sampling
from vesicle.engine.sequence import Outcome, Part, Sequence, Wanted
from vesicle.engine.torch_pass import TorchPass
from vesicle.engine.weights import Packing, Weights, from_folder, from_model
from vesicle.errors import ModelError, VesicleError
from vesicle.models.text import Text, end_ids, token_ids
from vesicle.modulator import Modulator, served
from vesicle.phases import Phases
from vesicle.plan import (
    Dense,
    Method,
)
from vesicle.plan.forgetting import fork_of
from vesicle.shapes import ModelShape

CHUNK = 2048
"""Prompt tokens of a call of `forward`, unless a caller says otherwise."""


MOST_THREADS = 512
"""CPU threads that may be asked for; PyTorch breaks down at some thousands."""


_T = TypeVar("_T")


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
        self._rotaries = [Rotary(rotation, self.dtype) for rotation in loaded.config.rotaries]
        self._native = NativeCore.build(loaded, self.config, self.pool)
        self.previews = Previews(loaded.head, loaded.head_bias)
        self._activation = ACTIVATIONS[loaded.config.activation]
        self._text, self._folder, self._ends = text, folder, frozenset(ends)
        self.lock = threading.RLock()

    @property
    def weights_format(self) -> str:
        """How weights are stored, one of `weights.FORMATS`."""
        return self._weights.format

    @property
    def packing(self) -> tuple[Packing, ...]:
        """What packing has cost, matrix by matrix; empty where weights are dense."""
        return self._weights.packing

    @property
    def uncovered(self) -> str | None:
        """Why passes do not run in the native core, in a few words; None where they do."""
        return uncovered(self._weights, self.config, self.pool)

    @property
    def head_share(self) -> float | None:
        """Mean share of the LM head's rows read whole for a likeliest token; None before the first.

        An 8-bit head is screened with a proven bound once some tokens are written
        (`engine.screen`): the token is the same, most rows are read by half. Costs are those of the
        whole head.
        """
        return None if self._native is None else self._native.screening.share

    @property
    def weight_bytes(self) -> int:
        """Bytes in memory of all weights, previews included; a tied embedding counts once."""
        return self._weights.bytes_held + self.previews.bytes_held

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
            threads: CPU threads of this process; by default torch's own choice, within the quota
                of a container.

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
        elif processors.THREADS not in os.environ and torch.get_num_threads() > processors.usable():
            torch.set_num_threads(processors.usable())  # torch knows nothing of quotas
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

    def fork(
        self, sequence: Sequence, n_tokens: int | None = None, method: Method | None = None
    ) -> Sequence:
        """A new sequence that stands where another stood after `n_tokens`; both go on alone.

        So several continuations of one prompt are scored, and the prompt is read once. Complete
        blocks of keys and values, Plan rows and levels are shared; an incomplete last block is
        copied. The work on the tokens taken over is not counted as the fork's own, and its Plan has
        the whole head there.

        Args:
            sequence: Of this engine.
            n_tokens: Where to fork; by default where it stands.
            method: Who decides from there on; by default who decided so far.

        Raises:
            CacheFullError: If the pool has no room for the copy of the last block.
            VesicleError: If the sequence is closed, shorter, of another engine, or its author
                cannot be forked there (see `Author.fork`: of a predictor that carries state, it is
                known at the end alone); if entries that the fork would need were forgotten; or if
                another method carries state from tokens that it has not seen.
        """
        n = sequence.length if n_tokens is None else n_tokens
        if sequence.engine is not self:
            raise VesicleError("a sequence of another engine is to be forked; use that engine")
        with self.lock:
            sequence.flush()
            sequence.check_not_asking("forked")
            told = sequence.received is not None or sequence.observed is not None
            if method is None and told and n != sequence.length:
                raise VesicleError(
                    f"a sequence whose forgetter is told of attention is to be forked at {n} "
                    f"tokens; allowed: {sequence.length}, where it stands"
                )
            author = sequence.author.fork(n) if method is None else method.author(self.shape)
            if method is not None and author.carries_state:
                raise VesicleError(
                    f"{type(method).__name__} carries state from token to token, and cannot take "
                    f"over after {n}; start a new sequence"
                )
            if method is None and sequence.forgetter is not None:
                author.forgetter = fork_of(sequence.forgetter, n)
            try:
                cache = sequence.cache.fork(n)
            except ValueError as error:
                raise VesicleError(str(error)) from error
            fork = Sequence(self, method or sequence.method, author)
            fork.cache, fork.taken_over = cache, n
            if method is None:
                fork.follow(sequence)
            else:
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
            found = map(_result, self._read(dict(enumerate(batch)), logits))
            return cast("list[Tensor]", list(found))

    def likeliest(
        self,
        batch: list[tuple[Sequence, list[int]]],
        noises: Iterable[Tensor | None] | None = None,
    ) -> list[int]:
        """One pass over the next tokens of each sequence; the likeliest token to follow each.

        As the largest of `forward`'s last logits, but where a Plan previews or screens the LM head
        only some words' logits are exact, and those are ranked.

        Args:
            batch: As for `forward`.
            noises: For each sequence (V,) fp32 that its logits, and their previews, are moved by
                first, so that the token is drawn (`Sampling.noise`); or None.

        Raises:
            VesicleError: As `forward`, or noise of another shape; or if a logit is not finite, when
                the pass has run.
        """
        with self.lock:
            self._check(batch)
            with _moved(batch, noises):
                found = map(_result, self._read(dict(enumerate(batch)), "likeliest"))
            return cast("list[int]", list(found))

    def draws_likeliest(self, sampling: Sampling) -> bool:
        """Whether tokens are drawn as the likeliest of logits that noise has moved.

        Otherwise all logits have to be known: for the tokens of a nucleus, or beneath a cap. They
        are computed without a preview, which would take longer with as many exact words as a sum
        over all of them needs.
        """
        return sampling.greedy or (sampling.top_p == 1 and not self.config.logit_cap)

    def attempt(
        self,
        batch: list[Part],
        wants: Wanted = "last",
        noises: Iterable[Tensor | None] | None = None,
    ) -> list[Outcome]:
        """One pass like `forward` and `likeliest`, in which no sequence can fail another.

        What one gets does not depend on whether another fails. One that fails stands before the
        piece of its tokens that failed, of 128 at most: `Sequence.length` tells.

        Args:
            batch: As for `forward`.
            wants: As `logits` of `forward`, or "likeliest", or "whole" for the last ones without a
                preview.
            noises: As for `likeliest`.

        Returns:
            For each sequence what `forward` returns, or the likeliest id; or the error.

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
            with _moved(batch, noises):
                found = refused | dict(zip(left, self._read(left, wants), strict=True))
            return [found[i] for i in range(len(batch))]

    def _read(self, batch: dict[int, Part], wants: Wanted) -> list[Outcome]:
        """Read the parts of a batch, which have been checked, in as many passes as it takes.

        First as much of each as cannot be read together with what follows it: what lies before the
        last eviction in it, and beyond what one pass of the core takes.
        """
        left, outcomes = batch.copy(), dict[int, Outcome]()
        before = dict[int, list[Tensor]]()
        early = left
        while early:
            native, early = set[int](), dict[int, Part]()
            for i, (sequence, ids) in list(left.items()):
                try:
                    n, covered = self._reach(sequence)
                except Exception as error:  # an author's, as in `Asked`
                    outcomes[i] = error
                    del left[i]
                    continue
                if covered:
                    native.add(i)
                if n < len(ids):
                    early[i] = sequence, ids[:n]
                    left[i] = sequence, ids[n:]
            asked: Wanted = ("all" if wants == "all" else "none") if early else wants
            for i, outcome in self._run(early or left, native, asked).items():
                if not early:
                    outcomes[i] = outcome
                elif isinstance(outcome, Tensor):
                    before.setdefault(i, []).append(outcome)
                else:
                    outcomes[i] = outcome
                    del left[i]
        for i, pieces in before.items():
            last = outcomes[i]
            if wants == "all" and isinstance(last, Tensor):
                outcomes[i] = torch.cat([*pieces, last])
        return [outcomes[i] for i in batch]

    def _reach(self, sequence: Sequence) -> tuple[int, bool]:
        """How many of a sequence's next tokens one pass may read, and whether the core reads them.

        Raises:
            Exception: Whatever an author may raise.
        """
        sequence.cache.check_open()  # a forgetter may have closed it
        if sequence.length >= sequence.evicts_at:  # it could not forget when it came here
            sequence.evict()
        cut = sequence.evicts_at - sequence.length
        reach = self._native.reach(sequence) if self._native is not None else 0
        blocked = sequence.buffer().blocked if self._native is not None else 0
        if self.shape.windows:  # so that what windows leave behind comes back in time
            cut = min(cut, MOST_TOKENS)
        return min(cut, reach or blocked or cut), reach > 0

    def _run(self, batch: dict[int, Part], native: set[int], wants: Wanted) -> dict[int, Outcome]:
        """One pass, the places `native` in the core; who has come to an eviction then forgets."""
        others = {i: part for i, part in batch.items() if i not in native}
        found = dict(zip(others, self._run_torch(list(others.values()), wants), strict=True))
        found |= self._run_native({i: batch[i] for i in batch if i in native}, wants)
        for i, (sequence, _) in batch.items():
            if sequence.length == sequence.evicts_at:
                try:
                    sequence.evict()
                except Exception as error:  # a full pool, or whatever a forgetter may raise
                    found[i] = error
        return found

    def _run_native(self, batch: dict[int, Part], wants: Wanted) -> dict[int, Outcome]:
        """Run what the native core takes, in as many calls as its tokens need."""
        found = dict[int, Outcome]()
        for places in _together({i: len(ids) for i, (_, ids) in batch.items()}):
            assert self._native is not None
            for i in places:
                batch[i][0].reserve(len(batch[i][1]))
            parts = [batch[i] for i in places]
            found |= zip(places, self._native.run(parts, wants), strict=True)
        return found

    @torch.inference_mode()
    def _run_torch(self, batch: list[Part], wants: Wanted) -> list[Outcome]:
        """Run any batch in PyTorch."""
        if not batch:
            return []
        for sequence, ids in batch:
            sequence.flush()
            sequence.reserve(len(ids))
        run = TorchPass(self, batch)
        try:
            results = run.outcomes(wants)
        except BaseException:  # perhaps an interrupt
            for sequence, _ in batch:
                sequence.break_off()
            raise
        for i, ((sequence, ids), rows) in enumerate(zip(batch, run.rows, strict=True)):
            if i in run.asked.failed:
                sequence.break_off()
                continue
            sequence.advance(ids)
            sequence.builder.add(run.plan[rows])
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
            chunk: Prompt tokens per call of `forward`.

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
            if self.draws_likeliest(sampling):
                noise = sampling.noise(self.shape.vocabulary, generator)
                token = self.likeliest([(sequence, part)], [noise])[0]
            else:
                out = _result(self.attempt([(sequence, part)], "whole")[0])
                assert isinstance(out, Tensor)
                token = sampling.draw(out[-1], generator)
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


@contextmanager
def _moved(batch: list[Part], noises: Iterable[Tensor | None] | None) -> Iterator[None]:
    """What moves the logits of a batch's sequences, for as long as a pass takes."""
    sequences = [sequence for sequence, _ in batch]
    given = [None] * len(batch) if noises is None else list(noises)
    if len(given) != len(batch):
        raise VesicleError(f"{len(given)} noises for {len(batch)} sequences; allowed: one each")
    for sequence, noise in zip(sequences, given, strict=True):
        shape = (sequence.engine.shape.vocabulary,)
        if noise is not None and (noise.shape != shape or noise.dtype != torch.float32):
            raise VesicleError(
                f"noise is {noise.dtype} of {tuple(noise.shape)}; allowed: float32 of {shape}"
            )
    for sequence, noise in zip(sequences, given, strict=True):
        sequence.noise = None if noise is None else noise.cpu().contiguous()
    try:
        yield
    finally:
        for sequence in sequences:
            sequence.noise = None


def _together(tokens: dict[int, int]) -> Iterator[list[int]]:
    """Places by passes, each of `MOST_TOKENS` tokens at most, from how many each has."""
    part, total = list[int](), 0
    for place, n in tokens.items():
        if total + n > MOST_TOKENS:
            yield part
            part, total = [], 0
        part.append(place)
        total += n
    if part:
        yield part


def _result(outcome: Outcome) -> Tensor | int:
    """What was computed, if nothing went wrong."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
