"""Results that `vesicle regret` wrote once can still be read, and say what they said."""

import json
from pathlib import Path
from typing import Any

import pytest

from vesicle.errors import DataError
from vesicle.evaluation.report.old_results import SCHEMA, load_result
from vesicle.evaluation.report.results import TaskResult
from vesicle.evaluation.report.table import markdown

COMMITTED = Path(__file__).parents[3] / "results" / "wikitext2" / "result.json"


def make_row(method: str, budget: float, nats: list[float], subset: str = "all") -> dict[str, Any]:
    n = len(nats)
    return {
        "method": method,
        "subset": subset,
        "budget": budget,
        "cost_share": budget,
        "loss_nats": sum(nats) / n,
        "delta_nats": 0.0,
        "delta_se_nats": None,
        "delta_low_nats": None,
        "delta_high_nats": None,
        "bits_per_byte": sum(nats) / n / 2,
        "n_windows": n,
        "n_tokens": 10 * n,
        "seconds": 7.0,
        "window_nats": nats,
        "details": {"x": 1.0},
    }


OLD: dict[str, Any] = {
    "schema": SCHEMA,
    "config": {"dtype": "float32", "split": "test"},
    "config_hash": "0" * 16,
    "seed": 0,
    "versions": {"vesicle": "0.1.0"},
    "hardware": {"cpu": "Some CPU", "cores": 4, "threads": 2},
    "model": {"name": "tiny"},
    "modulator": {"name": "m"},
    "data": {"description": "letters", "sha256": "0" * 64, "n_tokens": 10, "n_bytes": 10},
    "rows": [
        make_row("dense", 1.0, [1.0, 2.0]),
        make_row("learnt", 0.8, [1.25, 2.25]),
        make_row("uniform", 0.8, [1.5, 2.5]),
        make_row("dense", 1.0, [1.5], "oracle"),
        make_row("oracle", 0.8, [1.75], "oracle"),
    ],
    "missing": [{"method": "random", "subset": "all", "budget": 0.3, "reason": "too low"}],
}


def written(folder: Path, values: Any) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_rows_and_scores(tmp_path: Path):
    result = load_result(written(tmp_path, OLD))
    assert [task["name"] for task in result.tasks] == ["text", "text-oracle"]
    uniform = result.find("text", "uniform", 0.8)
    loss = uniform.scores["loss"]
    assert (loss.value, loss.delta, loss.learnt) == (2.0, 0.5, -0.25)
    assert uniform.scores["bits_per_byte"].delta == 0.25
    assert (uniform.ratio, uniform.n_items, uniform.details) == ({"flops": 0.8}, 2, {"x": 1.0})
    assert result.find("text-oracle", "oracle", 0.8).scores["loss"].delta == 0.25
    assert result.find("text", "learnt", 0.8).scores["loss"].learnt is None
    page = markdown(result)
    assert "| uniform | 0.8 | 0.800 |" in page
    assert "## The oracle's windows (lower is better)" in page
    assert page.endswith("- text, random at 0.3: too low\n")


def test_what_was_read_can_be_written_and_read(tmp_path: Path):
    result = load_result(written(tmp_path, OLD))
    result.save(tmp_path / "new.json")
    assert load_result(tmp_path / "new.json").to_dict() == result.to_dict()
    assert TaskResult.load(tmp_path / "new.json").to_dict() == result.to_dict()


def test_a_committed_result_says_what_it_said():
    old = json.loads(COMMITTED.read_text(encoding="utf-8"))
    result = load_result(COMMITTED)
    names = {"all": "text", "oracle": "text-oracle"}
    assert len(result.rows) == len(old["rows"])
    for row in old["rows"]:
        found = result.find(names[row["subset"]], row["method"], row["budget"])
        loss = found.scores["loss"]
        assert loss.value == pytest.approx(row["loss_nats"])
        assert loss.delta == pytest.approx(row["delta_nats"], abs=1e-12)
        assert (loss.delta_low is None) == (row["delta_low_nats"] is None)
        assert found.ratio["flops"] == row["cost_share"]
        assert [nats / n for nats, n in found.items["statistics"]["loss"]] == pytest.approx(
            row["window_nats"]
        )


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({**OLD, "schema": "other"}, "schema is 'other'"),
        ({k: v for k, v in OLD.items() if k != "data"}, "no whole vesicle-evaluation-1 record"),
        ({**OLD, "rows": [{"method": "dense"}]}, "no whole vesicle-evaluation-1 record"),
        ([], "schema is 'list'"),
    ],
)
def test_wrong_records_are_refused(tmp_path: Path, values: Any, fault: str):
    with pytest.raises(DataError, match=fault):
        load_result(written(tmp_path, values))
