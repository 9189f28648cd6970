"""Threads that share an engine each get what they get alone."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine.decoding import IDS, method_for, native
from vesicle.engine import Engine, Generation, Sampling
from vesicle.engine.scheduler import Failed, Finished, Request, Scheduler

NEW = 24


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["fp32", "int8", "general"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param != "general":
        return native(request.param)
    engine = native("fp32")
    engine._native = None
    return engine


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """What tasks return that begin at one moment; what one raises is raised."""
    found: list[Any] = [None] * len(tasks)
    begin = threading.Barrier(len(tasks))

    def run(i: int) -> None:
        begin.wait()
        try:
            found[i] = tasks[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def tasks_of(engine: Engine) -> list[Callable[[], Generation]]:
    """Prompts, methods and sampling of all kinds; positions that make shared tables grow."""
    cases = [
        (IDS[:40], "dense", Sampling()),
        (IDS[20:70], "modulator", Sampling()),
        (IDS[5:50], "replay", Sampling(temperature=1.0, seed=4)),
        ((IDS * 2)[:240], "modulator", Sampling(temperature=0.7, seed=5)),
    ]
    return [
        lambda ids=ids, kind=kind, sampling=sampling: engine.generate(
            ids,
            method_for(engine, kind),
            max_new_tokens=NEW,
            sampling=sampling,
            stop=(),
        )
        for ids, kind, sampling in cases
    ]


def check(got: Generation, expected: Generation) -> None:
    assert got.ids == expected.ids
    assert got.plan.equals(expected.plan)
    np.testing.assert_array_equal(got.levels, expected.levels)
    assert got.cost == expected.cost


def test_generations_side_by_side(engine: Engine):
    alone = [task() for task in tasks_of(engine)]
    for _ in range(3):
        for got, expected in zip(together(*tasks_of(engine)), alone, strict=True):
            check(got, expected)


def test_forks_closes_and_looks_from_outside(engine: Engine):
    """One thread writes; others fork it, read its costs, and begin and close texts of their own."""
    method = method_for(engine, "modulator")
    expected = engine.generate(IDS[:40], method, max_new_tokens=60, stop=())
    sequence, written = engine.start(method), list[int]()
    done = threading.Event()

    def write() -> None:
        try:
            written.extend(engine.stream(sequence, IDS[:40], max_new_tokens=60, stop=()))
        finally:
            done.set()

    def look() -> list[bool]:
        agreed = []
        while not done.is_set():
            with engine.lock:
                agreed.append(sequence.plan.n_tokens == sequence.length)
            assert 0 <= sequence.share <= 1.5
            assert len(sequence.levels) <= 99
        return agreed

    def fork() -> None:
        while not done.is_set():
            with engine.lock:
                other = engine.fork(sequence)
            engine.likeliest([(other, [3])])
            other.close()

    def begin() -> None:
        while not done.is_set():
            engine.generate(IDS[:20], max_new_tokens=2, stop=()).sequence.close()

    found = together(write, look, fork, begin)
    assert all(found[1])
    check(Generation(written, sequence), expected)


def test_requests_from_several_threads(engine: Engine):
    """One thread steps; two add requests and cancel some."""
    expected = {kind: task().ids for kind, task in zip("abcd", tasks_of(engine), strict=True)}
    prompts = {"a": IDS[:40], "b": IDS[20:70]}
    methods = {"a": method_for(engine, "dense"), "b": method_for(engine, "modulator")}
    scheduler = Scheduler(engine, chunk=2048, prefix_bytes=0)
    asked: dict[int, str] = {}
    left = threading.Semaphore(0)

    def add(kind: str) -> Callable[[], None]:
        def task() -> None:
            for i in range(6):
                request = Request(
                    prompt=prompts[kind], method=methods[kind], max_new_tokens=NEW, stop=()
                )
                number = scheduler.add(request)
                if i % 3 == 2:
                    scheduler.cancel(number)
                else:
                    asked[number] = kind
            left.release()

        return task

    def step() -> list[Any]:
        events, ended = [], 0
        while ended < 2 or scheduler.n_running or scheduler.n_waiting:
            ended += left.acquire(blocking=False)
            events += scheduler.step()
        return events + scheduler.step()

    events = together(add("a"), add("b"), step)[2]
    ends = {e.request_id: e for e in events if isinstance(e, Finished | Failed)}
    assert len(asked) == 8
    assert len(ends) == 12
    for number, kind in asked.items():
        assert ends[number].tokens == expected[kind]
