"""`benchmarks/agreement.py`: runs of the same tasks held against each other, item by item."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vesicle.errors import DataError
from vesicle.evaluation.report.results import Score, TaskResult, TaskRow

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "agreement.py"
F1 = {"name": "f1", "title": "F1", "percent": True, "higher_is_better": True, "signature": ""}
ACCURACY = {**F1, "name": "accuracy", "title": "Accuracy"}
KINDS = {"squad": "generate", "race": "choose"}
IDS = ["a", "b", "c", "d"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("agreement", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_row(
    task: str, values: list[float], method: str = "dense", ids: list[str] | None = None
) -> TaskRow:
    """A row whose score is the mean of `values`, in percent."""
    mean = 100 * sum(values) / len(values)
    score = Score(value=mean, low=None, high=None, delta=0, delta_low=None, delta_high=None)
    name = {"squad": "f1", "race": "accuracy"}[task]
    return TaskRow(
        task=task,
        method=method,
        budget=1.0 if method == "dense" else 0.8,
        n_items=len(values),
        scores={name: score},
        executed={},
        dense={},
        ratio={},
        measured={},
        items={"ids": ids or IDS, "statistics": {name: [[v, 1.0] for v in values]}},
    )


def make_result(through: str, rows: list[TaskRow], tasks: tuple[str, ...] = ()) -> TaskResult:
    """A run of the rows' tasks, if no others are named."""
    metrics = {"squad": F1, "race": ACCURACY}
    names = tasks or tuple(dict.fromkeys(row.task for row in rows))
    return TaskResult(
        config={"limit": 4},
        config_hash="0",
        seed=0,
        versions={"vesicle": "0.1.0"},
        hardware={"cpu": "Some CPU"},
        model={"name": "Tiny", "through": through, "weights": "fp32", "kv": "fp32"},
        modulator={},
        tasks=[
            {"name": name, "kind": KINDS[name], "n_items": len(IDS), "metrics": [metrics[name]]}
            for name in names
        ],
        rows=rows,
    )


ANSWERS, CHOICES = [1.0, 0.5, 0.0, 0.25], [1.0, 0.0, 1.0, 1.0]
NAMES = ("engine", "reference", "transformers")


def runs(
    answers: list[float] = ANSWERS, choices: list[float] = CHOICES, of: int = 2
) -> list[TaskResult]:
    """Three runs that agree, but for what is given of one of them."""
    found = []
    for i, name in enumerate(NAMES):
        rows = [
            make_row("squad", answers if i == of else ANSWERS),
            make_row("race", choices if i == of else CHOICES),
            make_row("race", [0.0] * 4, method="learnt"),  # only dense rows are compared
        ]
        found.append(make_result(name, rows))
    return found


@pytest.fixture
def run(agreement: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Saves runs and compares them by the command line: status, output, errors."""

    def run(results: list[TaskResult], *options: str) -> tuple[int, str, str]:
        folders = [tmp_path / f"run{i}" for i in range(len(results))]
        for folder, result in zip(folders, results, strict=True):
            result.save(folder / "result.json")
        status = agreement.main([*map(str, folders), *options])
        return status, *capsys.readouterr()

    return run


def test_runs_that_agree(run: Run, tmp_path: Path):
    status, out, err = run(runs(), "--out", str(tmp_path / "found.json"))
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "executors: engine, fp32; reference, fp32; transformers, fp32"
    squad, race = out.splitlines()[1:]
    assert squad.split() == ["squad", "F1", *["43.750"] * 3, "items:", "0,", "0,", "0", "agree"]
    assert race.split() == ["race", "Accuracy", *["75.000"] * 3, *squad.split()[5:]]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["schema"] == "vesicle-agreement-1"
    assert found["executors"] == [f"{name}, fp32" for name in NAMES]
    assert found["config"] == {"limit": 4}
    assert found["agrees"] is True
    assert [task["name"] for task in found["tasks"]] == ["squad", "race"]
    assert found["tasks"][0]["metrics"]["f1"] == {
        "title": "F1",
        "values": [43.75] * 3,
        "items_that_differ": [0, 0, 0],
        "largest_difference": 0.0,
        "agrees": True,
    }


@pytest.mark.parametrize(("change", "agrees"), [(0.0196, True), (0.0204, False)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_answers_may_differ_by_half_a_point(
    agreement: ModuleType, change: float, agrees: bool, sign: int, of: int
):
    """Four items: one that changes by 0.02 moves the mean by half a point."""
    found = agreement.compare(runs([1.0, 0.5 + sign * change, 0.0, 0.25], of=of))
    squad, race = (next(iter(task["metrics"].values())) for task in found["tasks"])
    assert squad["items_that_differ"] == (
        [0, 1, 1] if of == 0 else [int(i == of) for i in (0, 1, 2)]
    )
    assert squad["largest_difference"] == pytest.approx(25 * change)
    assert (squad["agrees"], race["agrees"], found["agrees"]) == (agrees, True, agrees)


def test_choices_may_not_differ_even_where_the_score_is_the_same(run: Run, tmp_path: Path):
    status, out, _ = run(runs(choices=[1.0, 1.0, 1.0, 0.0]), "--out", str(tmp_path / "found.json"))
    assert status == 1
    squad, race = out.splitlines()[1:]
    assert squad.endswith("  agree")
    assert race.endswith("items: 0, 0, 2  DIFFER")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["agrees"] is False
    assert found["tasks"][1]["metrics"]["accuracy"]["largest_difference"] == 0


def test_answers_that_differ_too_much(run: Run):
    status, out, err = run(runs([0.0] * 4, of=1))
    assert (status, err) == (1, "")
    assert "DIFFER" in out.splitlines()[1]
    assert "DIFFER" not in out.splitlines()[2]


@pytest.mark.parametrize("ids", [["a", "b", "c", "e"], ["b", "a", "c", "d"]])
def test_other_items(run: Run, agreement: ModuleType, ids: list[str]):
    first = make_result("engine", [make_row("race", CHOICES)])
    other = make_result("reference", [make_row("race", CHOICES, ids=ids)])
    with pytest.raises(DataError, match=r"^reference, fp32 has other items of race than engine"):
        agreement.compare([first, other])
    status, out, err = run([first, other])
    assert (status, out) == (2, "")
    assert err == "agreement: error: reference, fp32 has other items of race than engine, fp32\n"


def test_a_missing_dense_row(run: Run):
    first = make_result("engine", [make_row("race", CHOICES)])
    other = make_result("reference", [make_row("race", CHOICES, method="learnt")])
    for results in ([first, other], [other, first]):
        status, out, err = run(results)
        assert (status, out) == (2, "")
        assert err == "agreement: error: reference, fp32 has no dense row of race\n"
    squad = make_result("reference", [make_row("squad", ANSWERS)])
    assert run([first, squad])[0] == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "cannot read"),
        ("{", "is not valid JSON"),
        ("[]", "not a vesicle-tasks-1 record"),
        ('{"schema": "vesicle-agreement-1"}', "not a vesicle-tasks-1 record"),
        ('{"schema": "vesicle-tasks-1"}', "lacks the field"),
    ],
)
def test_what_is_no_record(
    agreement: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    part: str,
):
    good, bad = tmp_path / "good", tmp_path / "bad"
    make_result("engine", [make_row("race", CHOICES)]).save(good / "result.json")
    bad.mkdir()
    if text is not None:
        (bad / "result.json").write_text(text, encoding="utf-8")
    assert agreement.main([str(good), str(bad), "--out", str(tmp_path / "found.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("agreement: error: ")
    assert err.count("\n") == 1
    assert part in err
    assert not (tmp_path / "found.json").exists()


def test_a_comparison_that_cannot_be_written(run: Run, tmp_path: Path):
    status, out, err = run(runs(), "--out", str(tmp_path))
    assert (status, out) == (2, "")
    assert "it is a folder" in err


def test_it_needs_a_folder(agreement: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        agreement.main([])
    assert caught.value.code == 2
    assert "folders" in capsys.readouterr().err
