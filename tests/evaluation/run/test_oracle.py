"""Method `oracle` of `vesicle eval`: its own windows and table, resumed, and refused elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.helpers import Bytes
from tests.evaluation.run.test_tasks import lasting, tiny_subject
from tests.tiny import tiny_model
from vesicle.errors import VesicleError
from vesicle.evaluation.execution.transformers_executor import TransformersExecutor
from vesicle.evaluation.methods.descent import Descent
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.report.page import command, results_page
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.report.table import markdown, rich_tables
from vesicle.evaluation.run import item_runner
from vesicle.evaluation.run.oracle_run import OracleRun
from vesicle.evaluation.run.part import oracle_part, part_of
from vesicle.evaluation.run.store import ItemStore
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.evaluation.run.tasks import evaluate_tasks

Run = Callable[..., TaskResult]
CONFIG = TaskConfig(
    tasks=("wikitext2",),
    methods=("learnt", "uniform", "per-layer", "random", "oracle"),
    budgets=(1.0, 0.8, 0.7),
    data="sample",
    limit=4,
    window=64,
    oracle_windows=2,
    oracle_length=40,
)
FEW = "wikitext2-oracle"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    subject = tiny_subject(tiny_model("llama"))

    def run(config: TaskConfig = CONFIG, out: str = "out", **settings: Any) -> TaskResult:
        given = {"show_progress": False, "say": lambda line: None, "subject": subject, **settings}
        return evaluate_tasks(given.pop("subject"), config, tmp_path / out, **given)

    run.subject = subject  # type: ignore[attr-defined]  # for tests that change it
    return run


def test_its_own_table(run: Run, tmp_path: Path):
    result = run()
    assert [task["name"] for task in result.tasks] == ["wikitext2", FEW]
    beside = ("learnt", "uniform", "per-layer")
    whole = [(m, b) for b in (0.8, 0.7) for m in (*beside, "random")]
    few = [(m, b) for b in (0.8, 0.7) for m in (*beside, "oracle")]
    for task, expected, n, tokens in (("wikitext2", whole, 4, 64), (FEW, few, 2, 40)):
        rows = result.of_task(task)
        assert [(row.method, row.budget) for row in rows] == [("dense", 1.0), *expected]
        assert {row.n_items for row in rows} == {n}
        assert {tuple(row.items["prompt_tokens"]) for row in rows} == {(tokens,) * n}
    for row in result.of_task(FEW):
        assert row.ratio["flops"] == pytest.approx(row.budget, rel=TOLERANCE)
        if row.method not in ("dense", "oracle"):
            best = result.find(FEW, "oracle", row.budget).scores["perplexity"].value
            assert best <= row.scores["perplexity"].value * (1 + 1e-5)
    assert len(result.find(FEW, "oracle", 0.8).details["taken"]) == 2
    # The text itself is run as it is without an oracle.
    plain = run(replace(CONFIG, methods=CONFIG.methods[:-1]), out="plain")
    own = [row for row in lasting(result)["rows"] if row["task"] == "wikitext2"]
    assert own == lasting(plain)["rows"]
    page = markdown(result)
    assert page.startswith("# tiny on 1 task\n")
    assert "## WikiText-2, the oracle's windows (lower is better)" in page
    assert len(rich_tables(result)) == 2
    shown = results_page({"oracle": result})
    assert "--method learnt,uniform,per-layer,random,oracle" in shown
    assert "out of reach" not in shown
    assert "--oracle-windows" not in command(result)
    assert "--oracle-length 40" in command(result)


@pytest.mark.parametrize("after", [3, 60])
def test_a_killed_run_goes_on_to_the_same_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, after: int
):
    """While the text itself is run, and while its windows are."""
    whole = run(out="whole")
    real, calls = item_runner.ItemRunner.losses, [0]

    def dying(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(item_runner.ItemRunner, "losses", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(item_runner.ItemRunner, "losses", real)
    assert lasting(run()) == lasting(whole)


def test_a_finished_run_searches_nothing(run: Run, monkeypatch: pytest.MonkeyPatch):
    first = run()

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(Descent, "__init__", never)
    assert run().to_dict() == first.to_dict()


def test_alone_it_needs_no_learnt_row(run: Run):
    result = run(replace(CONFIG, methods=("oracle",), budgets=(0.8,)))
    assert [row.key for row in result.rows] == [
        ("wikitext2", "dense", 1.0),
        (FEW, "dense", 1.0),
        (FEW, "oracle", 0.8),
    ]
    assert result.rows[-1].ratio["flops"] == pytest.approx(0.8, rel=TOLERANCE)


def test_what_it_cannot_reach_is_missing(run: Run):
    result = run(replace(CONFIG, methods=("oracle",), budgets=(0.01,)))
    (missing,) = result.missing
    assert (missing["task"], missing["method"]) == (FEW, "oracle")
    assert missing["reason"] == "the oracle cannot reach a cost of 0.010 of dense"


def test_at_rest_there_is_nothing_to_search(run: Run):
    result = run(replace(CONFIG, methods=("oracle",), budgets=(1.0,)))
    assert [row.key for row in result.rows] == [("wikitext2", "dense", 1.0)]


def test_the_reference_finds_what_the_engine_finds(run: Run):
    config = replace(CONFIG, methods=("oracle",), budgets=(0.8,))
    model = tiny_model("llama")
    engine = tiny_subject(model, "fp64")
    mine = run(config, subject=engine)
    batched = TransformersExecutor(model, attached=True, batch=2)
    theirs = run(config, out="reference", subject=replace(engine, executor=batched))
    for row in mine.rows:
        other = theirs.find(*row.key)
        assert row.items["flops"] == other.items["flops"]
        value = other.scores["perplexity"].value
        assert row.scores["perplexity"].value == pytest.approx(value, rel=1e-6)


def test_the_bar_is_told_of_the_search(run: Run, tmp_path: Path):
    subject = run.subject  # type: ignore[attr-defined]
    part = part_of("wikitext2", subject, CONFIG)
    few = oracle_part(part, CONFIG.oracle_keys("wikitext2"), 2, 40, Bytes())
    oracle, store = OracleRun(few, subject, CONFIG), ItemStore(tmp_path)
    ticks: dict[str, int] = {}
    for key in [key for key in few.keys if key[2] != 0.7]:
        expected, told = oracle.size(key, store), list[int]()
        oracle.finish(key, store, told.append)
        ticks[key[1]] = sum(told)
        assert ticks[key[1]] >= few.n_tokens == 80
        assert expected >= few.n_tokens
        assert oracle.size(key, store) == few.n_tokens
    assert ticks["dense"] == ticks["uniform"] == 80
    assert ticks["oracle"] > 10 * 80


@pytest.mark.parametrize("tasks", [("squad",), ("wikitext2", "race")])
def test_other_tasks_have_nothing_to_search(tasks: tuple[str, ...]):
    with pytest.raises(VesicleError) as caught:
        replace(CONFIG, tasks=tasks)
    assert str(caught.value) == (
        f"method 'oracle' searches the windows of a text, and task {tasks[-1]!r} has none; "
        "allowed with it: wikitext2, wikitext103"
    )


@pytest.mark.parametrize(("name", "value"), [("oracle_windows", 0), ("oracle_length", 1)])
def test_settings_out_of_range(name: str, value: int):
    with pytest.raises(VesicleError, match=f"{name} is {value}; allowed: whole numbers from"):
        replace(CONFIG, **{name: value})
