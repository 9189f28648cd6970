"""What one item cannot do, the others do without; what is left out is told and kept."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.helpers import Bytes
from tests.evaluation.run.test_tasks import lasting, tiny_subject
from tests.tasks.rows import LOCAL, write_rows
from tests.tiny import tiny_model
from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.execution.executor import Execution
from vesicle.evaluation.methods.names import ON_ALL_TASKS
from vesicle.evaluation.report import plots, table
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.run import item_runner
from vesicle.evaluation.run.store import ITEMS
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.evaluation.run.tasks import evaluate_tasks
from vesicle.plan import Method

SQUAD = LOCAL["squad"][0]
CONFIG = TaskConfig(
    tasks=("squad",), methods=("dense",), budgets=(1.0,), limit=None, max_length=160
)
Run = Callable[..., TaskResult]
Said = list[str]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def run(tmp_path: Path, said: Said) -> Run:
    """Evaluates on rows of `task`, written to a folder, and notes what is said."""
    subject = tiny_subject(tiny_model("llama"))

    def run(rows: Sequence[Any], config: TaskConfig = CONFIG, **settings: Any) -> TaskResult:
        task = config.tasks[0]
        split = {"squad": "validation", "race": "test", "wikitext2": "test"}[task]
        write_rows(tmp_path / "data" / task / f"{split}.jsonl", list(rows))
        config = replace(config, data=str(tmp_path / "data"))
        out, who = tmp_path / settings.pop("out", "out"), settings.pop("subject", subject)
        return evaluate_tasks(who, config, out, show_progress=False, say=said.append, **settings)

    run.subject = subject  # type: ignore[attr-defined]  # for tests that change it
    return run


def rows(n: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**SQUAD, "id": f"g{i}", **fields} for i in range(n)]


def failing(
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[str, Method | None], bool],
    *,
    while_set: bool = False,
) -> list[tuple[str, bool]]:
    """Make runs of some items fail; returns what is run, and whether it was left alone.

    By default those whose answers are scored, else those by which a dial is turned.
    """
    real, ran = item_runner.ItemRunner.run, []

    def failing(self: Any, prepared: Any, method: Any, **named: Any) -> Execution:
        bad = ("keep_levels" in named) != while_set and fails(prepared.item.id, method)
        ran.append((prepared.item.id, not bad))
        if bad:
            raise VesicleError(f"the loss of {prepared.item.id} is nan; it must be finite")
        return real(self, prepared, method, **named)

    monkeypatch.setattr(item_runner.ItemRunner, "run", failing)
    return ran


# Before anything is run ---------------------------------------------------------------------------


def test_one_bad_row_in_ten(run: Run, said: Said, tmp_path: Path):
    """The very case: it once ended the run after its answer was generated, on every rerun."""
    good = rows(9)
    found = run([*good[:4], {**SQUAD, "id": "bad", "answers": []}, *good[4:]])
    row = found.find("squad", "dense", 1.0)
    assert row.n_items == 9
    assert row.items["ids"] == [f"g{i}" for i in range(9)]
    file = tmp_path / "data" / "squad" / "validation.jsonl"
    reason = "field 'answers' is empty; there must be something to score against"
    assert said[:2] == [
        f"squad: 1 of 10 rows of {file} cannot be asked and are left out",
        f"{file} line 5: {reason}",
    ]
    (facts,) = found.tasks
    assert (facts["n_rows"], facts["n_items"]) == (10, 9)
    assert facts["missing"] == [{"item": "line 5", "reason": reason}]
    assert str(tmp_path) not in json.dumps(found.to_dict())
    page = table.markdown(found)
    assert "; 9 items, " in page
    assert "1 left out, see below" in page
    assert page.endswith(f"## Missing\n\n- squad, line 5: {reason}\n")
    (shown,) = table.rich_tables(found)
    assert str(shown.title).endswith(", 9 items")
    assert shown.caption == f"squad, line 5: {reason}".replace("[", "\\[")
    assert lasting(run(good, out="whole"))["rows"] == lasting(found)["rows"]


def test_many_bad_rows_are_not_all_told(run: Run, said: Said):
    found = run([*rows(2), *rows(13, answers=[])])
    assert len(found.tasks[0]["missing"]) == 13
    assert sum("line" in line for line in said) == 5
    assert said[6].endswith(": and 8 more, which the record lists")
    assert table.missing(found, "squad")[10:] == ["squad: and 3 more, which result.json lists"]


def test_nothing_but_bad_rows(run: Run, monkeypatch: pytest.MonkeyPatch):
    ran = failing(monkeypatch, lambda item, method: False)
    with pytest.raises(
        DataError, match=r"validation\.jsonl line 1: field 'answers' is empty; .*2 r"
    ):
        run(rows(2, answers=[]))
    assert ran == []


def test_items_that_do_not_fit(run: Run, said: Said):
    """A question that is too long for the window, and options that end where the prompt does."""
    found = run([*rows(2), {**SQUAD, "id": "long", "question": "why " * 60}])
    assert found.rows[0].items["ids"] == ["g0", "g1"]
    (missing,) = found.tasks[0]["missing"]
    assert missing["item"] == "long"
    assert missing["reason"].startswith("needs more than 128 tokens without any of its context")
    assert said[:2] == [
        "squad: 1 of 3 items are left out",
        f"squad item long: {missing['reason']}",
    ]
    with pytest.raises(DataError, match="no item of squad can be run: long: needs more than 128"):
        run(rows(1, id="long", question="why " * 60), out="none")


class Swallowing(Bytes):
    """A tokenizer to which a prompt's end and an option are one token."""

    def encode(self, text: str, **how: Any) -> list[int]:
        return super().encode(text.replace("Ann fused", "Ann"), **how)


def test_options_that_are_no_tokens(run: Run):
    subject = replace(run.subject, codec=Swallowing())  # type: ignore[attr-defined]
    good, bad = ({**LOCAL["race"][0], "id": i} for i in "ab")
    bad["options"] = ["fused", "fused", "eats", "sings"]
    found = run([good, bad], replace(CONFIG, tasks=("race",)), subject=subject)
    assert found.rows[0].items["ids"] == ["a"]
    reason = "a choice cannot be told from its prompt in tokens"
    assert found.tasks[0]["missing"] == [{"item": "b", "reason": reason}]


def test_what_a_scorer_lacks_shows_before_a_model_runs(run: Run, monkeypatch: pytest.MonkeyPatch):
    from vesicle.tasks.metrics.squad import F1

    def lacking(self: Any, item: Any, output: Any) -> tuple[float, ...]:
        raise DataError("scoring needs the library 'scorer', which is missing")

    monkeypatch.setattr(F1, "statistics", lacking)
    ran = failing(monkeypatch, lambda item, method: False)
    with pytest.raises(DataError, match="no item of squad can be run: g0: scoring needs the lib"):
        run(rows(2))
    assert ran == []


# While it runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["squad", "race", "wikitext2"])
def test_an_item_that_fails_under_some_methods(
    run: Run, said: Said, monkeypatch: pytest.MonkeyPatch, task: str, tmp_path: Path
):
    """Dense loses one item, others another; each is scored on what it has, and pairs on both's."""
    given = {
        "squad": rows(6),
        "race": [{**LOCAL["race"][0], "id": f"g{i}"} for i in range(6)],
        "wikitext2": [{"text": "Some words of a text that is cut into pieces. " * 20}],
    }[task]
    config = replace(
        CONFIG, tasks=(task,), methods=ON_ALL_TASKS, budgets=(0.8,), window=96, limit=6, best_of=2
    )
    whole = run(given, config, out="whole")
    items = whole.rows[0].items["ids"]
    failing(
        monkeypatch,
        lambda item, method: item == items[0] if method is None else item == items[1],
    )
    said.clear()
    found = run(given, config)
    reason = "the loss of {} is nan; it must be finite"
    assert [row.key for row in found.rows] == [row.key for row in whole.rows]
    for row in found.rows:
        gone = items[0] if row.method == "dense" else items[1]
        assert row.n_items == len(items) - 1
        assert row.items["ids"] == [i for i in items if i != gone]
        shuffled = "there are no learnt levels of it to shuffle"
        why = shuffled if row.method == "shuffled" else reason.format(gone)
        assert row.items["missing"] == [{"item": gone, "reason": why}]
        assert all(len(values) == row.n_items for values in row.items["statistics"].values())
        for score in row.scores.values():
            assert math.isfinite(score.value)
            assert math.isfinite(score.delta)
            assert (score.learnt is None) == (row.method in ("dense", "learnt"))
    told = f"{task}: learnt at 0.8, item {items[1]}: {reason.format(items[1])}"
    assert told in said
    page = table.markdown(found)
    assert f"- {task}, learnt at 0.8, item {items[1]}: " in page
    assert TaskResult.load(tmp_path / "out" / "result.json").to_dict() == found.to_dict()


def test_n_is_shown_where_a_row_has_fewer(run: Run, monkeypatch: pytest.MonkeyPatch):
    config = replace(CONFIG, methods=("uniform",), budgets=(0.8,))
    failing(monkeypatch, lambda item, method: method is not None and item == "g2")
    found = run(rows(6), config)
    dense, uniform = (table.cells(found.tasks[0], row)[7] for row in found.rows)
    assert "n=" not in dense
    assert uniform.endswith(", n=5")


def test_a_rerun_tries_again_and_runs_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch):
    config = replace(CONFIG, methods=("uniform",), budgets=(0.8,))
    whole = lasting(run(rows(4), config, out="whole"))
    ran = failing(monkeypatch, lambda item, method: item == "g2")
    first = run(rows(4), config)
    ran.clear()
    assert run(rows(4), config).to_dict() == first.to_dict()
    assert ran == [("g2", False), ("g2", False)]
    monkeypatch.undo()
    assert lasting(run(rows(4), config)) == whole
    assert [row.items["missing"] for row in run(rows(4), config).rows] == [[], []]


def test_a_method_that_no_item_can_have(run: Run, monkeypatch: pytest.MonkeyPatch):
    config = replace(CONFIG, methods=("learnt", "uniform", "shuffled"), budgets=(0.8,))
    failing(monkeypatch, lambda item, method: method is not None)
    found = run(rows(3), config)
    assert [row.method for row in found.rows] == ["dense"]
    reasons = {m["method"]: m["reason"] for m in found.missing}
    assert reasons["learnt"] == (
        "no item could be run: g0: the loss of g0 is nan; it must be finite"
    )
    assert reasons["uniform"] == reasons["learnt"]
    assert "no learnt item was run" in reasons["shuffled"]
    assert [line.split(":")[0] for line in table.missing(found, "squad")] == [
        f"squad, {method} at 0.8" for method in ("learnt", "uniform", "shuffled")
    ]


@pytest.mark.parametrize("method", ["learnt", "best-of-n"])
def test_an_item_that_fails_while_its_method_is_set(
    run: Run, monkeypatch: pytest.MonkeyPatch, method: str
):
    """Turning the dial, or selecting a table: the row cannot be had, and the others can."""
    config = replace(CONFIG, methods=("uniform", method), budgets=(0.8,))
    if method == "learnt":
        failing(monkeypatch, lambda item, method: method is not None, while_set=True)
    else:

        def failing_choice(*given: Any, **named: Any) -> None:
            raise VesicleError("the loss of g0 is nan; it must be finite")

        monkeypatch.setattr(run.subject.executor, "choose", failing_choice)  # type: ignore[attr-defined]
    found = run(rows(1), config)
    assert [row.method for row in found.rows] == ["dense", "uniform"]
    (missing,) = found.missing
    assert missing["method"] == method
    assert missing["reason"] == "the loss of g0 is nan; it must be finite"


def test_when_nothing_at_all_could_be_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    failing(monkeypatch, lambda item, method: True)
    config = replace(CONFIG, methods=ON_ALL_TASKS, budgets=(0.8,))
    with pytest.raises(VesicleError) as raised:
        run(rows(3), config)
    assert str(raised.value) == (
        "nothing could be scored: no item could be run: g0: the loss of g0 is nan; it must be "
        "finite"
    )
    kept = TaskResult.load(tmp_path / "out" / "result.json")
    assert kept.rows == []
    assert [m["method"] for m in kept.missing] == list(ON_ALL_TASKS)
    assert "## Missing" in table.markdown(kept)
    pytest.importorskip("matplotlib")
    assert plots.save_plots(kept, tmp_path).is_file()


def test_a_press_that_refuses_some_contexts(run: Run, monkeypatch: pytest.MonkeyPatch, said: Said):
    """Such as one whose window is longer than a short context."""
    import vesicle.integrations.kvpress
    from vesicle.evaluation.run import task_config
    from vesicle.plan import Dense

    def press_method(press: Any, model: Any, ids: list[int], **named: Any) -> Method:
        if len(ids) < 60:
            raise VesicleError("SnapKVPress failed on this model: Query length 40 should be ...")
        return Dense()

    monkeypatch.setattr(task_config, "check_methods", tuple)
    monkeypatch.setattr(vesicle.integrations.kvpress, "make_press", lambda name, ratio: object())
    monkeypatch.setattr(vesicle.integrations.kvpress, "press_method", press_method)
    subject = replace(run.subject, hugging_face=lambda: None)  # type: ignore[attr-defined]
    race = LOCAL["race"][0]
    given = [{**race, "id": f"g{i}", "article": "Ann reads. " * n} for i, n in enumerate((8, 1, 8))]
    config = replace(CONFIG, tasks=("race",), methods=("kvpress:SnapKV",), budgets=(0.5,))
    found = run(given, config, subject=subject)
    row = found.find("race", "kvpress:SnapKV", 0.5)
    assert row.items["ids"] == ["g0", "g2"]
    assert row.items["missing"][0]["item"] == "g1"
    assert "SnapKVPress failed on this model" in said[-1]


def test_missing_items_survive_on_disk(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    failing(monkeypatch, lambda item, method: item == "g1")
    run(rows(3))
    lines = (tmp_path / "out" / ITEMS).read_text(encoding="utf-8").splitlines()
    (line,) = (found for found in map(json.loads, lines) if "missing" in found)
    assert line["item"] == "g1"
    run(rows(3))  # the same reason again is no news
    assert len((tmp_path / "out" / ITEMS).read_text(encoding="utf-8").splitlines()) == len(lines)
