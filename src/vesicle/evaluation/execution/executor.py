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
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vesicle.cost import Cost, price_dense_span
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.memory import peak_bytes, reset_peak
from vesicle.evaluation.execution.prompts import Codec, Prompt
from vesicle.plan import FloatArray, Method
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
    decode: Cost = field(default_factory=Cost)
    prompt: int
    generated: Cost
    seconds: dict[str, float]
    peak_bytes: int = field(default_factory=peak_bytes)
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
        self, ids: list[int], method: Method | None, *, context: int = 0, keep_levels: bool = False
    ) -> Execution:
        """The summed loss of a window; its first `context` tokens are a prompt, and not scored.

        Without context its very first token is not scored either.
        """

    def losses(
        self,
        windows: Sequence[list[int]],
        methods: Sequence[Method | None],
        *,
        context: int = 0,
        keep_levels: bool = False,
    ) -> list[Execution]:
        """The same of several windows of one length, each under its method, in one pass if able."""
        return [
            self.loss(ids, method, context=context, keep_levels=keep_levels)
            for ids, method in zip(windows, methods, strict=True)
        ]

    def dense(self, spans: Sequence[Span]) -> Cost:
        """What the dense model costs for the same tokens."""
        total = Cost()
        for span in spans:
            total += price_dense_span(self.shape, span.start, span.stop, span.head)
        return total


class Clock:
    """Seconds by phase, and a fresh peak of memory."""

    def __init__(self) -> None:
        reset_peak()
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self._last = time.perf_counter()

    def prefill(self) -> None:
        """Time since the last mark was prefill."""
        self._take("prefill")

    def decode(self) -> None:
        """Time since the last mark was decoding."""
        self._take("decode")

    def _take(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def nats_of(logits: Tensor, labels: Sequence[int]) -> float:
    """Summed loss of labels (n) under logits (n, V); float32 at least, a few rows at a time."""
    total = 0.0
    wanted = torch.tensor(labels, device=logits.device)
    for rows, part in zip(logits.split(256), wanted.split(256), strict=True):
        exact = rows if rows.dtype == torch.float64 else rows.float()
        total += float(nn.functional.cross_entropy(exact, part, reduction="none").double().sum())
    if not math.isfinite(total):
        raise VesicleError(f"the loss of {len(labels)} tokens is {total}; it must be finite")
    return total


def answer(
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
