"""Texts for lm_eval: what its generation arguments ask for, and writing side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vesicle.engine import Engine, Sampling
from vesicle.engine.engine import CHUNK
from vesicle.engine.scheduler import Failed, Finished, Request, Scheduler, Token
from vesicle.errors import VesicleError
from vesicle.integrations.lm_eval.arguments import number, unknown, whole
from vesicle.integrations.lm_eval.tally import Tally
from vesicle.models import Text
from vesicle.plan import Method

if TYPE_CHECKING:
    from vesicle.models.text import TextStream

_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
# Values that ask for nothing, by name of the generation argument.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "use_cache": (True,),
}
_OF_SAMPLING = ("top_k", "min_p")


@dataclass(frozen=True)
class Generation:
    """How a text is to be written.

    Attributes:
        stop: Strings that end it.
        ends: Tokens that end it.
        most: Most tokens.
        sampling: Greedy, or how tokens are drawn.
    """

    stop: tuple[str, ...]
    ends: frozenset[int]
    most: int
    sampling: Sampling


@dataclass(frozen=True)
class Job:
    """A text to write.

    Attributes:
        place: Of its request.
        prompt: Token ids to read.
        how: How it is to be written.
    """

    place: int
    prompt: list[int]
    how: Generation


@dataclass
class _Writing:
    """A text that is being written."""

    job: Job
    stream: TextStream
    text: str = ""

    def add(self, piece: str) -> bool:
        """Go on, end before the first stop string, and tell whether there was one."""
        self.text += piece
        found = [self.text.index(s) for s in self.job.how.stop if s in self.text]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)


def read_generation(
    arguments: dict[str, Any],
    *,
    default_most: int,
    window: int,
    special: Mapping[str, int],
    ends: frozenset[int],
    seed: int,
) -> Generation:
    """What lm_eval's generation arguments ask for.

    Args:
        arguments: As a task gives them.
        default_most: Most tokens, where they do not say.
        window: Most tokens of a prompt and its text; the prompt has at least one.
        special: Ids of special tokens, which have no text and so are told by their id.
        ends: Tokens that end a text in any case.
        seed: If tokens are drawn.

    Raises:
        VesicleError: One is unknown or has a value that is not allowed.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    known = dict(normalize_gen_kwargs(arguments, default_most))
    for name, value in known.items():
        idle = name in _OF_SAMPLING and not known.get("do_sample")
        if name in _KNOWN or idle or value in _NEUTRAL.get(name, ()):
            continue
        if name in _NEUTRAL:
            allowed = ", ".join(str(v) for v in _NEUTRAL[name])
            raise VesicleError(f"{name} is {value!r}; allowed: {allowed}")
        raise unknown("generation argument", name, _KNOWN)
    until = [s for s in handle_stop_sequences(known.get("until"), eos=None) if s]
    most = whole("max_gen_toks", known["max_gen_toks"], most=window - 1)
    sampling = Sampling()
    if known.get("do_sample"):
        sampling = Sampling(
            temperature=number("temperature", known.get("temperature", 1.0)),
            top_p=number("top_p", known.get("top_p", 1.0)),
            seed=seed,
        )
    ends |= {special[s] for s in until if s in special}
    return Generation(tuple(until), ends, most, sampling)


def write(
    jobs: Sequence[Job],
    engine: Engine,
    method: Method | None,
    text: Text,
    tally: Tally,
    side_by_side: int,
) -> Iterator[tuple[int, str]]:
    """Write texts.

    Args:
        jobs: What to write.
        engine: Who computes.
        method: Who decides; None for dense.
        text: Decodes tokens.
        tally: Where work is counted.
        side_by_side: Most texts at a time.

    Yields:
        Place and text of each job, as they end.

    Raises:
        VesicleError: The engine gave one up.
    """
    waiting = sorted(jobs, key=lambda job: len(job.prompt))  # the longest is taken first
    scheduler = Scheduler(engine, max_running=side_by_side, chunk=CHUNK, prefix_bytes=0)
    writing: dict[int, _Writing] = {}

    def begin() -> None:
        job = waiting.pop()
        request = Request(
            prompt=job.prompt,
            method=method,
            max_new_tokens=job.how.most,
            sampling=job.how.sampling,
            stop=job.how.ends,
        )
        writing[scheduler.add(request)] = _Writing(job, text.stream())

    try:
        for _ in jobs[:side_by_side]:
            begin()
        for event in scheduler.run():
            match event:
                case Failed(error=error):
                    raise error
                case Token(request_id=id_, token=token):
                    one = writing[id_]
                    if one.add(one.stream.push(token)):
                        scheduler.cancel(id_)
                case Finished(request_id=id_):
                    one = writing.pop(id_)
                    if event.reason != "cancelled":
                        one.add(one.stream.flush())
                    read = len(event.sequence.token_costs["flops_head"])
                    tally.add(event.sequence, event.cost, 0, read, len(one.job.prompt) - 1)
                    if waiting:
                        begin()
                    yield one.job.place, one.text
    finally:
        scheduler.close()
