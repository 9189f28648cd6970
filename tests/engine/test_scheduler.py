"""Continuous batching: each request gets what it gets alone, and nothing waits for good."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.caching import heads_of
from tests.tiny import random_plan, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Sampling, core
from vesicle.engine.scheduler import Event, Failed, Finished, Request, Scheduler, Token
from vesicle.errors import CacheFullError, VesicleError
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import BLOCK, Author, Dense, Replay

needs_core = pytest.mark.skipif(not core.available(), reason="the native core is not built here")
FP64, FP32 = torch.float64, torch.float32


def small_engine(n_blocks: int | None = None, dtype: torch.dtype = torch.float64) -> Engine:
    """With room for n blocks of every KV head."""
    engine = Engine.from_model(tiny_model("llama", dtype=dtype))
    if n_blocks is None:
        return engine
    capacity = n_blocks * heads_of(engine) * engine.pool.bytes_per_block
    return Engine.from_model(tiny_model("llama", dtype=dtype), kv_capacity=capacity)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = small_engine()
    yield engine
    assert engine.pool.blocks_in_use == 0


def text(n: int, seed: int = 1) -> list[int]:
    return tokens(n, seed=seed)[0].tolist()


def mixed(engine: Engine) -> list[Request]:
    """Every kind of method, budgets, lengths, sampling, stops; some share their opening."""
    # Without a ladder of bits the native decoder takes it, several requests at a time.
    plain = tiny_modulator(engine.shape, bypass_below=0.2, dtype=engine.dtype)
    linear = tiny_modulator(engine.shape, ladder=True, seed=3)
    recurrent = tiny_modulator(engine.shape, "recurrent")
    bounds = tiny_modulator(engine.shape, "mlp", summary="bounds", seed=4)
    replay = Replay(random_plan(engine.shape, 60, np.random.default_rng(7)), bounds.stand_ins)
    shared = text(40, seed=30)
    warm = {seed: Sampling(temperature=0.9, top_p=0.95, seed=seed) for seed in range(4)}
    return [
        Request(prompt=shared + text(5, 1), max_new_tokens=12),
        Request(prompt=shared + text(30, 2), method=linear, budget=0.6, max_new_tokens=20),
        Request(prompt=text(90, 3), method=linear, budget=0.3, max_new_tokens=9, sampling=warm[0]),
        Request(prompt=shared + text(9, 4), method=recurrent, budget=0.6, max_new_tokens=17),
        Request(
            prompt=shared + text(1, 5), method=bounds.at(0.5), max_new_tokens=25, sampling=warm[1]
        ),
        Request(prompt=text(1, 6), method=Dense(), max_new_tokens=40, sampling=warm[2]),
        Request(prompt=shared + text(7, 10), method=plain, budget=0.6, max_new_tokens=24),
        Request(prompt=shared + text(8, 11), method=plain, budget=0.4, max_new_tokens=24),
        Request(prompt=shared + text(9, 12), method=plain, budget=0.6, max_new_tokens=24),
        Request(prompt=text(33, 7), method=replay, max_new_tokens=20),
        Request(prompt=shared + text(3, 8), method=linear, budget=0.6, max_new_tokens=1),
        Request(
            prompt=shared + text(30, 2) + text(7, 9),
            method=linear,
            budget=0.6,
            max_new_tokens=50,
            sampling=warm[3],
            stop=frozenset(range(1, 20)),
        ),
    ]


def ends(events: list[Event]) -> dict[int, Finished]:
    return {event.request_id: event for event in events if isinstance(event, Finished)}


def is_what_it_is_alone(
    engine: Engine, request: Request, end: Finished, *, exactly: bool = False
) -> None:
    """Tokens, Plan, levels, and the counted cost of every token that was not reused."""
    expected, alone = engine.generate(
        request.prompt,
        request.method,
        request.budget,
        phases=request.phases,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
    )
    assert end.tokens == expected
    assert end.reason == ("length" if len(expected) == request.max_new_tokens else "stop")
    assert end.sequence.plan.equals(alone.plan)
    tolerance = 0 if exactly else 3e-6
    np.testing.assert_allclose(end.sequence.levels, alone.levels, rtol=0, atol=tolerance)
    costs, n = end.sequence.token_costs, end.reused_tokens
    for name, values in alone.token_costs.items():
        assert not costs[name][:n].any(), name
        np.testing.assert_array_equal(costs[name][n:], values[n:], err_msg=name)
    assert end.cost.kv_bytes_held == alone.cost.kv_bytes_held
    assert n or end.cost == alone.cost
    alone.close()


@pytest.mark.parametrize(
    ("n_blocks", "chunk", "dtype", "prefix_bytes"),
    [(14, 13, FP64, None), (14, 13, FP32, 0), (None, 512, FP64, 0), (None, 512, FP32, None)],
    ids=["tight-reuse", "tight", "roomy", "roomy-reuse"],
)
def test_each_request_gets_what_it_gets_alone(
    dtype: torch.dtype, n_blocks: int | None, chunk: int, prefix_bytes: int | None
):
    engine = small_engine(n_blocks, dtype)
    scheduler = Scheduler(engine, max_running=4, chunk=chunk, prefix_bytes=prefix_bytes)
    requests, events = mixed(engine), []
    ids = [scheduler.add(request) for request in requests[:7]]
    for request in requests[7:]:
        for _ in range(3):
            events += scheduler.step()
            assert scheduler.n_running <= 4
        ids.append(scheduler.add(request))
    events += scheduler.run()
    done = ends(events)
    assert set(done) == set(ids)
    assert scheduler.n_running == scheduler.n_waiting == 0
    assert engine.pool.bytes_in_use == scheduler.prefixes.bytes_held
    assert (sum(end.reused_tokens for end in done.values()) > 0) == (prefix_bytes is None)
    scheduler.close()
    assert engine.pool.blocks_in_use == 0
    for number, request in zip(ids, requests, strict=True):
        streamed = [e.token for e in events if isinstance(e, Token) and e.request_id == number]
        assert streamed == done[number].tokens
        is_what_it_is_alone(engine, request, done[number])


@pytest.mark.parametrize("prefix_bytes", [0, None], ids=["no reuse", "reuse"])
@pytest.mark.parametrize("chunk", [13, 512])
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@needs_core
def test_packed_requests_get_to_the_bit_what_they_get_alone(
    kv: str, weights: str, chunk: int, prefix_bytes: int | None
):
    model = tiny_model("llama", dtype=torch.float32)
    engine = Engine.from_model(model, weights=weights, kv=kv)
    scheduler = Scheduler(engine, max_running=4, chunk=chunk, prefix_bytes=prefix_bytes)
    requests = mixed(engine)
    ids = [scheduler.add(request) for request in requests]
    done = ends(list(scheduler.run()))
    scheduler.close()
    assert engine.pool.blocks_in_use == 0
    assert (sum(end.reused_tokens for end in done.values()) > 0) == (prefix_bytes is None)
    for number, request in zip(ids, requests, strict=True):
        is_what_it_is_alone(engine, request, done[number], exactly=True)


def test_texts_go_on_while_a_long_prompt_is_read(engine: Engine):
    scheduler = Scheduler(engine, chunk=32, prefix_bytes=0)
    writer = scheduler.add(Request(prompt=text(3), max_new_tokens=40))
    assert scheduler.step() == [Token(request_id=writer, token=scheduler._running[0].tokens[0])]
    reader = scheduler.add(Request(prompt=text(300), max_new_tokens=2))
    steps = [[e.request_id for e in scheduler.step()] for _ in range(10)]
    assert steps == [*([writer] for _ in range(9)), [writer, reader]]
    scheduler.close()


def test_one_pass_decodes_all_and_one_reads_a_chunk_of_the_oldest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    passes: list[tuple[str, list[int]]] = []

    inner = engine.attempt

    def watched(batch: Any, wants: Any, noises: Any) -> Any:
        passes.append((wants, [len(ids) for _, ids in batch]))
        return inner(batch, wants, noises)

    monkeypatch.setattr(engine, "attempt", watched)
    scheduler = Scheduler(engine, chunk=20, prefix_bytes=0)
    warm = Sampling(temperature=1.0, top_p=0.9)
    for n, sampling in ((5, Sampling()), (30, warm), (7, warm)):
        scheduler.add(Request(prompt=text(n), max_new_tokens=3, sampling=sampling))
    seen = []
    while scheduler.n_waiting or scheduler.n_running:
        scheduler.step()
        seen.append(list(passes))
        passes.clear()
    assert seen == [
        [("likeliest", [5])],
        [("likeliest", [1]), ("none", [20])],
        [("likeliest", [1]), ("whole", [10])],
        [("whole", [1]), ("whole", [7])],
        [("whole", [1, 1])],
        [("whole", [1])],
    ]


def test_a_request_waits_until_its_worst_case_fits():
    """Two of three would fit now, but not when they have grown."""
    engine = small_engine(n_blocks=9)
    scheduler = Scheduler(engine, prefix_bytes=0)
    for seed in range(3):
        scheduler.add(Request(prompt=text(20, seed), max_new_tokens=45))  # 64 positions: 4 blocks
    events = scheduler.step()
    assert (scheduler.n_running, scheduler.n_waiting) == (2, 1)
    while scheduler.n_running:
        events += scheduler.step()
        assert not any(isinstance(event, Failed) for event in events)
    assert len(ends(events)) == 3
    assert engine.pool.blocks_in_use == 0


def test_kept_prefixes_give_way_to_requests():
    engine = small_engine(n_blocks=8)
    scheduler = Scheduler(engine, prefix_bytes=10**9)
    for seed in range(6):
        scheduler.add(Request(prompt=text(50, seed), max_new_tokens=15))
        assert len(ends(list(scheduler.run()))) == 1
        assert engine.pool.bytes_in_use == scheduler.prefixes.bytes_held > 0
    scheduler.add(Request(prompt=text(100, 9), max_new_tokens=29))  # all there is
    assert len(ends(list(scheduler.run()))) == 1
    scheduler.close()
    assert engine.pool.blocks_in_use == 0


def test_a_reader_keeps_what_it_reuses_when_room_is_made():
    engine = small_engine(n_blocks=8)
    scheduler = Scheduler(engine, prefix_bytes=10**9)
    opening = text(64)
    scheduler.add(Request(prompt=opening, max_new_tokens=1))
    list(scheduler.run())
    number = scheduler.add(Request(prompt=opening + text(60, 2), max_new_tokens=5))
    assert ends(list(scheduler.run()))[number].reused_tokens == 64
    scheduler.close()


@pytest.mark.parametrize(("phases", "reused"), [(EVERYWHERE, 64), (None, 16)])
def test_a_dialogue_reuses_its_turns(engine: Engine, phases: Phases | None, reused: int):
    """The first answer's blocks too, unless an answer is decided in another way than a prompt."""
    scheduler = Scheduler(engine)
    modulator = tiny_modulator(engine.shape)
    how: dict[str, Any] = {"method": modulator, "budget": 0.6, "phases": phases}
    request = Request(prompt=text(30), max_new_tokens=40, **how)
    number = scheduler.add(request)
    answer = ends(list(scheduler.run()))[number].tokens
    again = Request(prompt=[*text(30), *answer, *text(8, 2)], **how)
    number = scheduler.add(again)
    end = ends(list(scheduler.run()))[number]
    assert end.reused_tokens == reused
    scheduler.close()
    is_what_it_is_alone(engine, again, end)


def test_requests_that_arrive_together_share_their_opening(engine: Engine):
    scheduler = Scheduler(engine)
    opening = text(64)
    for seed in range(3):
        scheduler.add(Request(prompt=opening + text(9, seed + 2), max_new_tokens=20))
    done = ends(list(scheduler.run()))
    assert [done[i].reused_tokens for i in range(3)] == [0, 64, 64]
    scheduler.close()


def test_cancelling(engine: Engine):
    scheduler = Scheduler(engine, max_running=1, prefix_bytes=0)
    first, second = (scheduler.add(Request(prompt=text(40, i))) for i in range(2))
    scheduler.step()
    scheduler.step()
    assert scheduler.cancel(second)
    assert scheduler.cancel(first)
    assert engine.pool.blocks_in_use == 0
    assert not scheduler.cancel(first)
    assert not scheduler.cancel(99)
    done = ends(list(scheduler.run()))
    assert [(n, e.reason, len(e.tokens)) for n, e in done.items()] == [
        (second, "cancelled", 0),
        (first, "cancelled", 2),
    ]
    assert done[first].sequence.plan.n_tokens == 41
    assert done[second].cost.flops_total == 0


def test_one_that_is_cancelled_half_way_leaves_what_it_read(engine: Engine):
    scheduler = Scheduler(engine, chunk=40)
    scheduler.cancel(scheduler.add(Request(prompt=text(100))))  # has read nothing
    number = scheduler.add(Request(prompt=text(100)))
    scheduler.step()
    scheduler.cancel(number)
    number = scheduler.add(Request(prompt=text(100), max_new_tokens=3))
    assert ends(list(scheduler.run()))[number].reused_tokens == 32
    scheduler.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": []}, "the prompt has no tokens; give at least one"),
    "token id": ({"prompt": [3, 97]}, "token id 97 is out of range; allowed: 0 to 96"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: 1 and above"),
    "window": (
        {"prompt": text(500), "max_new_tokens": 14},
        "500 prompt tokens and 14 new ones exceed the model's context window of 512",
    ),
    "pool": (
        {"prompt": text(100), "max_new_tokens": 30},
        "100 prompt tokens and 30 new ones need 54 blocks of KV cache; "
        "allowed: 48, all that the pool has",
    ),
    "budget alone": ({"budget": 0.5}, "budget is 0.5, which applies to a modulator, and there is"),
    "budget": (
        {"method": "modulator", "budget": 1.5},
        "budget is 1.5; allowed: above 0, up to 1",
    ),
    "plan": ({"method": "replay"}, "8 prompt tokens and 5 new ones exceed the plan's 10"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_run_is_refused_at_once(change: dict[str, Any], message: str):
    engine = small_engine(n_blocks=8)
    scheduler = Scheduler(engine)
    method = {
        "modulator": tiny_modulator(engine.shape),
        "replay": Replay(random_plan(engine.shape, 10, np.random.default_rng(0))),
        None: None,
    }[change.get("method")]
    request = {"prompt": text(8), "max_new_tokens": 5, **change, "method": method}
    with pytest.raises(VesicleError, match=message):
        scheduler.add(Request(**request))
    assert scheduler.n_waiting == 0
    assert list(scheduler.run()) == []


def test_the_largest_request_that_can_run_does():
    engine = small_engine(n_blocks=8)
    scheduler = Scheduler(engine)
    scheduler.add(Request(prompt=text(100), max_new_tokens=29))
    (end,) = ends(list(scheduler.run())).values()
    assert len(end.tokens) == 29
    scheduler.close()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_running": 0}, "max_running is 0; allowed: 1 and above"),
        ({"chunk": 0}, "chunk is 0; allowed: 1 and above"),
        ({"max_waiting": 0}, "max_waiting is 0; allowed: 1 and above"),
        ({"prefix_bytes": -1}, "prefix cache limit is -1 bytes; allowed: 0 and above"),
    ],
)
def test_settings_out_of_range_are_refused(engine: Engine, setting: Any, message: str):
    with pytest.raises(VesicleError, match=message):
        Scheduler(engine, **setting)


def test_too_many_waiting(engine: Engine):
    scheduler = Scheduler(engine, max_running=1, max_waiting=2, prefix_bytes=0)
    request = Request(prompt=text(5), max_new_tokens=2)
    scheduler.add(request)
    scheduler.add(request)
    with pytest.raises(VesicleError, match="2 requests wait already; allowed: 2"):
        scheduler.add(request)
    scheduler.step()
    scheduler.add(request)
    assert len(ends(list(scheduler.run()))) == 3


def test_blocks_that_others_hold(engine: Engine):
    """One that waits for them alone is given up; one that runs is, if they were promised to it."""
    engine = small_engine(n_blocks=9)
    scheduler = Scheduler(engine, prefix_bytes=0)
    other = engine.start()
    engine.forward([(other, text(80))])
    number = scheduler.add(Request(prompt=text(70), max_new_tokens=3))
    (event,) = scheduler.run()
    assert isinstance(event, Failed)
    assert event.request_id == number
    assert isinstance(event.error, CacheFullError)
    assert "30 blocks of KV cache are needed, 24 are free" in str(event.error)

    first, second = (
        scheduler.add(Request(prompt=text(14, i), max_new_tokens=n)) for i, n in ((1, 3), (2, 30))
    )
    scheduler.step()
    scheduler.step()
    engine.forward([(other, text(32))])
    events = list(scheduler.run())
    assert set(ends(events)) == {first}
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.request_id == second
    assert "the KV cache is full" in str(failed.error)
    other.close()
    assert engine.pool.blocks_in_use == 0


def test_a_pass_that_fails_takes_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    scheduler = Scheduler(engine)
    method = Dense()
    monkeypatch.setattr(method, "author", lambda shape: Broken())
    bad = scheduler.add(Request(prompt=text(20), method=method))
    good = scheduler.add(Request(prompt=text(20), max_new_tokens=3))
    events = list(scheduler.run())
    assert [e.request_id for e in events if isinstance(e, Failed)] == [bad]
    assert list(ends(events)) == [good]
    scheduler.close()


class Broken(Author):
    """It cannot decide."""

    def attention(self, layer: int, positions: Any, rows: Any) -> None:
        raise VesicleError("undecided")

    def ffn(self, layer: int, hidden: Any, positions: Any, rows: Any) -> None:
        raise AssertionError("it has failed before, and is asked no more")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 70), st.integers(1, 30), st.integers(0, 3)),
        st.tuples(st.just("step")),
        st.tuples(st.just("cancel"), st.integers(0, 8)),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(ACTIONS, st.sampled_from([0, 20_000, 10**9]))
def test_nothing_leaks_and_nothing_waits_for_good(actions: Any, prefix_bytes: int):
    engine = ENGINES.setdefault("small", small_engine(n_blocks=9))
    modulator = MODULATORS.setdefault("linear", tiny_modulator(engine.shape))
    scheduler = Scheduler(engine, max_running=3, chunk=24, prefix_bytes=prefix_bytes)
    asked, events = {}, []
    for action, *numbers in actions:
        if action == "step":
            events += scheduler.step()
        elif action == "cancel":
            scheduler.cancel(numbers[0])
        else:
            n, new, kind = numbers
            request = Request(
                prompt=text(n, seed=kind // 2),
                method=modulator.at(0.6) if kind % 2 else None,
                max_new_tokens=new,
                stop=frozenset(range(10)),
            )
            asked[scheduler.add(request)] = request
        # The first that waits holds the prefix it will reuse; nobody behind it holds anything.
        first, *behind = list(scheduler._waiting) or [None]
        holders = [*scheduler._running, *([first] if first else [])]
        held = sum(job.sequence.cache.bytes_allocated for job in holders)
        assert not any(job.sequence.cache.bytes_allocated for job in behind)
        assert scheduler.prefixes.bytes_held <= prefix_bytes
        assert engine.pool.bytes_in_use <= held + scheduler.prefixes.bytes_held
    events += scheduler.run()
    done = ends(events)
    assert set(done) == set(asked)
    assert engine.pool.bytes_in_use == scheduler.prefixes.bytes_held
    for number, end in done.items():
        assert len(end.tokens) <= asked[number].max_new_tokens
        assert end.reused_tokens % BLOCK == 0
    scheduler.close()
    assert engine.pool.blocks_in_use == 0


ENGINES: dict[str, Engine] = {}
MODULATORS: dict[str, Any] = {}
