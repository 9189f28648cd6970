"""TransformersExecutor: items in Hugging Face transformers, as it is or under the reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.cost import Cost, price, price_dense_span
from vesicle.evaluation.execution.executor import Clock, Execution, Executor, Span, answer, nats_of
from vesicle.evaluation.execution.language_modelling import first_scored, model_shape, score
from vesicle.evaluation.execution.prompts import Codec, Prompt
from vesicle.families import cache_argument, find_cache, find_family
from vesicle.plan import Dense, Method
from vesicle.reference.attach import attach
from vesicle.tasks.items import Output


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
        clock = Clock()
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
            text = answer(int(token[-1].argmax()), following, codec, most, stop, ends)
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
        clock = Clock()
        spans, nats, levels = [Span(0, n, n - 1)], [], []
        cost, generated = Cost(), Cost()
        for i, choice in enumerate(choices):
            with self._running(method, n) as run, torch.inference_mode():
                logits, _ = self._step(prompt.ids + choice[:-1], None, len(choice))
            nats.append(-nats_of(logits, choice))
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
            prompt=n - 1,
            generated=generated,
            seconds=clock.seconds,
            levels=np.concatenate(levels) if levels else None,
        )

    def loss(
        self, ids: list[int], method: Method | None, *, context: int = 0, keep_levels: bool = False
    ) -> Execution:
        """As `Executor.loss`."""
        return self.losses([ids], [method], context=context, keep_levels=keep_levels)[0]

    def losses(
        self,
        windows: Sequence[list[int]],
        methods: Sequence[Method | None],
        *,
        context: int = 0,
        keep_levels: bool = False,
    ) -> list[Execution]:
        """As `Executor.losses`, in one pass; the LM head runs on a few positions at a time."""
        bare = not self.attached and all(method is None for method in methods)
        given = None if bare else [method or Dense() for method in methods]
        clock = Clock()
        found = score(
            self.model,
            torch.tensor(windows),
            given,
            context=context,
            batch=len(windows),
            keep_levels=keep_levels,
        )
        clock.prefill()
        seconds = {phase: value / len(windows) for phase, value in clock.seconds.items()}
        levels: list[Any] = found.levels or [None] * len(windows)
        first = first_scored(context) - 1
        return [
            Execution(
                output=Output(nats=float(found.nats[i]), n_tokens=len(ids) - 1 - first),
                spans=(Span(0, len(ids), first),),
                prefill=found.costs[i],
                prompt=first,
                generated=found.generated[i],
                seconds=seconds,
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
