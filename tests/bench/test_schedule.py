"""Whose turn it is: alternation, disturbed rounds, workers that fail, and how a run ends."""

from pathlib import Path
from typing import Any

import pytest

from tests.bench.conftest import FakeWorker, Workshop
from vesicle.bench import BenchConfig, Report, machine, run_bench, schedule
from vesicle.bench.contenders import Contender, line_up
from vesicle.bench.process import WorkerError, WorkerTimeout
from vesicle.bench.prompts import Stream
from vesicle.bench.results import Row
from vesicle.errors import VesicleError


class Silent:
    """Takes what a display is told."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.turns: list[str] = []

    def stage(self, text: str) -> None:
        pass

    def turn(self, text: str, done: float) -> None:
        self.shares.append(done)
        self.turns.append(text)

    def row(self, row: Row) -> None:
        pass


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    """An idle machine, and no waiting."""
    for name in ("PAUSE_S", "SAMPLE_S", "PATIENCE_S"):
        monkeypatch.setattr(schedule, name, 0.0)
    monkeypatch.setattr(machine, "idle_share", lambda sample_s: 1.0)
    monkeypatch.setattr(machine, "busy_core_seconds", lambda: 0.0)


@pytest.fixture
def contenders() -> list[Contender]:
    return line_up(
        folder=Path("model"),
        files={},
        modulator="modulator",
        budget=0.7,
        overhead=False,
        gaba=(),
        against=("hf",),
        threads=1,
    )


def run(workshop: Workshop, contenders: list[Contender], stream: Stream, **settings: Any) -> Report:
    saved: list[Report] = []
    progress = settings.pop("progress", Silent())
    config = BenchConfig(**{"prompts": (64,), "new_tokens": 8, "rounds": 3, **settings})
    return run_bench(
        config,
        contenders,
        stream,
        command="vesicle bench",
        date="2026-01-01",
        progress=progress,
        save=saved.append,
        start=workshop.start,
    )


def test_contenders_alternate_and_the_first_changes(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    report = run(workshop, contenders, stream)
    assert workshop.turns(32) == ["rest", "budget", "hf"]  # warming up
    assert workshop.turns(64) == [
        *("rest", "budget", "hf"),
        *("budget", "hf", "rest"),
        *("hf", "rest", "budget"),
    ]
    assert report.valid
    assert report.finished
    assert [row.contender for row in report.rows] == ["rest", "budget", "hf"]
    assert report.rows[0].speed_over["hf"]["decode"].median == pytest.approx(4.0)


def test_every_turn_is_told_before_it_begins(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    told = Silent()
    run(workshop, contenders, stream, progress=told)
    assert told.turns[:4] == [
        "64 tokens x 1, round 1 of 3: rest",
        "64 tokens x 1, round 1 of 3: budget",
        "64 tokens x 1, round 1 of 3: hf",
        "64 tokens x 1, round 2 of 3: budget",
    ]
    assert told.shares == pytest.approx([i / 9 for i in range(9)])


def test_energy_is_of_the_turn(
    workshop: Workshop,
    contenders: list[Contender],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
):
    shown = iter(range(100, 10_000, 7))
    monkeypatch.setattr(machine, "energy_j", lambda: {"package-0": (float(next(shown)), 1e6)})
    report = run(workshop, contenders, stream)
    assert {row.energy_j.median for row in report.rows if row.energy_j} == {7.0}
    assert all(row.energy_j for row in report.rows)


def test_all_read_the_same_text_and_rounds_another(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    run(workshop, contenders, stream, batches=(2,))
    asked = [r["rows"] for _, r in workshop.log if r.get("prompt_tokens") == 64]
    assert asked[0] == asked[1] == asked[2]
    assert asked[0] != asked[3]
    assert [len(row) for row in asked[0]] == [64 + 8 + 1] * 2


def test_bandwidth_is_measured_before_and_after(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    report = run(workshop, contenders, stream)
    order = [request["do"] for _, request in workshop.log]
    assert (order[0], order[-1], order.count("bandwidth")) == ("bandwidth", "bandwidth", 2)
    assert set(report.bandwidth) == {"begin", "end"}
    assert report.rows[0].bandwidth_share == pytest.approx(1e6 / 0.010 / 20e9)


def test_a_drifting_bandwidth_is_not_valid(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    speeds = iter([20.0, 10.0])

    def slower(worker: FakeWorker) -> None:
        if worker.name == "bandwidth":
            speed = next(speeds)
            worker.ask = lambda *_, **__: {  # type: ignore[method-assign]
                "read_gb_per_s": speed,
                "small_read_gb_per_s": speed,
            }

    workshop.prepare = slower
    report = run(workshop, contenders, stream)
    assert report.reasons == ["memory bandwidth went from 20.0 to 10.0 GB/s during the run"]
    assert not report.valid


def test_disturbed_rounds_are_run_again(
    workshop: Workshop,
    contenders: list[Contender],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
):
    # One look at the start, then one before each turn: the second turn of the first round is busy.
    looks = iter([1.0, 1.0, 0.5])
    monkeypatch.setattr(machine, "idle_share", lambda sample_s: next(looks, 1.0))
    report = run(workshop, contenders, stream)
    assert len(workshop.turns(64)) == 4 * 3
    assert report.valid
    assert {row.rounds for row in report.rows} == {3}


def test_a_busy_machine_is_not_valid(
    workshop: Workshop,
    contenders: list[Contender],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(machine, "idle_share", lambda sample_s: 0.4)
    report = run(workshop, contenders, stream)
    assert len(workshop.turns(64)) == 6 * 3  # twice the rounds, and no more
    assert report.reasons == ["the machine was busy at the start: 40% idle"]
    assert {row.rounds for row in report.rows} == {3}
    for row in report.rows:
        why = "cores were 40% idle before a turn"
        assert row.reasons == [f"the machine was busy in 6 of 6 rounds: {why}"]


def test_a_busy_machine_may_be_allowed(
    workshop: Workshop,
    contenders: list[Contender],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(machine, "idle_share", lambda sample_s: 0.4)
    report = run(workshop, contenders, stream, allow_busy=True)
    assert len(workshop.turns(64)) == 3 * 3
    assert not report.valid


def test_others_during_a_turn_are_seen(
    workshop: Workshop,
    contenders: list[Contender],
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
):
    clock = iter(range(10**6))
    monkeypatch.setattr(machine, "busy_core_seconds", lambda: float(next(clock)))
    monkeypatch.setattr(schedule, "allowed", lambda: [0, 1])
    monkeypatch.setattr(schedule, "_SHORTEST_JUDGED_S", -1.0)
    monkeypatch.setattr(schedule.time, "monotonic", lambda: 2.0 * next(clock))
    report = run(workshop, contenders, stream)
    assert "others took" in report.rows[0].reasons[0]


def test_a_contender_that_crashes_is_missing_and_comes_back(
    workshop: Workshop, contenders: list[Contender], stream: Stream, crash: WorkerError
):
    def fail(worker: FakeWorker) -> None:
        if worker.name == "hf" and not any(w.name == "hf" for w in workshop.workers):
            worker.failures = [None, None, crash]  # warm-up, a round, and then

    workshop.prepare = fail
    report = run(workshop, contenders, stream, batches=(1, 2))
    assert [(m["contender"], m["batch"]) for m in report.missing] == [("hf", 1)]
    assert "signal 9" in report.missing[0]["reason"]
    assert [(row.contender, row.batch) for row in report.rows] == [
        *(("rest", 1), ("budget", 1)),
        *(("rest", 2), ("budget", 2), ("hf", 2)),
    ]
    assert "hf" not in report.rows[0].speed_over
    assert report.rows[2].tokens_per_s_over_batch == {"1": pytest.approx(2.0)}


def test_a_contender_that_takes_too_long_sits_out_larger_sizes(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    def slow(worker: FakeWorker) -> None:
        if worker.name == "hf" and not any(w.name == "hf" for w in workshop.workers):
            worker.failures = [WorkerTimeout("hf took longer than 9 s")]

    workshop.prepare = slow
    report = run(workshop, contenders, stream, prompts=(64, 128))
    assert [(m["prompt_tokens"], m["reason"]) for m in report.missing] == [
        (64, "hf took longer than 9 s"),
        (128, "it took too long on fewer tokens"),
    ]
    assert [w.name for w in workshop.workers].count("hf") == 2  # started anew


def test_an_interruption_leaves_no_worker_and_keeps_finished_rows(
    workshop: Workshop, contenders: list[Contender], stream: Stream
):
    def interrupt(worker: FakeWorker) -> None:
        if worker.name == "budget":
            worker.failures = [None] * 4 + [KeyboardInterrupt()]

    workshop.prepare = interrupt
    saved: list[Report] = []
    with pytest.raises(KeyboardInterrupt):
        run_bench(
            BenchConfig(prompts=(64, 128), new_tokens=8, rounds=3),
            contenders,
            stream,
            command="",
            date="",
            progress=Silent(),
            save=saved.append,
            start=workshop.start,
        )
    assert all(worker.closed for worker in workshop.workers)
    assert [row.prompt_tokens for row in saved[-1].rows] == [64] * 3
    assert not saved[-1].finished
    assert not saved[-1].valid


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": (8, 8)}, "prompts is 8,8"),
        ({"batches": (0,)}, "batches is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"limit_s": 0.0}, "limit_s is 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], named: str):
    with pytest.raises(VesicleError, match=named):
        BenchConfig(**{"prompts": (64,), **settings})


def test_smallest_first():
    cells = BenchConfig(prompts=(512, 128), batches=(4, 1)).cells
    assert [(c.prompt_tokens, c.batch) for c in cells] == [(128, 1), (128, 4), (512, 1), (512, 4)]
