"""EngineExecutor: items on our engine, which skips what a Plan says and counts what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vesicle.cost import Cost
from vesicle.engine import Engine
from vesicle.engine.engine import CHUNK
from vesicle.engine.sequence import Sequence as EngineSequence
from vesicle.evaluation.execution.executor import Clock, Execution, Executor, Span, answer, nats_of
from vesicle.evaluation.execution.language_modelling import first_scored
from vesicle.evaluation.execution.prompts import Codec, Prompt
from vesicle.plan import Method
from vesicle.tasks.items import Output


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
        clock = Clock()
        sequence, rest = self._read(prompt.ids, method)
        token = engine.likeliest([(sequence, rest)])[0]
        clock.prefill()
        held = sequence.cache.bytes_held
        most = min(max_new_tokens, self.context_window - n)
        text = answer(
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
        clock = Clock()
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
            nats.append(-nats_of(rows, choice))
            spans.append(Span(n, n + len(choice) - 1, n))
        clock.prefill()
        sequence.close()
        return Execution(
            output=Output(choice_nats=tuple(nats)),
            spans=tuple(spans),
            prefill=_holding(cost, held),
            prompt=n - 1,
            generated=generated,
            seconds=clock.seconds,
            levels=np.concatenate(levels) if keep_levels else None,
        )

    def loss(
        self, ids: list[int], method: Method | None, *, context: int = 0, keep_levels: bool = False
    ) -> Execution:
        """As `Executor.loss`, in passes of up to `CHUNK` tokens."""
        engine, first = self.engine, first_scored(context) - 1
        sequence = engine.start(method)
        if context:
            sequence.begin_prompt(context)
        clock = Clock()
        total = 0.0
        for start in range(0, first, CHUNK):
            engine.forward([(sequence, ids[start : min(first, start + CHUNK)])], "none")
        for start in range(first, len(ids), CHUNK):
            rows = engine.forward([(sequence, ids[start : start + CHUNK])], "all")[0]
            labels = ids[start + 1 : start + 1 + CHUNK]
            total += nats_of(rows[: len(labels)], labels)
        clock.prefill()
        held, cost = sequence.cache.bytes_held, sequence.cost
        generated = sequence.cost_of(slice(first, None))
        levels = sequence.levels if keep_levels else None
        sequence.close()
        return Execution(
            output=Output(nats=total, n_tokens=len(ids) - 1 - first),
            spans=(Span(0, len(ids), first),),
            prefill=_holding(cost, held),
            prompt=first,
            generated=generated,
            seconds=clock.seconds,
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


def _holding(cost: Cost, held: int) -> Cost:
    return replace(cost, kv_bytes_held=held)
