"""Continuous batching: many requests, each with its own method and budget, share each step.

One step is

1. *decode*: one pass over the newest token of every request that is writing (two, if some draw
   from a nucleus: the LM head looks for the likeliest token alone or gives all logits);
2. *admit*: requests that wait, in order of arrival, join as long as there is room for them;
3. *prefill*: one pass over the next chunk of the oldest request that is still reading.

So texts go on being written while a long prompt is read, and a shorter `chunk` means shorter pauses
between their tokens.

A request is admitted when the pool has room for all that it may still grow to, beside all that the
running ones may: blocks are never wanted later that are not there, so nothing is ever preempted and
nothing can wait for good. A request that would not fit an empty pool is refused when it is added.

Each request gets what `Engine.generate` gives it alone, to the bit (but see `engine.native`):
tokens, Plan, levels and counted cost. Tokens reused from a `PrefixIndex` cost nothing.

A request that goes wrong (an author that fails, logits that are not numbers) fails by itself: the
others get what they would get without it.

Requests may be added and cancelled from any thread, between the steps of the one that runs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from vesicle.cost import Cost
from vesicle.engine.engine import Engine
from vesicle.engine.prefix import PrefixIndex
from vesicle.engine.prompt import Prompt, checked_ends
from vesicle.engine.sampling import Sampling
from vesicle.engine.sequence import Sequence, Wanted
from vesicle.errors import CacheFullError, VesicleError
from vesicle.modulator import Modulator
from vesicle.phases import Phases
from vesicle.plan import Method, Replay

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: A text to continue, messages to answer, or token ids, as for `Engine.encode`.
        method: A method, or a modulator; dense for None.
        budget: Of the modulator; its own default for None.
        phases: Of the modulator: on which tokens each transmitter acts.
        max_new_tokens: Most tokens to write.
        sampling: Greedy by default.
        stop: Ids of the tokens that end the text, which are not part of it: the model's own by
            default, none if empty.
    """

    prompt: Prompt
    method: Method | Modulator | None = None
    budget: float | None = None
    phases: Phases | None = None
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: Collection[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token was written.

    Attributes:
        request_id: From `Scheduler.add`.
        token: Its id.
    """

    request_id: int
    token: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A request has ended; its blocks are free again.

    Attributes:
        request_id: From `Scheduler.add`.
        reason: A stop token was drawn, `max_new_tokens` are written, or it was cancelled.
        tokens: All that was written.
        sequence: Closed; its Plan, its levels, and what the dense model would have spent
            (`dense_cost`, `share`) can be read.
        cost: Counted work, and the cache held at the end.
        reused_tokens: Prompt tokens taken from the prefix index, which cost nothing here.
    """

    request_id: int
    reason: Reason
    tokens: list[int]
    sequence: Sequence
    cost: Cost
    reused_tokens: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request was given up; its blocks are free again.

    Attributes:
        request_id: From `Scheduler.add`.
        error: Why.
    """

    request_id: int
    error: VesicleError


Event = Token | Finished | Failed


class _Job:
    """A request that waits or runs: its sequence, what it has written, its random numbers."""

    def __init__(
        self,
        number: int,
        request: Request,
        ids: list[int],
        stop: frozenset[int],
        sequence: Sequence,
    ) -> None:
        self.number = number
        self.request = request
        self.sequence = sequence
        self.ids, self.prompt = ids, np.array(ids)
        self.stop = stop
        self.generator = request.sampling.generator()
        self.draws_likeliest = sequence.engine.draws_likeliest(request.sampling)
        self.noise: Tensor | None = None
        self.tokens: list[int] = []
        self.reused = 0

    def draw(self, logits: Tensor) -> int:
        """The next token from logits (V,)."""
        return self.request.sampling.draw(logits, self.generator)

    @property
    def reading(self) -> bool:
        """Whether prompt tokens remain."""
        return self.sequence.length < len(self.ids)

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to process: the last one written is not fed back."""
        return len(self.ids) + self.request.max_new_tokens - 1

    @property
    def blocks_to_come(self) -> int:
        """Blocks that it may still take from the pool."""
        return self.sequence.cache.blocks_needed(self.most_tokens - self.sequence.length)


class Scheduler:
    """Runs requests on one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_running: int = 16,
        max_waiting: int = 1024,
        chunk: int = 512,
        prefix_bytes: int | None = None,
    ) -> None:
        """No requests yet.

        Args:
            engine: What runs them. Its pool may serve other sequences too.
            max_running: Most requests in one step.
            max_waiting: Most requests that wait to run.
            chunk: Most prompt tokens in one step.
            prefix_bytes: Most bytes of finished texts to keep for requests with the same opening;
                0 for none, None for a quarter of the pool. They give way to running requests.

        Raises:
            VesicleError: If a number is out of range.
        """
        settings = {"max_running": max_running, "max_waiting": max_waiting, "chunk": chunk}
        for name, value in settings.items():
            if value < 1:
                raise VesicleError(f"{name} is {value}; allowed: 1 and above")
        if prefix_bytes is None:
            prefix_bytes = engine.pool.capacity * engine.pool.bytes_per_block // 4
        self.engine = engine
        self.prefixes = PrefixIndex(engine, prefix_bytes)
        self._max_running, self._max_waiting, self._chunk = max_running, max_waiting, chunk
        self._added = 0
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []  # oldest first
        self._events: list[Event] = []

    @property
    def n_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._running)

    def add(self, request: Request) -> int:
        """Queue a request; returns the id that its events carry.

        Raises:
            VesicleError: If it is malformed, can never fit the context window or the pool, or too
                many requests wait already.
            ModelError: If its modulator was made for another model.
        """
        with self.engine.lock:
            return self._add(request)

    def _add(self, request: Request) -> int:
        ids = self.engine.encode(request.prompt)
        stop = self.engine.ends if request.stop is None else checked_ends(request.stop)
        n, new = len(ids), request.max_new_tokens
        if not ids:
            raise VesicleError("the prompt has no tokens; give at least one")
        if new < 1:
            raise VesicleError(f"max_new_tokens is {new}; allowed: 1 and above")
        if len(self._waiting) >= self._max_waiting:
            raise VesicleError(
                f"{len(self._waiting)} requests wait already; allowed: {self._max_waiting}"
            )
        sequence = self.engine.start(request.method, request.budget, request.phases)
        sequence.begin_prompt(n)
        job = _Job(self._added, request, ids, stop, sequence)
        self.engine.check_tokens(ids)
        window, pool = self.engine.config.context_window, self.engine.pool
        if job.most_tokens > window:
            raise VesicleError(
                f"{n} prompt tokens and {new} new ones exceed the model's context window of "
                f"{window}"
            )
        needed = job.blocks_to_come
        if needed > pool.capacity:
            raise VesicleError(
                f"{n} prompt tokens and {new} new ones need {needed} blocks of KV cache; "
                f"allowed: {pool.capacity}, all that the pool has"
            )
        method = job.sequence.method
        if isinstance(method, Replay) and job.most_tokens > method.plan.n_tokens:
            raise VesicleError(
                f"{n} prompt tokens and {new} new ones exceed the plan's {method.plan.n_tokens}"
            )
        self._added += 1
        self._waiting.append(job)
        return job.number

    def cancel(self, request_id: int) -> bool:
        """Give a request up: its blocks are free at once, and the next step tells that it ended.

        Returns:
            Whether there was such a request, waiting or running.
        """
        with self.engine.lock:
            for job in [*self._waiting, *self._running]:
                if job.number == request_id:
                    self._finish(job, "cancelled")
                    return True
        return False

    def step(self) -> list[Event]:
        """Write at most one token of each running request, and read at most one chunk of one."""
        with self.engine.lock:
            self._decode()
            self._admit()
            self._prefill()
            events, self._events = self._events, []
            return events

    def run(self) -> Iterator[Event]:
        """Step until nothing is left to do; requests may be added meanwhile."""
        while self._running or self._waiting or self._events:
            yield from self.step()

    def close(self) -> None:
        """Give up all requests and all kept prefixes, without events."""
        with self.engine.lock:
            for job in [*self._waiting, *self._running]:
                job.sequence.close()
            self._waiting.clear()
            self._running.clear()
            self._events.clear()
            self.prefixes.clear()

    def _decode(self) -> None:
        writing = [job for job in self._running if not job.reading]
        for likeliest in (True, False):
            jobs = [job for job in writing if job.draws_likeliest == likeliest]
            self._write([(job, job.tokens[-1:]) for job in jobs])

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            job = self._waiting[0]
            # What it reuses is held from here on, so that making room cannot cost it that.
            self._reuse(job)
            promised = sum(other.blocks_to_come for other in self._running)
            pool = self.engine.pool
            while pool.blocks_free - promised < job.blocks_to_come and self.prefixes.evict():
                pass
            if pool.blocks_free - promised >= job.blocks_to_come:
                self._running.append(self._waiting.popleft())
            elif self._running:
                return  # their blocks will do
            else:
                self._fail(
                    job,
                    CacheFullError(
                        f"{job.blocks_to_come} blocks of KV cache are needed, "
                        f"{pool.blocks_free} are free, and the others are not the scheduler's"
                    ),
                )

    def _prefill(self) -> None:
        job = next((job for job in self._running if job.reading), None)
        if job is None:
            return
        if job.sequence.length == job.reused:
            self._reuse(job)  # once more: others have been read since it was admitted
        prompt, start = job.ids, job.sequence.length
        part = prompt[start : start + self._chunk]
        if start + len(part) < len(prompt):
            self._run([(job, part)], "none")
        else:
            self._write([(job, part)])

    def _write(self, batch: list[tuple[_Job, list[int]]]) -> None:
        """One pass, and the next token of each of its requests, all drawn in one of two ways."""
        likeliest = bool(batch) and batch[0][0].draws_likeliest
        for job, ids in list(batch) if likeliest else ():
            try:
                job.noise = job.request.sampling.noise(self.engine.shape.vocabulary, job.generator)
            except Exception as error:
                self._fail(job, error)
                batch.remove((job, ids))
        for job, result in self._run(batch, "likeliest" if likeliest else "whole"):
            try:
                token = result if isinstance(result, int) else job.draw(result[-1])
            except Exception as error:  # of logits that are no numbers, say
                self._fail(job, error)
            else:
                self._take(job, token)

    def _run(
        self, batch: list[tuple[_Job, list[int]]], wants: Wanted
    ) -> list[tuple[_Job, Tensor | int]]:
        """One pass and what it computed for each request; those that cannot run are given up."""
        done = list[tuple[_Job, Tensor | int]]()
        while batch:
            try:
                parts = [(job.sequence, ids) for job, ids in batch]
                out = self.engine.attempt(parts, wants, [job.noise for job, _ in batch])
            except CacheFullError as error:
                # Someone else has taken promised blocks. Nothing has run yet.
                if not self.prefixes.evict():
                    self._fail(batch.pop()[0], error)
                continue
            for (job, _), outcome in zip(batch, out, strict=True):
                if isinstance(outcome, Exception):
                    self._fail(job, outcome)
                else:
                    done.append((job, outcome))
            break
        return done

    def _reuse(self, job: _Job) -> None:
        known = self.prefixes.start(job.sequence.method, job.prompt, job.sequence.length)
        if known is not None:
            job.sequence.close()
            known.begin_prompt(len(job.prompt) - known.length)
            job.sequence, job.reused = known, known.length

    def _take(self, job: _Job, token: int) -> None:
        """Go on from the token that was drawn."""
        if not job.tokens:
            self.prefixes.add(job.sequence)  # the prompt, for those that wait
        if token in job.stop:
            return self._finish(job, "stop")
        job.tokens.append(token)
        self._events.append(Token(request_id=job.number, token=token))
        if len(job.tokens) == job.request.max_new_tokens:
            self._finish(job, "length")

    def _finish(self, job: _Job, reason: Reason) -> None:
        cost = job.sequence.cost
        self.prefixes.add(job.sequence)
        self._remove(job)
        self._events.append(
            Finished(
                request_id=job.number,
                reason=reason,
                tokens=job.tokens,
                sequence=job.sequence,
                cost=cost,
                reused_tokens=job.reused,
            )
        )

    def _fail(self, job: _Job, error: Exception) -> None:
        self._remove(job)
        if not isinstance(error, VesicleError):  # an author's own kind
            cause, error = error, VesicleError(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        self._events.append(Failed(request_id=job.number, error=error))

    def _remove(self, job: _Job) -> None:
        (self._running if job in self._running else self._waiting).remove(job)
        job.sequence.close()
