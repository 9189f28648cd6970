"""What goes wrong for one sequence goes wrong for it alone; the others get what they get alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.caching import heads_of
from tests.engine.decoding import IDS, native
from tests.tiny import random_plan, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Sampling, Sequence
from vesicle.engine.scheduler import Event, Failed, Finished, Request, Scheduler
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorAuthor
from vesicle.plan import Author, Method, Replay

NEW = 8


def text(n: int, seed: int = 1) -> list[int]:
    return tokens(n, seed=seed)[0].tolist()


class Failing(Method):
    """At rest, and it fails at one moment of one position."""

    def __init__(self, moment: str, at: int, layer: int = 1, error: Any = ValueError) -> None:
        self.moment, self.at, self.layer, self.error = moment, at, layer, error

    def author(self, shape: Any) -> Author:
        return FailingAuthor(self, shape)


class FailingAuthor(Author):
    def __init__(self, method: Failing, shape: Any) -> None:
        self._method, self._shape = method, shape

    def _perhaps(self, moment: str, positions: Any, layer: int | None = None) -> None:
        method = self._method
        at = moment == method.moment and method.at in positions
        if at and layer in (None, method.layer):
            raise method.error(f"{moment} fails at {method.at}")

    def planned(self, positions: Any) -> None:
        self._perhaps("planned", positions[:1])

    def releases(self, positions: Any) -> Any:
        self._perhaps("releases", positions)
        return np.zeros(len(positions), bool)

    def attention(self, layer: int, positions: Any, rows: Any) -> None:
        self._perhaps("attention", positions, layer)

    def ffn(self, layer: int, hidden: Tensor, positions: Any, rows: Any) -> None:
        self._perhaps("ffn", positions, layer)


class Faulty(Sampling):
    """Draws at random, and fails at the nth token."""

    def __init__(self, fails_at: int) -> None:
        super().__init__(temperature=1.0, top_p=0.99)  # below 1, or nothing is drawn from logits
        object.__setattr__(self, "drawn", [])
        object.__setattr__(self, "fails_at", fails_at)

    def draw(self, logits: Tensor, generator: Any) -> int:
        self.drawn.append(None)
        if len(self.drawn) == self.fails_at:
            # What torch says of chances that are no numbers.
            return super().draw(torch.full_like(logits, torch.nan), generator)
        return super().draw(logits, generator)


class FaultyNoise(Sampling):
    """Fails where the noise of its nth token is made."""

    def __init__(self, fails_at: int) -> None:
        super().__init__(temperature=1.0)
        object.__setattr__(self, "left", [fails_at])

    def noise(self, n_words: int, generator: Any) -> Tensor | None:
        self.left[0] -= 1
        if not self.left[0]:
            raise MemoryError("no room for noise")
        return super().noise(n_words, generator)


def companions(engine: Engine) -> list[Request]:
    """Native and general, stateful and not, greedy and sampled."""
    linear = tiny_modulator(engine.shape, dtype=torch.float32)
    recurrent = tiny_modulator(engine.shape, "recurrent", dtype=torch.float32)
    screened = Replay(random_plan(engine.shape, 60, np.random.default_rng(7)), linear.stand_ins)
    warm = Sampling(temperature=0.9, seed=3)
    return [
        Request(prompt=text(21), max_new_tokens=NEW),
        Request(prompt=text(9, 2), method=linear, budget=0.6, max_new_tokens=NEW),
        Request(prompt=text(17, 3), method=recurrent, budget=0.6, max_new_tokens=NEW),
        Request(prompt=text(12, 4), method=screened, max_new_tokens=NEW, sampling=warm),
        Request(
            prompt=text(30, 5), method=recurrent, budget=0.5, max_new_tokens=NEW, sampling=warm
        ),
    ]


def outcome(events: list[Event]) -> dict[int, Any]:
    return {e.request_id: e for e in events if isinstance(e, Finished | Failed)}


def alone(engine: Engine, request: Request) -> Finished:
    scheduler = Scheduler(engine, prefix_bytes=0)
    number = scheduler.add(request)
    end = outcome(list(scheduler.run()))[number]
    assert isinstance(end, Finished)
    return end


def same(engine: Engine, request: Request, end: Any) -> None:
    expected = alone(engine, request)
    assert isinstance(end, Finished), end
    assert end.tokens == expected.tokens
    assert end.sequence.plan.equals(expected.sequence.plan)
    assert end.sequence.token_ids == expected.sequence.token_ids
    np.testing.assert_allclose(end.sequence.levels, expected.sequence.levels, atol=3e-6)
    assert end.cost == expected.cost


BAD: dict[str, Callable[[Engine], Request]] = {
    **{
        f"{moment} at {where}": lambda e, moment=moment, at=at: Request(
            prompt=text(10, 6), method=Failing(moment, at), max_new_tokens=NEW
        )
        for moment in ("planned", "releases", "attention", "ffn")
        for where, at in (("once written", 12), ("the prompt", 9))
        if not (moment == "planned" and where == "the prompt")
    },
    "the first layer": lambda e: Request(
        prompt=text(10, 6), method=Failing("attention", 12, layer=0), max_new_tokens=NEW
    ),
    "an error of our own": lambda e: Request(
        prompt=text(10, 6),
        method=Failing("ffn", 12, error=VesicleError),
        max_new_tokens=NEW,
    ),
    "the first draw": lambda e: Request(prompt=text(10, 6), max_new_tokens=NEW, sampling=Faulty(1)),
    "a later draw": lambda e: Request(prompt=text(10, 6), max_new_tokens=NEW, sampling=Faulty(3)),
    "noise": lambda e: Request(prompt=text(10, 6), max_new_tokens=NEW, sampling=FaultyNoise(3)),
}


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("bad", BAD)
def test_a_request_that_fails_fails_alone(bad: str, place: int):
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    requests = companions(engine)
    requests.insert(place, BAD[bad](engine))
    scheduler = Scheduler(engine, prefix_bytes=0)
    numbers = [scheduler.add(request) for request in requests]
    ends = outcome(list(scheduler.run()))
    assert engine.pool.blocks_in_use == 0
    for i, (number, request) in enumerate(zip(numbers, requests, strict=True)):
        if i == place:
            assert isinstance(ends[number], Failed)
            assert isinstance(ends[number].error, VesicleError)
        else:
            same(engine, request, ends[number])


def test_what_a_request_failed_with_is_told():
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    scheduler = Scheduler(engine, prefix_bytes=0)
    scheduler.add(Request(prompt=text(10), method=Failing("ffn", 12), max_new_tokens=NEW))
    (failed,) = (e for e in scheduler.run() if isinstance(e, Failed))
    assert str(failed.error) == "ValueError: ffn fails at 12"
    assert isinstance(failed.error.__cause__, ValueError)


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_no_numbers(greedy: bool):
    """The stand-ins of one request's method are NaN: it can go no further, the others do."""
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    engine._native = None  # of the core's own check there is a test with the core
    spoilt = tiny_modulator(engine.shape, dtype=torch.float32)
    plan = random_plan(engine.shape, 60, np.random.default_rng(1))
    plan.ffn[:], plan.ffn[12, 1], plan.attention[:] = 2, 1, 1
    spoilt.ffn_standin.bias.data.fill_(torch.nan)
    sampling = Sampling() if greedy else Sampling(temperature=1.0)
    bad = Request(
        prompt=text(10),
        method=Replay(plan, spoilt.stand_ins),
        max_new_tokens=NEW,
        sampling=sampling,
    )
    good = companions(engine)
    scheduler = Scheduler(engine, prefix_bytes=0)
    numbers = [scheduler.add(request) for request in (*good[:2], bad, *good[2:])]
    ends = outcome(list(scheduler.run()))
    assert isinstance(ends.pop(numbers.pop(2)), Failed)
    for number, request in zip(numbers, good, strict=True):
        same(engine, request, ends[number])


def test_a_sequence_that_someone_closed_fails_alone():
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    requests = companions(engine)
    scheduler = Scheduler(engine, prefix_bytes=0)
    numbers = [scheduler.add(request) for request in requests]
    events: list[Event] = []
    for _ in range(len(requests)):
        events += scheduler.step()
    scheduler._running[1].sequence.close()
    ends = outcome(events + list(scheduler.run()))
    for number, request in zip(numbers, requests, strict=True):
        if number == numbers[1]:
            assert "the sequence is closed" in str(ends[number].error)
        else:
            same(engine, request, ends[number])


def test_the_cache_that_others_filled_fails_the_last_one():
    """Those that fit go on, as they would alone."""
    model = tiny_model("llama", dtype=torch.float32)
    whole = Engine.from_model(model)
    block = heads_of(whole) * whole.pool.bytes_per_block
    engine = Engine.from_model(model, kv_capacity=6 * block)
    scheduler = Scheduler(engine, prefix_bytes=0)
    requests = [Request(prompt=text(14, seed), max_new_tokens=12) for seed in range(3)]
    numbers = [scheduler.add(request) for request in requests]
    events: list[Event] = []
    for _ in range(3):
        events += scheduler.step()
    other = engine.start()
    engine.forward([(other, text(17))])  # two of the three blocks that are promised
    ends = outcome(events + list(scheduler.run()))
    failed = [n for n in numbers if isinstance(ends[n], Failed)]
    assert failed == numbers[2:]
    for number, request in zip(numbers, requests, strict=True):
        if number not in failed:
            same(whole, request, ends[number])
    other.close()


PROMPTS: dict[str, tuple[Any, str]] = {
    "a fraction": ([3, 4.5], r"the prompt is \[3, 4.5\]; allowed: a text, token ids, or messages"),
    "bytes": (b"abc", "the prompt is b'abc'; allowed: a text"),
    "nothing": (None, "the prompt is None; allowed"),
    "an id too large": ([3, 97], "token id 97 is out of range; allowed: 0 to 96"),
    "a negative id": ([-1], "token id -1 is out of range"),
    "nested": ([[1, 2]], "allowed: a text"),
}


@pytest.mark.parametrize(("prompt", "message"), PROMPTS.values(), ids=PROMPTS)
def test_bad_prompts_are_refused_when_they_are_added(prompt: Any, message: str):
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    scheduler = Scheduler(engine, prefix_bytes=0)
    (good, *_) = requests = companions(engine)
    number = scheduler.add(good)
    with pytest.raises(VesicleError, match=message):
        scheduler.add(Request(prompt=prompt))
    with pytest.raises(VesicleError, match=message):
        engine.generate(prompt)
    same(engine, requests[0], outcome(list(scheduler.run()))[number])


def test_a_prompt_that_changes_after_it_was_added_does_not():
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    prompt = text(20)
    scheduler = Scheduler(engine, prefix_bytes=0)
    number = scheduler.add(Request(prompt=prompt, max_new_tokens=NEW))
    prompt[3:] = [999]
    end = outcome(list(scheduler.run()))[number]
    same(engine, Request(prompt=text(20), max_new_tokens=NEW), end)


def test_one_pass_of_the_engine():
    """`attempt` tells of each; `forward` raises, when the others have read their tokens."""
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    good, bad = engine.start(), engine.start(Failing("ffn", 2))
    found = engine.attempt([(good, text(5)), (bad, text(5))], "all")
    assert isinstance(found[1], ValueError)
    with pytest.raises(VesicleError, match="twice in one pass"):
        engine.attempt([(good, [1]), (good, [1])])
    assert torch.equal(found[0], engine.forward([(engine.start(), text(5))], "all")[0])
    assert (good.length, bad.length, bad.plan.n_tokens) == (5, 0, 0)
    with pytest.raises(ValueError, match="ffn fails at 2"):
        engine.forward([(good, text(3, 2)), (bad, text(5))])
    assert (good.length, bad.length) == (8, 0)
    outcomes = engine.attempt([(good, []), (bad, [99]), (engine.start(), [1])])
    assert [str(o) for o in outcomes[:2]] == [
        "a chunk has no tokens; give at least one",
        "token id 99 is out of range; allowed: 0 to 96",
    ]
    assert isinstance(outcomes[2], Tensor)


@pytest.mark.parametrize("kind", ["linear", "mlp", "recurrent"])
def test_a_pass_that_was_broken_off_can_be_run_again(kind: str, monkeypatch: pytest.MonkeyPatch):
    """As by an interrupt: Plan, levels, counts and a predictor's state are those of one pass."""
    engine = Engine.from_model(tiny_model("llama"))
    method = tiny_modulator(engine.shape, kind).at(0.6)
    sequence, expected = engine.start(method), engine.start(method)
    ids = text(40)

    def read(where: Sequence) -> list[Tensor]:
        parts = (ids[:20], ids[20:33], *([i] for i in ids[33:]))
        return [engine.forward([(where, part)])[0] for part in parts]

    logits = read(expected)
    decide, left = ModulatorAuthor.ffn, [5]

    def interrupted(self: Any, layer: int, *rest: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return decide(self, layer, *rest)

    found = []
    for part in (ids[:20], ids[20:33], *([i] for i in ids[33:])):
        left[0] = 2
        with monkeypatch.context() as patch:
            patch.setattr(ModulatorAuthor, "ffn", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.forward([(sequence, part)])
        assert sequence.plan.n_tokens == sequence.length == len(sequence.levels)
        found += engine.forward([(sequence, part)])
    for got, wanted in zip(found, logits, strict=True):
        assert torch.equal(got, wanted)
    assert sequence.plan.equals(expected.plan)
    np.testing.assert_array_equal(sequence.levels, expected.levels)
    assert sequence.cost == expected.cost


def test_the_native_path_has_not_begun_where_the_general_one_is_broken_off(
    monkeypatch: pytest.MonkeyPatch,
):
    engine = native("fp32")
    sequence, other = engine.start(), engine.start(Failing("ffn", 30))
    engine.forward([(sequence, IDS[:20]), (other, IDS[:20])])

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(engine._weights), "logits", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.forward([(sequence, [IDS[20]]), (other, [IDS[20]])])
    assert (sequence.length, other.length, other.plan.n_tokens) == (20, 20, 20)
    logits = engine.forward([(sequence, [IDS[20]]), (other, [IDS[20]])])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
