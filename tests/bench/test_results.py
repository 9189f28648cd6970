"""Rows from turns: medians, ratios within rounds, agreement, and what makes a row invalid."""

from dataclasses import replace
from pathlib import Path

import pytest

from vesicle.bench.results import Cell, Report, Row, Spread, Turn, make_rows
from vesicle.errors import DataError

CELL = Cell(prompt_tokens=100, batch=2)
TEXT = [[5, 6, 7], [8, 9, 10]]


def turn(step_ms: float, *, greedy: list[list[int]] | None = None, prefill_s: float = 1.0) -> Turn:
    return Turn(
        prefill_s=prefill_s,
        steps_s=[step_ms / 1e3] * 2,
        greedy=greedy or TEXT,
        step_bytes=2e6,
        peak_bytes=700,
    )


def rows(rounds: list[dict[str, Turn]], **settings: object) -> dict[str, Row]:
    arguments = {
        "rivals": ["llamacpp"],
        "same_model": {"rest", "llamacpp"},
        "start_bytes": {"rest": 300},
        "gb_per_s": 1.0,
        "disturbed": [],
        **settings,
    }
    made = make_rows(CELL, rounds, [TEXT] * len(rounds), **arguments)  # type: ignore[arg-type]
    return {row.contender: row for row in made}


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(median=7.0, low=7.0, high=7.0)
    assert Spread(median=10.0, low=9.0, high=11.0).relative == pytest.approx(0.2)


def test_units():
    row = rows([{"rest": turn(10.0, prefill_s=4.0)}])["rest"]
    assert row.prefill_tokens_per_s.median == pytest.approx(2 * 100 / 4)
    assert row.first_token_ms.median == pytest.approx(4000)
    assert row.decode_ms_per_step.median == pytest.approx(10)
    assert row.decode_tokens_per_s.median == pytest.approx(2 / 0.010)
    assert row.bytes_per_token == pytest.approx(1e6)  # of 2 MB a step for two sequences
    assert row.bandwidth_share == pytest.approx(2e6 / 0.010 / 1e9)
    assert row.new_tokens == 2
    assert row.peak_memory_bytes == 700
    assert row.own_memory_bytes == 400
    assert row.request_s is not None
    assert row.request_s.median == pytest.approx(4.02)
    assert row.energy_j is row.phases is None


def test_ratios_are_taken_within_rounds():
    """A machine that is twice as slow in one round does not move them."""
    rounds = [
        {"rest": turn(ms), "llamacpp": turn(3 * ms, prefill_s=2.0)} for ms in (10.0, 20.0, 10.0)
    ]
    made = rows(rounds)
    assert made["rest"].speed_over["llamacpp"]["decode"] == Spread.of([3.0] * 3)
    assert made["rest"].speed_over["llamacpp"]["prefill"].median == pytest.approx(2.0)
    assert made["llamacpp"].speed_over["rest"]["decode"].median == pytest.approx(1 / 3)
    assert "rest" not in made["rest"].speed_over


def test_a_request_is_all_of_it():
    rounds = [{"rest": turn(500.0), "llamacpp": turn(1000.0, prefill_s=3.0)}] * 3
    assert rows(rounds)["rest"].speed_over["llamacpp"]["request"].median == pytest.approx(2.5)


def test_phases_of_a_step_and_what_lies_outside_of_them():
    told = {"ffn in": {"s": 0.004, "bytes": 8e6}, "head": {"s": 0.002, "bytes": 2e6}}
    rest = replace(turn(10.0), phases=told)
    made = rows([{"rest": rest, "llamacpp": turn(10.0)}])
    assert made["llamacpp"].phases is None
    phases = made["rest"].phases
    assert phases is not None
    assert phases["ffn in"] == pytest.approx({"ms": 4, "bytes": 8e6, "gb_per_s": 2})
    assert phases["other"]["ms"] == pytest.approx(4)


def test_agreement_and_text_hits():
    other = [[5, 0, 0], [8, 9, 0]]
    made = rows([{"rest": turn(10.0), "llamacpp": turn(10.0, greedy=other)}])
    assert made["rest"].agreement == 1.0
    assert made["llamacpp"].agreement == pytest.approx(3 / 6)
    assert made["llamacpp"].text_hits == pytest.approx(3 / 6)
    assert made["llamacpp"].valid  # six tokens are too few to judge by


def test_who_is_not_fed_the_text_is_not_compared():
    rounds = [{"rest": turn(10.0), "openvino": turn(10.0, greedy=[[5, 0, 0], [8, 9, 0]])}]
    made = rows(rounds, astray={"openvino"})
    assert (made["openvino"].agreement, made["openvino"].text_hits) == (None, None)
    assert made["rest"].agreement == 1.0


def test_junk_is_not_valid():
    junk = [[0] * 3, [0] * 3]
    made = rows([{"rest": turn(10.0), "llamacpp": turn(10.0, greedy=junk)}] * 6)
    assert made["rest"].valid
    assert made["llamacpp"].reasons == ["only 0% of its greedy tokens are those of rest"]
    assert not made["llamacpp"].valid


def test_methods_that_skip_work_may_differ():
    junk = [[0] * 3, [0] * 3]
    made = rows([{"rest": turn(10.0), "budget": turn(10.0, greedy=junk)}] * 6)
    assert made["budget"].valid


def test_a_wide_spread_is_not_valid():
    made = rows([{"rest": turn(ms)} for ms in (10.0, 13.0, 16.0)])
    assert made["rest"].reasons == ["decode times spread by 23% of their median"]
    assert rows([{"rest": turn(ms)} for ms in (10.0, 16.0)])["rest"].valid  # too few to tell


def test_disturbed_rounds_mark_every_row():
    made = rows([{"rest": turn(10.0), "budget": turn(8.0)}], disturbed=["it was busy"])
    assert [row.valid for row in made.values()] == [False, False]


def report(made: list[Row]) -> Report:
    return Report(
        config={"rounds": 1},
        contenders={"rest": {}, "llamacpp": {}},
        hardware={},
        versions={},
        date="2026-01-01",
        command="vesicle bench",
        text={},
        rows=made,
        finished=True,
    )


def test_report_survives_json(tmp_path: Path):
    made = rows([{"rest": turn(10.0), "llamacpp": turn(20.0)}])
    saved = report(list(made.values()))
    saved.save(tmp_path / "bench.json")
    assert Report.load(tmp_path / "bench.json") == saved
    assert saved.valid
    assert saved.names == ["rest", "llamacpp"]
    assert saved.cells == [CELL]
    assert saved.find("llamacpp", CELL) == made["llamacpp"]
    assert saved.find("hf", CELL) is None


def test_a_report_is_valid_only_as_a_whole():
    good = rows([{"rest": turn(10.0)}])["rest"]
    assert not report([replace(good, valid=False)]).valid
    cut = report([good])
    cut.finished = False
    assert not cut.valid
    busy = report([good])
    busy.reasons = ["busy"]
    assert not busy.valid


@pytest.mark.parametrize("change", [{"schema": "other"}, {"surprise": 1}])
def test_other_records_are_refused(change: dict[str, object]):
    with pytest.raises(DataError):
        Report.from_dict({**report([]).to_dict(), **change})


@pytest.mark.parametrize("name", ["short", "long", "batch"])
def test_records_of_before_there_were_requests_are_read(name: str):
    report = Report.load(Path(__file__).parents[2] / "results" / "bench" / f"{name}.json")
    assert report.rows
    assert all(row.request_s is row.energy_j is row.phases is None for row in report.rows)
