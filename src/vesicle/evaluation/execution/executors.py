"""Who runs items: our engine, the reference inside transformers, or transformers as it is.

All three take the same prompts and give the same records, so that they can be held against each
other. Only the engine skips work: times, bytes and peaks of the others say nothing about a Plan.

A multiple-choice item reads its prompt once; each choice goes on from there (`Engine.fork`). A
generated answer is greedy. The LM head runs where logits are needed: for the prompt's last token
and each token fed back; for every token of a window whose loss is asked for. Those tokens are the
generated ones (see `vesicle.phases`), the others are prompt.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.cost import Cost, price, price_dense_span
from vesicle.engine import Engine
from vesicle.engine.engine import CHUNK
from vesicle.engine.sequence import Sequence as EngineSequence
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.language_modelling import model_shape, score
from vesicle.evaluation.execution.memory import peak_bytes, reset_peak
from vesicle.evaluation.execution.prompts import Codec, Prompt
from vesicle.families import cache_argument, find_cache, find_family
from vesicle.plan import Dense, FloatArray, Method
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape
from vesicle.tasks.items import Output


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a sequence, with logits from `head` on.

    An item's work is a few of these: a prompt with its answer, or a prompt and its choices.
    """

    start: int
    stop: int
    head: int

    def behind(self, prompt: int) -> Span:
        """What of it lies behind the first `prompt` tokens of the sequence."""
        start = min(max(self.start, prompt), self.stop)
        return Span(start, self.stop, max(self.head, start))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What running one item gave.

    Attributes:
        output: For the metrics.
        spans: The tokens that were run; the first ends the prefill.
        prefill: Executed for the prompt, the first answer token's logits included.
        decode: Executed for the tokens fed back; choices count as prefill.
        prompt: Positions below this one are prompt, the others generated.
        generated: Executed for the generated tokens, whichever of the two passes they are in.
        seconds: Wall-clock time of `prefill` and `decode`.
        peak_bytes: Most resident memory of the process while the item ran.
        levels: (T, L, 5) released, if they were asked for.
    """

    output: Output
    spans: tuple[Span, ...]
    prefill: Cost
    decode: Cost
    prompt: int
    generated: Cost
    seconds: dict[str, float]
    peak_bytes: int
    levels: FloatArray | None = field(default=None, repr=False)


class Executor(ABC):
    """Runs one item at a time.

    Attributes:
        shape: The sizes by which costs are counted.
        context_window: Most tokens of a sequence.
        batch: Windows of a text that are run in one pass.
    """

    shape: ModelShape
    context_window: int
    batch = 1

    @abstractmethod
    def generate(
        self,
        prompt: Prompt,
        method: Method | None,
        codec: Codec,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        ends: frozenset[int] = frozenset(),
        keep_levels: bool = False,
    ) -> Execution:
        """A greedy answer.

        Args:
            prompt: To read.
            method: Who decides; None for dense.
            codec: To tell stop strings.
            max_new_tokens: Most tokens.
            stop: Strings that end the answer.
            ends: Tokens that end it.
            keep_levels: Whether to keep released levels.
        """

    @abstractmethod
    def choose(
        self,
        prompt: Prompt,
        choices: Sequence[list[int]],
        method: Method | None,
        *,
        keep_levels: bool = False,
    ) -> Execution:
        """Log-likelihoods of several continuations of one prompt, each of at least one token."""

    @abstractmethod
    def loss(
        self, ids: list[int], method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        """The summed loss of a window; its first token is not scored."""

    def losses(
        self,
        windows: Sequence[list[int]],
        methods: Sequence[Method | None],
        *,
        keep_levels: bool = False,
    ) -> list[Execution]:
        """The same of several windows of one length, each under its method, in one pass if able."""
        return [
            self.loss(ids, method, keep_levels=keep_levels)
            for ids, method in zip(windows, methods, strict=True)
        ]

    def dense(self, spans: Sequence[Span]) -> Cost:
        """What the dense model costs for the same tokens."""
        total = Cost()
        for span in spans:
            total += price_dense_span(self.shape, span.start, span.stop, span.head)
        return total


class EngineExecutor(Executor):
    """Runs items on our engine."""

    def __init__(self, engine: Engine) -> None:
        """Run items on `engine`, with its shape and context window."""
        self.engine = engine
        self.shape = engine.shape
        self.context_window = engine.config.context_window

    def generate(
        self,
        prompt: Prompt,
        method: Method | None,
        codec: Codec,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        ends: frozenset[int] = frozenset(),
        keep_levels: bool = False,
    ) -> Execution:
        """As `Executor.generate`."""
        engine, n = self.engine, len(prompt.ids)
        clock = _Clock()
        sequence, rest = self._read(prompt.ids, method)
        token = engine.likeliest([(sequence, rest)])[0]
        clock.prefill()
        held = sequence.cache.bytes_held
        most = min(max_new_tokens, self.context_window - n)
        text = _answer(
            token, lambda id_: engine.likeliest([(sequence, [id_])])[0], codec, most, stop, ends
        )
        clock.decode()
        levels = sequence.levels if keep_levels else None
        prefill, decode, generated = (
            sequence.cost_of(part) for part in (slice(0, n), slice(n, None), slice(n - 1, None))
        )
        spans = (Span(0, n, n - 1), Span(n, sequence.length, n))
        end = sequence.cache.bytes_held
        sequence.close()
        return Execution(
            output=Output(text=text),
            spans=spans,
            prefill=_holding(prefill, held),
            decode=_holding(decode, end),
            prompt=n - 1,
            generated=generated,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            levels=levels,
        )

    def choose(
        self,
        prompt: Prompt,
        choices: Sequence[list[int]],
        method: Method | None,
        *,
        keep_levels: bool = False,
    ) -> Execution:
        """As `Executor.choose`: the prompt is read once; longer choices go on in forks of it."""
        engine, n = self.engine, len(prompt.ids)
        clock = _Clock()
        sequence, rest = self._read(prompt.ids, method)
        first = engine.forward([(sequence, rest)], "last")[0]
        cost, levels = sequence.cost, [sequence.levels]
        generated = sequence.cost_of(slice(n - 1, None))
        held = sequence.cache.bytes_held
        spans, nats = [Span(0, n, n - 1)], []
        for choice in choices:
            rows = first
            if len(choice) > 1:
                fork = engine.fork(sequence)
                rows = torch.cat([first, engine.forward([(fork, choice[:-1])], "all")[0]])
                cost += fork.cost
                generated += fork.cost_of(slice(n, None))
                held = max(held, fork.cache.bytes_held)
                if keep_levels:
                    levels.append(fork.levels[n:])
                fork.close()
            nats.append(-_nats(rows, choice))
            spans.append(Span(n, n + len(choice) - 1, n))
        clock.prefill()
        sequence.close()
        return Execution(
            output=Output(choice_nats=tuple(nats)),
            spans=tuple(spans),
            prefill=_holding(cost, held),
            decode=Cost(),
            prompt=n - 1,
            generated=generated,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            levels=np.concatenate(levels) if keep_levels else None,
        )

    def loss(
        self, ids: list[int], method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        """As `Executor.loss`, in passes of up to `CHUNK` tokens."""
        engine = self.engine
        sequence = engine.start(method)
        clock = _Clock()
        total = 0.0
        for start in range(0, len(ids), CHUNK):
            rows = engine.forward([(sequence, ids[start : start + CHUNK])], "all")[0]
            labels = ids[start + 1 : start + 1 + CHUNK]
            total += _nats(rows[: len(labels)], labels)
        clock.prefill()
        held, cost = sequence.cache.bytes_held, sequence.cost
        levels = sequence.levels if keep_levels else None
        sequence.close()
        return Execution(
            output=Output(nats=total, n_tokens=len(ids) - 1),
            spans=(Span(0, len(ids), 0),),
            prefill=_holding(cost, held),
            decode=Cost(),
            prompt=0,
            generated=cost,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            levels=levels,
        )

    def _read(self, prompt: list[int], method: Method | None) -> tuple[EngineSequence, list[int]]:
        """A sequence that has read all of a prompt but its last chunk, and that chunk."""
        sequence = self.engine.start(method)
        sequence.begin_prompt(len(prompt))
        last = (len(prompt) - 1) // CHUNK * CHUNK
        for start in range(0, last, CHUNK):
            self.engine.forward([(sequence, prompt[start : start + CHUNK])], "none")
        return sequence, prompt[last:]


class TransformersExecutor(Executor):
    """Runs items in Hugging Face transformers: dense as it is, other methods by the reference."""

    def __init__(self, model: nn.Module, *, attached: bool, batch: int = 1) -> None:
        """Use a causal LM.

        Args:
            model: Of a supported family.
            attached: Whether the reference is attached, also where nothing need be decided.
            batch: Windows of a text in one pass. Compare losses of one batch size only: sums of
                floats round by it.
        """
        self.model, self.attached, self.batch = model, attached, batch
        self.shape = model_shape(model)
        config: Any = model.config
        self.context_window = find_family(config).decoder_config(config).context_window

    def generate(
        self,
        prompt: Prompt,
        method: Method | None,
        codec: Codec,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        ends: frozenset[int] = frozenset(),
        keep_levels: bool = False,
    ) -> Execution:
        """As `Executor.generate`."""
        n = len(prompt.ids)
        clock = _Clock()
        with self._running(method, n) as run, torch.inference_mode():
            token, cache = self._step(prompt.ids, None, 1)
            clock.prefill()
            fed = 0

            def following(last: int) -> int:
                nonlocal cache, fed
                logits, cache = self._step([last], cache, 1)
                fed += 1
                return int(logits[-1].argmax())

            most = min(max_new_tokens, self.context_window - n)
            text = _answer(int(token[-1].argmax()), following, codec, most, stop, ends)
        clock.decode()
        spans = (Span(0, n, n - 1), Span(n, n + fed, n))
        prefill, decode = (self._cost(run, span) for span in spans)
        return Execution(
            output=Output(text=text),
            spans=spans,
            prefill=prefill,
            decode=decode,
            prompt=n - 1,
            generated=self._cost(run, spans[0].behind(n - 1)) + decode,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            levels=run.levels[0] if keep_levels and run is not None else None,
        )

    def choose(
        self,
        prompt: Prompt,
        choices: Sequence[list[int]],
        method: Method | None,
        *,
        keep_levels: bool = False,
    ) -> Execution:
        """As `Executor.choose`; the prompt is read again for each choice, but priced once."""
        n = len(prompt.ids)
        clock = _Clock()
        spans, nats, levels = [Span(0, n, n - 1)], [], []
        cost, generated = Cost(), Cost()
        for i, choice in enumerate(choices):
            with self._running(method, n) as run, torch.inference_mode():
                logits, _ = self._step(prompt.ids + choice[:-1], None, len(choice))
            nats.append(-_nats(logits, choice))
            spans.append(Span(n, n + len(choice) - 1, n))
            for span in (spans[0], spans[-1]) if i == 0 else spans[-1:]:
                cost += self._cost(run, span)
                generated += self._cost(run, span.behind(n - 1))
            if keep_levels and run is not None:
                levels.append(run.levels[0][0 if i == 0 else n :])
        clock.prefill()
        return Execution(
            output=Output(choice_nats=tuple(nats)),
            spans=tuple(spans),
            prefill=cost,
            decode=Cost(),
            prompt=n - 1,
            generated=generated,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            levels=np.concatenate(levels) if levels else None,
        )

    def loss(
        self, ids: list[int], method: Method | None, *, keep_levels: bool = False
    ) -> Execution:
        """As `Executor.loss`."""
        return self.losses([ids], [method], keep_levels=keep_levels)[0]

    def losses(
        self,
        windows: Sequence[list[int]],
        methods: Sequence[Method | None],
        *,
        keep_levels: bool = False,
    ) -> list[Execution]:
        """As `Executor.losses`, in one pass; the LM head runs on a few positions at a time."""
        bare = not self.attached and all(method is None for method in methods)
        given = None if bare else [method or Dense() for method in methods]
        clock = _Clock()
        found = score(
            self.model,
            torch.tensor(windows),
            given,
            batch=len(windows),
            keep_levels=keep_levels,
        )
        clock.prefill()
        seconds = {phase: value / len(windows) for phase, value in clock.seconds.items()}
        levels: list[Any] = found.levels or [None] * len(windows)
        return [
            Execution(
                output=Output(nats=float(found.nats[i]), n_tokens=len(ids) - 1),
                spans=(Span(0, len(ids), 0),),
                prefill=found.costs[i],
                decode=Cost(),
                prompt=0,
                generated=found.costs[i],
                seconds=seconds,
                peak_bytes=peak_bytes(),
                levels=levels[i],
            )
            for i, ids in enumerate(windows)
        ]

    def _running(self, method: Method | None, prompt_tokens: int) -> Any:
        """The reference's run in a `with` statement, or None for the bare model."""
        if method is None and not self.attached:
            return nullcontext()
        return attach(self.model, method or Dense(), prompt_tokens=prompt_tokens)

    def _step(self, ids: list[int], cache: Any, n_logits: int) -> tuple[Tensor, Any]:
        """Logits (n, V) of the last n tokens, and the cache that was filled."""
        out = self.model(
            input_ids=torch.tensor([ids], device=next(self.model.parameters()).device),
            use_cache=True,
            logits_to_keep=n_logits,
            **cache_argument(self.model, cache),
        )
        return out.logits[0], find_cache(out)

    def _cost(self, run: Any, span: Span) -> Cost:
        """The price of what the reference decided; of the dense model where nothing was."""
        if span.start == span.stop:
            return Cost()
        if run is None:
            return price_dense_span(self.shape, span.start, span.stop, span.head)
        heads = np.arange(span.start, span.stop) >= span.head
        return price(
            run.plans[0].tokens(span.start, span.stop),
            run.shape,
            run.method.overhead(run.shape),
            first_position=span.start,
            with_logits=heads,
            released=run.released[0][span.start : span.stop],
        )


class _Clock:
    """Seconds by phase, and a fresh peak of memory."""

    def __init__(self) -> None:
        reset_peak()
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._last = time.perf_counter()

    def prefill(self) -> None:
        self._take("prefill")

    def decode(self) -> None:
        self._take("decode")

    def _take(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def _holding(cost: Cost, held: int) -> Cost:
    return replace(cost, kv_bytes_held=held)


def _nats(logits: Tensor, labels: Sequence[int]) -> float:
    """Summed loss of labels (n) under logits (n, V); float32 at least, a few rows at a time."""
    total = 0.0
    wanted = torch.tensor(labels, device=logits.device)
    for rows, part in zip(logits.split(256), wanted.split(256), strict=True):
        exact = rows if rows.dtype == torch.float64 else rows.float()
        total += float(nn.functional.cross_entropy(exact, part, reduction="none").double().sum())
    if not math.isfinite(total):
        raise VesicleError(f"the loss of {len(labels)} tokens is {total}; it must be finite")
    return total


def _answer(
    first: int,
    following: Callable[[int], int],
    codec: Codec,
    most: int,
    stop: Sequence[str],
    ends: frozenset[int],
) -> str:
    """The text of a greedy answer, cut before the first stop string."""

    def tokens() -> Iterator[int]:
        token, count = first, 1
        while token not in ends:
            yield token
            if count >= most:
                return
            token, count = following(token), count + 1

    ids: list[int] = []
    text = ""
    for token in tokens():
        ids.append(token)
        text = codec.decode(ids)
        if any(s in text for s in stop):
            break
    cuts = [text.index(s) for s in stop if s in text]
    return text[: min(cuts)] if cuts else text
