"""Whole evaluations of tasks on a tiny model: rows, equal cost, resuming, agreement, errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.helpers import Bytes
from tests.tiny import shape_of, tiny_control, tiny_model, tiny_modulator
from vesicle.engine import Engine
from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.execution.engine_executor import EngineExecutor
from vesicle.evaluation.execution.executor import Span
from vesicle.evaluation.execution.transformers_executor import TransformersExecutor
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.methods.names import ON_ALL_TASKS, check_methods
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.run import item_runner
from vesicle.evaluation.run.store import ITEMS
from vesicle.evaluation.run.subject import Subject
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.evaluation.run.tasks import evaluate_tasks
from vesicle.phases import Phases

Run = Callable[..., TaskResult]

CONFIG = TaskConfig(
    tasks=("squad", "race", "wikitext2"),
    methods=ON_ALL_TASKS,
    budgets=(1.0, 0.8),
    data="sample",
    limit=5,
    max_length=160,
    window=96,
    best_of=3,
    selection=2,
)


def tiny_subject(model: Any, weights: str = "fp32") -> Subject:
    """A tiny model on the engine; fp32 is what native kernels compute."""
    return Subject(
        executor=EngineExecutor(Engine.from_model(model, weights=weights)),
        codec=Bytes(),
        ends=frozenset(),
        modulator=tiny_modulator(shape_of(model)),
        model={"name": "tiny", "through": "engine", "weights": weights, "kv": weights},
        modulator_name="tiny",
    )


@pytest.fixture
def subject(llama: Any) -> Subject:
    return tiny_subject(llama)


@pytest.fixture
def run(subject: Subject, tmp_path: Path) -> Run:
    """Evaluates into a folder, by default `out`."""

    def run(config: TaskConfig = CONFIG, out: str = "out", **settings: Any) -> TaskResult:
        given = {"show_progress": False, "say": lambda line: None, **settings}
        return evaluate_tasks(given.pop("subject", subject), config, tmp_path / out, **given)

    return run


def lasting(result: TaskResult) -> dict[str, Any]:
    """What does not depend on the clock."""
    values = result.to_dict()
    for row in values["rows"]:
        row.pop("measured")
    return values


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskResult, Path]:
    """One whole run that several tests look at."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subject = tiny_subject(tiny_model("llama"))
    settings: dict[str, Any] = {"show_progress": False, "say": lambda line: None}
    return evaluate_tasks(subject, CONFIG, folder, **settings), folder


def test_every_row_is_there(undisturbed: tuple[TaskResult, Path]):
    result, _ = undisturbed
    assert [row.key for row in result.rows] == [k for t in CONFIG.tasks for k in CONFIG.keys(t)]
    assert not result.missing
    for row in result.rows:
        metrics = next(t for t in result.tasks if t["name"] == row.task)["metrics"]
        assert [m["name"] for m in metrics] == list(row.scores)
        assert row.n_items == len(row.items["ids"]) == len(row.items["flops"])
        assert row.measured["seconds"]["prefill"] > 0
        assert row.measured["peak_bytes"] > 0


def test_costs_are_equal(undisturbed: tuple[TaskResult, Path]):
    result, _ = undisturbed
    for task in CONFIG.tasks:
        learnt = result.find(task, "learnt", 0.8)
        assert result.find(task, "dense", 1.0).ratio["flops"] == 1
        target = learnt.shares["generated"]
        assert target == pytest.approx(0.8, rel=0.04)  # tuned on some of the items
        assert learnt.shares["prompt"] == 1
        for row in result.of_task(task)[2:]:
            assert row.details["target"] == pytest.approx(target, rel=1e-9)
            assert row.details["priced"] == pytest.approx(target, rel=TOLERANCE)
            # Answers differ in length, which moves the share that was executed a little.
            tolerance = 0.02 if task == "squad" else 2 * TOLERANCE
            assert row.shares["generated"] == pytest.approx(target, rel=tolerance)


def test_what_was_priced_is_what_was_executed(undisturbed: tuple[TaskResult, Path]):
    """Choices and windows have a known length, so that the price is exact."""
    result, _ = undisturbed
    for task in ("race", "wikitext2"):
        for method in ("uniform", "random", "shuffled", "per-layer", "best-of-n"):
            row = result.find(task, method, 0.8)
            assert row.shares["generated"] == pytest.approx(row.details["priced"], rel=1e-12)


def test_phases_add_up(undisturbed: tuple[TaskResult, Path]):
    result, _ = undisturbed
    for row in result.rows:
        for costs in (row.executed, row.dense):
            for name in ("flops_total", "weight_bytes", "kv_bytes_read"):
                assert costs["total"][name] == costs["prefill"][name] + costs["decode"][name]
        assert sum(row.items["flops"]) == row.executed["total"]["flops_total"]
        assert sum(row.items["dense_flops"]) == row.dense["total"]["flops_total"]
        answers = sum(row.items["answer_tokens"])
        assert (row.executed["decode"]["flops_total"] > 0) == (row.task == "squad" and answers > 0)


def test_scores_come_from_the_statistics(undisturbed: tuple[TaskResult, Path]):
    result, _ = undisturbed
    row = result.find("race", "learnt", 0.8)
    table = np.array(row.items["statistics"]["accuracy"])
    assert row.scores["accuracy"].value == 100 * table[:, 0].mean()
    dense = np.array(result.find("race", "dense", 1.0).items["statistics"]["accuracy"])
    assert row.scores["accuracy"].delta == pytest.approx(100 * (table - dense)[:, 0].mean())
    control = result.find("race", "uniform", 0.8)
    assert control.scores["accuracy"].learnt == pytest.approx(
        row.scores["accuracy"].value - control.scores["accuracy"].value
    )
    assert row.scores["accuracy"].learnt is None


def test_the_record_survives_json(undisturbed: tuple[TaskResult, Path]):
    result, folder = undisturbed
    assert TaskResult.load(folder / "result.json").to_dict() == result.to_dict()
    values = json.loads((folder / "result.json").read_text())
    values["rows"][0]["more"] = 1
    with pytest.raises(DataError, match="unknown field 'more'"):
        TaskResult.from_dict(values)
    with pytest.raises(DataError, match="vesicle-tasks-1"):
        TaskResult.from_dict({"schema": "other"})


class Killed(BaseException):
    """Nothing in the package catches this."""


@pytest.mark.parametrize("after", [7, 55])
def test_a_killed_run_goes_on_to_the_same_end(
    undisturbed: tuple[TaskResult, Path],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
):
    """Killed while an item runs, with a torn line behind the finished ones."""
    real, calls = item_runner.ItemRunner.run, [0]

    def dying(self: Any, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise Killed
        return real(self, *given, **named)

    monkeypatch.setattr(item_runner.ItemRunner, "run", dying)
    with pytest.raises(Killed):
        run()
    monkeypatch.setattr(item_runner.ItemRunner, "run", real)
    items = tmp_path / "out" / ITEMS
    if items.exists():
        with items.open("a", encoding="utf-8") as file:
            file.write('{"hash": "torn')
    assert not (tmp_path / "out" / "result.json").exists()
    assert lasting(run()) == lasting(undisturbed[0])


def test_a_finished_run_runs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, subject: Subject):
    config = replace(CONFIG, tasks=("race",), methods=("learnt", "shuffled"))
    first = run(config)

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("an item was run again")

    monkeypatch.setattr(subject.executor, "choose", never)
    assert run(config).to_dict() == first.to_dict()
    with pytest.raises(AssertionError, match="again"):
        run(config, restart=True)


def test_more_methods_keep_what_is_done(run: Run):
    said: list[str] = []
    run(replace(CONFIG, tasks=("race",), methods=("learnt",)))
    result = run(replace(CONFIG, tasks=("race",), methods=("learnt", "uniform")), say=said.append)
    assert "10 items were done" in said[0]
    assert [row.method for row in result.rows] == ["dense", "learnt", "uniform"]


def test_lost_levels_are_made_again(run: Run, tmp_path: Path):
    config = replace(CONFIG, tasks=("race",), methods=("learnt",))
    run(config)
    assert not (tmp_path / "out" / "levels").exists()
    with_shuffled = replace(config, methods=("learnt", "shuffled"))
    fresh = run(with_shuffled, out="fresh")
    assert lasting(run(with_shuffled)) == lasting(fresh)


def test_another_share_makes_controls_anew(run: Run):
    """Without the learnt modulator, the budget itself is the share to be executed."""
    alone = run(replace(CONFIG, tasks=("race",), methods=("uniform",)))
    assert alone.find("race", "uniform", 0.8).details["target"] == 0.8
    beside = run(replace(CONFIG, tasks=("race",), methods=("learnt", "uniform")))
    found = beside.find("race", "uniform", 0.8)
    assert found.details["target"] == beside.find("race", "learnt", 0.8).shares["generated"]


def test_levels_of_the_learnt_run_without_its_row(run: Run):
    """Controls that need them have them made, and the budget is the share to be executed."""
    result = run(replace(CONFIG, tasks=("race",), methods=("shuffled", "per-layer")))
    assert [row.method for row in result.rows] == ["dense", "per-layer", "shuffled"]
    assert not result.missing
    for row in result.rows[1:]:
        assert row.details["target"] == 0.8
        assert row.details["priced"] == pytest.approx(0.8, rel=TOLERANCE)


def test_every_token_may_be_governed(run: Run):
    """Then a budget is a share of all of them."""
    config = replace(CONFIG, tasks=("race",), methods=("learnt", "uniform"), phases=("all",))
    result = run(config)
    for row in result.of_task("race")[1:]:
        assert row.ratio["flops"] == pytest.approx(0.8, rel=0.04)
        assert row.shares["prompt"] < 0.9


def test_engine_reference_and_transformers_agree(run: Run, llama: Any):
    """Same items, same prompts: the same answers and costs, dense and under a method.

    Norms of transformers round to fp32 even in fp64 models.
    """
    config = replace(CONFIG, methods=("learnt", "random"), dial="shipped", limit=3)
    subject = tiny_subject(llama, "fp64")
    mine = run(config, subject=subject)
    reference = replace(subject, executor=TransformersExecutor(llama, attached=True))
    theirs = run(config, out="reference", subject=reference)
    plain = replace(subject, executor=TransformersExecutor(llama, attached=False))
    bare = run(replace(config, budgets=(1.0,)), out="transformers", subject=plain)
    for row in mine.rows:
        other = theirs.find(*row.key)
        assert row.items["flops"] == other.items["flops"]
        for name, score in row.scores.items():
            assert score.value == pytest.approx(other.scores[name].value, rel=1e-6)
        if row.method == "dense":
            for name, score in row.scores.items():
                found = bare.find(*row.key).scores[name].value
                assert score.value == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("phases", [(), ("gaba=all",)])
def test_a_context_is_read_and_not_scored(subject: Subject, llama: Any, phases: tuple[str, ...]):
    """Engine and reference alike; costs are those of a prompt and of what follows it."""
    ids, context = [1 + i * i % 90 for i in range(300)], 250
    modulator = subject.modulator
    assert modulator is not None
    acts = Phases.parse(phases)
    for method in (None, modulator.at(0.7, acts)):
        mine = tiny_subject(llama, "fp64").executor.loss(ids, method, context=context)
        theirs = TransformersExecutor(llama, attached=True).loss(ids, method, context=context)
        assert mine.output.n_tokens == theirs.output.n_tokens == 50
        assert mine.output.nats == pytest.approx(theirs.output.nats, rel=1e-6)
        assert mine.prefill.flops_total == theirs.prefill.flops_total
        assert mine.generated.flops_total == theirs.generated.flops_total
        assert (
            (mine.spans, mine.prompt)
            == (theirs.spans, theirs.prompt)
            == (
                (Span(0, 300, 249),),
                249,
            )
        )
    executor = subject.executor
    dense = executor.dense(mine.spans).flops_total
    behind = executor.dense([span.behind(249) for span in mine.spans]).flops_total
    assert mine.generated.flops_total < behind
    # A prompt at rest costs what the dense model's does; one that GABA governs costs less.
    prompt = mine.prefill.flops_total - mine.generated.flops_total
    assert (prompt < dense - behind) == bool(phases)


def test_loss_behind_a_context(run: Run):
    config = replace(CONFIG, tasks=("wikitext2",), methods=("learnt", "uniform"), context=64)
    result = run(config)
    assert {row.method for row in result.rows} == {"dense", "learnt", "uniform"}
    for row in result.rows:
        assert row.shares == pytest.approx({"prompt": 1.0, "generated": row.budget}, rel=0.03)
    with pytest.raises(VesicleError, match="context is 96; allowed: fewer than the window's 96"):
        run(replace(config, context=96))


def test_a_fork_scores_as_a_fresh_sequence(subject: Subject):
    from vesicle.evaluation.execution.prompts import Prompt

    prompt = Prompt(ids=list(range(1, 60)), n_context=0)
    executor, method = subject.executor, subject.modulator.at(0.7) if subject.modulator else None
    choices = [[5, 6, 7], [8], [9, 10]]
    together = executor.choose(prompt, choices, method)
    alone = [executor.choose(prompt, [c], method).output.choice_nats[0] for c in choices]
    assert together.output.choice_nats == pytest.approx(alone, rel=1e-5)
    assert together.spans == (Span(0, 59, 58), Span(59, 61, 59), Span(59, 59, 59), Span(59, 60, 59))


def test_stop_strings_end_answers(subject: Subject):
    from vesicle.evaluation.execution.prompts import Prompt

    prompt = Prompt(ids=list(range(1, 60)), n_context=0)
    whole = subject.executor.generate(prompt, None, Bytes(), max_new_tokens=12)
    text = whole.output.text
    assert len(text) == 12
    assert whole.spans == (Span(0, 59, 58), Span(59, 70, 59))
    cut = subject.executor.generate(prompt, None, Bytes(), max_new_tokens=12, stop=(text[4:6],))
    assert cut.output.text == text[: text.index(text[4:6])]
    assert cut.spans[1].stop < 70
    first = Bytes().encode(text[0])
    ended = subject.executor.generate(
        prompt, None, Bytes(), max_new_tokens=12, ends=frozenset([1 + (ord(text[0]) - 33)])
    )
    assert first
    assert ended.output.text == ""
    assert ended.decode.flops_total == 0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"tasks": ("sqad",)}, "squad"),
        ({"tasks": ()}, "no task"),
        ({"methods": ("lernt",)}, "did you mean learnt"),
        ({"budgets": ()}, "budgets is empty"),
        ({"budgets": (0.0,)}, "above 0, up to 1"),
        ({"limit": 0}, "limit is 0"),
        ({"depths": (1.5,)}, "from 0 to 1"),
        ({"lengths": (4,)}, "16 tokens"),
        ({"dial": "loud"}, "tuned, shipped"),
        ({"max_length": 3}, "max_length is 3"),
        ({"context": -1}, "context is -1"),
        ({"context": 9}, "task 'squad' has none; allowed with it: wikitext2, wikitext103"),
        ({"context": 9, "tasks": ("wikitext2",), "methods": ("oracle",)}, "scored whole"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], part: str):
    with pytest.raises(VesicleError, match=part):
        replace(CONFIG, **settings)


def test_methods_come_in_one_order_once():
    assert check_methods(["random", "learnt", "random"]) == ("learnt", "random")


def test_methods_need_a_trained_modulator(run: Run, subject: Subject, llama: Any):
    with pytest.raises(VesicleError, match="needs a modulator"):
        run(subject=replace(subject, modulator=None))
    own = tiny_modulator(shape_of(llama))
    built = own.with_levels(tiny_control("constant", own.predictor.config))
    with pytest.raises(VesicleError, match="no trained modulator"):
        run(subject=replace(subject, modulator=built))


def test_a_window_longer_than_the_model(run: Run):
    with pytest.raises(VesicleError, match="window is 9000; allowed: at most 160"):
        run(replace(CONFIG, tasks=("wikitext2",), window=9000))


def test_the_shipped_dial_tells_what_it_does_not_reach(run: Run):
    told: list[str] = []
    config = replace(CONFIG, tasks=("race",), methods=("learnt",), budgets=(0.01,), dial="shipped")
    run(config, say=told.append)
    assert [line for line in told if "budget 0.01 is below what this modulator reaches" in line]


def test_what_cannot_be_reached_is_missing(run: Run):
    config = replace(CONFIG, tasks=("race",), methods=("learnt", "uniform"), budgets=(0.01,))
    result = run(config)
    assert [m["method"] for m in result.missing] == ["learnt", "uniform"]
    assert "dial" in result.missing[0]["reason"]
    assert [row.method for row in result.rows] == ["dense"]
