"""A second run in a folder adds to the first one's results or stands beside them; none is lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.run.test_tasks import lasting, tiny_subject
from tests.tiny import tiny_model
from vesicle.errors import VesicleError
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.run import earlier, part_run, provenance, session
from vesicle.evaluation.run.store import ITEMS
from vesicle.evaluation.run.task_config import TaskConfig
from vesicle.evaluation.run.tasks import evaluate_tasks
from vesicle.folders import EARLIER, LOCK

Run = Callable[..., TaskResult]
CONFIG = TaskConfig(
    tasks=("race",), methods=("learnt",), budgets=(0.8,), data="sample", limit=3, max_length=160
)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, said: list[str]) -> Run:
    subject = tiny_subject(tiny_model("llama"))

    def run(config: TaskConfig = CONFIG, **settings: Any) -> TaskResult:
        who = settings.pop("subject", subject)
        return evaluate_tasks(
            who, config, tmp_path, show_progress=False, say=said.append, **settings
        )

    run.subject = subject  # type: ignore[attr-defined]  # for tests that change it
    return run


def kept(folder: Path) -> list[dict[str, Any]]:
    found = (folder / EARLIER).glob("*/result.json")
    return [TaskResult.load(path).to_dict() for path in found]


OTHERS: dict[str, TaskConfig] = {
    "another task": replace(CONFIG, tasks=("squad",)),
    "another seed": replace(CONFIG, seed=1),
    "fewer items": replace(CONFIG, limit=2),
    "another budget": replace(CONFIG, budgets=(0.7,)),
    "another method": replace(CONFIG, methods=("uniform",)),
    "a shorter prompt": replace(CONFIG, max_length=120),
    "another dial": replace(CONFIG, dial="shipped"),
    "fewer rows": replace(CONFIG, methods=("dense",)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_settings_stand_beside(run: Run, tmp_path: Path, said: list[str], what: str):
    first = run()
    (tmp_path / "table.md").write_text("the first table")
    second = run(OTHERS[what])
    assert TaskResult.load(tmp_path / "result.json").to_dict() == second.to_dict()
    assert kept(tmp_path) == [first.to_dict()]
    (folder,) = (tmp_path / EARLIER).iterdir()
    assert (folder / "table.md").read_text() == "the first table"
    assert not (tmp_path / "table.md").exists()
    assert f"the results of an earlier run are kept in {folder}" in said
    # And back: rows are still there, and what the first run does not hold is kept in its turn.
    assert run().to_dict() == first.to_dict()
    assert (second.to_dict() in kept(tmp_path)) == (what != "fewer rows")


def test_more_of_the_same_holds_what_was_there(run: Run, tmp_path: Path):
    run()
    for more in (
        replace(CONFIG, methods=("learnt", "uniform")),
        replace(CONFIG, methods=("learnt", "uniform"), budgets=(0.8, 0.7)),
        replace(CONFIG, tasks=("race", "squad"), methods=("learnt", "uniform"), budgets=(0.8, 0.7)),
    ):
        before = TaskResult.load(tmp_path / "result.json")
        result = run(more)
        assert [row for row in before.rows if row in result.rows] == before.rows
        assert not (tmp_path / EARLIER).exists()
    assert run(more).to_dict() == result.to_dict()
    assert not (tmp_path / EARLIER).exists()


def test_another_model_stands_beside(run: Run, tmp_path: Path):
    first = run()
    subject = run.subject  # type: ignore[attr-defined]
    run(subject=replace(subject, model={**subject.model, "name": "other"}))
    assert kept(tmp_path) == [first.to_dict()]


def test_a_restart_that_gives_the_same_has_nothing_to_keep(run: Run, tmp_path: Path):
    """But for time and memory, which it was asked to measure anew."""
    first = run()
    assert lasting(run(restart=True)) == lasting(first)
    assert kept(tmp_path) == []


def test_a_restart_that_gives_something_else_keeps_the_first(run: Run, tmp_path: Path):
    first = run()
    run(replace(CONFIG, seed=1), restart=True)
    assert kept(tmp_path) == [first.to_dict()]


@pytest.mark.parametrize("content", [b"", b"{torn", b'{"schema": "vesicle-tasks-9"}', b"\xff"])
def test_what_cannot_be_read_is_kept_too(run: Run, tmp_path: Path, content: bytes):
    (tmp_path / "result.json").write_bytes(content)
    run()
    (found,) = (tmp_path / EARLIER).glob("*/result.json")
    assert found.read_bytes() == content


def test_covers_asks_for_every_part():
    row, task = {"method": "dense", "score": (1.0, None)}, {"name": "squad"}
    one = {"seed": 0, "versions": {"code": "a"}, "hardware": {}, "rows": [row], "tasks": [task]}
    assert earlier.covers(one, one)
    assert earlier.covers({**one, "rows": [{"method": "x"}, row]}, one)
    timed = {**one, "rows": [{**row, "seconds": 3.0, "measured": {"peak_bytes": 1}}]}
    assert earlier.covers(timed, one)
    assert earlier.covers(one, timed)
    for change in (
        {"seed": 1},
        {"versions": {"code": "b"}},
        {"hardware": {"cores": 3}},
        {"rows": []},
        {"rows": [{**row, "score": (2.0, None)}]},
        {"tasks": [{"name": "race"}]},
        {"data": "other"},
    ):
        assert not earlier.covers({**one, **change}, one)


# Code ---------------------------------------------------------------------------------------------


def with_code(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    real = provenance.versions()
    for module in (part_run, session):
        monkeypatch.setattr(module, "versions", lambda: {**real, "code": code})


def test_rows_of_other_code_are_run_again(
    run: Run, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(CONFIG, methods=("learnt", "shuffled"))
    with_code(monkeypatch, "a")
    first = run(config)
    lines = (tmp_path / ITEMS).read_text(encoding="utf-8")
    with_code(monkeypatch, "b")
    said.clear()
    second = run(config)
    notice = "9 items were done by other code than this and are run again; their lines stay in "
    assert said[0] == f"{notice}{tmp_path / ITEMS}"
    assert second.versions["code"] == "b"
    assert second.config_hash != first.config_hash
    assert kept(tmp_path) == [first.to_dict()]
    assert (tmp_path / ITEMS).read_text(encoding="utf-8").startswith(lines)
    said.clear()
    assert run(config).to_dict() == second.to_dict()
    assert said == ["9 items were done before and are kept"]
    with_code(monkeypatch, "a")
    said.clear()
    assert run(config).to_dict() == first.to_dict()
    assert said[0] == "9 items were done before and are kept"


def test_lines_that_name_no_code_are_of_other_code(run: Run, said: list[str], tmp_path: Path):
    """Such as those that were written before code was a part of the hash."""
    run()
    old = []
    for line in (tmp_path / ITEMS).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        old.append(json.dumps({**values, "hash": values["hash"].rpartition("-")[0]}))
    (tmp_path / ITEMS).write_text("\n".join(old) + "\n", encoding="utf-8")
    said.clear()
    run()
    assert said[0].startswith("6 items were done by other code than this and are run again")


def test_the_digest_is_of_the_package_s_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    package = tmp_path / "vesicle"
    root = Path(provenance.__file__).parents[2]
    ignore = shutil.ignore_patterns("__pycache__", "modulators", "samples")
    shutil.copytree(root, package, ignore=ignore)
    monkeypatch.setattr(
        provenance, "__file__", str(package / "evaluation" / "run" / "provenance.py")
    )
    digest = provenance.code_digest.__wrapped__
    plain = digest()
    assert plain == provenance.code_digest()
    assert len(plain) == 12
    (package / "data.json").write_text("{}")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "cost.cpython-311.pyc").write_text("")
    assert digest() == plain
    seen = {plain}
    for name in ("cost.py", "engine/native.cpp", "engine/_core.so", "engine/core/x.h", "y.inc"):
        with (package / name).open("ab") as file:
            file.write(b"\n")
        seen.add(digest())
    assert len(seen) == 6


# Two at once --------------------------------------------------------------------------------------

HOLD = """
import sys
from vesicle.folders import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_at_once(run: Run, tmp_path: Path):
    first = run()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(VesicleError, match=f"{tmp_path} is in use: process {other.pid} is"):
            run(replace(CONFIG, seed=1), restart=True)
        other.communicate("\n")
    assert other.pid != os.getpid()
    assert not (tmp_path / LOCK).exists()
    assert TaskResult.load(tmp_path / "result.json").to_dict() == first.to_dict()
    assert run().to_dict() == first.to_dict()
