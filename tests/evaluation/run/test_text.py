"""A whole evaluation on a tiny model: rows, resuming, files, and errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.helpers import Bytes, write_text
from tests.tiny import shape_of, tiny_control, tiny_model, tiny_modulator
from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.evaluation.execution.transformers_executor import TransformersExecutor
from vesicle.evaluation.methods.descent import OracleConfig
from vesicle.evaluation.methods.matching import TOLERANCE
from vesicle.evaluation.report.results import TaskResult, TaskRow
from vesicle.evaluation.run import part_run, session
from vesicle.evaluation.run.provenance import fingerprint
from vesicle.evaluation.run.text import evaluate
from vesicle.evaluation.run.text_config import EvalConfig

Run = Callable[..., TaskResult]


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    return EvalConfig(
        data=str(write_text(tmp_path / "letters.txt")),
        length=64,
        limit=5,
        budgets=(1.0, 0.8, 0.65),
        best_of=3,
        selection_length=32,
        oracle_windows=2,
        oracle_length=60,
        oracle=OracleConfig(step=0.5, stride=0.2),
        dtype="float64",
    )


@pytest.fixture
def run(llama: Any, config: EvalConfig, tmp_path: Path) -> Run:
    """Evaluates into a folder, by default `out`, with `config` or another."""
    modulator = tiny_modulator(shape_of(llama))

    def run(config: EvalConfig = config, out: str = "out", **settings: Any) -> TaskResult:
        return evaluate(
            llama,
            Bytes(),
            settings.pop("modulator", modulator),
            config,
            tmp_path / out,
            progress=False,
            say=settings.pop("say", lambda line: None),
            **settings,
        )

    return run


def unmeasured(result: TaskResult) -> list[TaskRow]:
    return [replace(row, measured={}) for row in result.rows]


def nats_of(row: TaskRow) -> list[float]:
    """The mean loss of each window."""
    return [nats / n for nats, n in row.items["statistics"]["loss"]]


def test_whole_evaluation(run: Run, config: EvalConfig, tmp_path: Path):
    result = run(model_name="tiny", modulator_name="test")
    assert result.missing == []
    assert [row.key for row in result.rows] == config.keys()
    assert {row.method for row in result.rows} == {"dense", *config.methods}
    for row in result.rows:
        assert row.ratio["flops"] == pytest.approx(row.budget, rel=TOLERANCE)
        assert row.n_items == len(nats_of(row)) == (5 if row.task == "text" else 2)
        tokens = sum(n for _, n in row.items["statistics"]["loss"])
        assert tokens == row.n_items * (63 if row.task == "text" else 59)
        dense, loss = result.find(row.task, "dense", 1.0), row.scores["loss"]
        assert loss.value == pytest.approx(sum(nats_of(row)) / row.n_items)
        assert loss.delta == pytest.approx(loss.value - dense.scores["loss"].value, abs=1e-12)
        # Here one token is one byte.
        bits = row.scores["bits_per_byte"].value
        assert bits == pytest.approx(loss.value * 1.4426950408889634)
        if row.method not in ("dense", "learnt"):
            learnt = result.find(row.task, "learnt", row.budget).scores["loss"].value
            assert loss.learnt == pytest.approx(learnt - loss.value, abs=1e-12)
    rest = result.find("text", "learnt", 1.0)
    loss = rest.scores["loss"]
    assert loss.delta == loss.delta_low == loss.delta_high == 0
    assert rest.ratio["flops"] == 1.0
    for budget in (0.8, 0.65):
        oracle = result.find("text-oracle", "oracle", budget).scores["loss"].value
        for other in ("uniform", "uniform-mix", "per-layer"):
            found = result.find("text-oracle", other, budget).scores["loss"].value
            assert oracle <= found + 1e-9

    out = tmp_path / "out"
    assert TaskResult.load(out / "result.json").to_dict() == result.to_dict()
    assert (out / "loss_against_cost.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "table.md").read_text(encoding="utf-8")
    assert "## All windows (lower is better)" in page
    assert "## All windows, the oracle's windows (lower is better)" in page
    assert "| best-of-n | 0.65 |" in page
    assert result.find("text", "best-of-n", 0.65).details["n"] == 3
    # A result may be shared: it names no folder of the machine it was made on.
    assert str(tmp_path) not in (out / "result.json").read_text(encoding="utf-8")


def test_resuming_gives_the_same(run: Run, tmp_path: Path):
    whole = run()
    rows = tmp_path / "out" / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    # Cut off behind a learnt row, whose levels the next controls need, inside the next line.
    kept = next(i for i, line in enumerate(lines) if '"learnt", 0.8' in line)
    rows.write_text("".join(lines[: kept + 1]) + lines[kept + 1][:40], encoding="utf-8")
    said: list[str] = []
    resumed = run(say=said.append)
    assert said == [f"{kept + 1} of {len(lines)} rows were done before and are kept"]
    assert unmeasured(resumed) == unmeasured(whole)
    assert resumed.rows[: kept + 1] == whole.rows[: kept + 1]


def test_finished_rows_are_not_computed_again(run: Run, monkeypatch: pytest.MonkeyPatch):
    whole = run()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(TransformersExecutor, "losses", never)
    assert run().to_dict() == whole.to_dict()
    with pytest.raises(AssertionError, match="again"):
        run(restart=True)


def test_more_budgets_and_methods_keep_what_is_done(run: Run, config: EvalConfig):
    few = run(replace(config, budgets=(0.8,), methods=("uniform",)))
    said: list[str] = []
    more = run(replace(config, budgets=(0.8, 0.7), methods=("uniform", "random")), say=said.append)
    assert said == ["2 of 5 rows were done before and are kept"]
    assert more.find("text", "uniform", 0.8) == few.find("text", "uniform", 0.8)


def test_another_setting_keeps_no_rows(run: Run, config: EvalConfig, tmp_path: Path):
    config = replace(config, budgets=(0.8,), methods=("random",))
    first = run(config)
    said: list[str] = []
    second = run(replace(config, seed=1), say=said.append)
    (kept,) = (tmp_path / "out" / "earlier").iterdir()
    assert said == [f"the results of an earlier run are kept in {kept}"]
    assert TaskResult.load(kept / "result.json").to_dict() == first.to_dict()
    other, one = (nats_of(found.find("text", "random", 0.8)) for found in (second, first))
    assert other != one
    assert run(config).rows == first.rows
    assert unmeasured(run(config, restart=True)) == unmeasured(first)


def test_interrupt_keeps_finished_rows(run: Run, config: EvalConfig, monkeypatch: Any):
    config = replace(config, methods=("uniform", "random"))
    real, calls, said = part_run.PartRun.finish, [0], list[str]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(part_run.PartRun, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, say=said.append)
    assert said == ["interrupted; 2 of 5 rows are done: run the same command again to go on"]
    monkeypatch.setattr(part_run.PartRun, "finish", real)
    said.clear()
    assert len(run(config, say=said.append).rows) == 5
    assert said == ["2 of 5 rows were done before and are kept"]


def test_a_row_that_was_cut_off_is_run_again(run: Run, config: EvalConfig, monkeypatch: Any):
    """Half of its windows are no row."""
    config = replace(config, methods=("uniform",), budgets=(0.8,))
    whole = run(config, out="whole")
    real, calls = TransformersExecutor.losses, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(TransformersExecutor, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(TransformersExecutor, "losses", real)
    said: list[str] = []
    assert unmeasured(run(config, say=said.append)) == unmeasured(whole)
    assert said == ["1 of 2 rows were done before and are kept"]


def test_what_cannot_be_reached_is_listed(run: Run, config: EvalConfig, llama: Any):
    modulator = tiny_modulator(shape_of(llama), transmitters=("gaba",))
    config = replace(config, budgets=(0.99, 0.3))
    result = run(config, modulator=modulator)
    assert {row.budget for row in result.rows} == {1.0, 0.99}
    missing = {m["method"] for m in result.missing if m["budget"] == 0.3}
    assert missing == set(config.methods)
    assert run(config, modulator=modulator).to_dict() == result.to_dict()


def test_learnt_levels_without_a_learnt_row(run: Run, config: EvalConfig):
    result = run(replace(config, budgets=(0.8,), methods=("shuffled",)))
    assert [row.method for row in result.rows] == ["dense", "shuffled"]


def test_progress_bar(run: Run, config: EvalConfig, capsys: Any, llama: Any, tmp_path: Path):
    config = replace(config, budgets=(0.8,), methods=("uniform",))
    modulator = tiny_modulator(shape_of(llama))
    evaluate(llama, Bytes(), modulator, config, tmp_path / "bar")
    assert "evaluating" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fault"), [("", "holds no text"), ("short", "one window needs 64")]
)
def test_too_little_text(run: Run, config: EvalConfig, text: str, fault: str):
    Path(config.data).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=fault):
        run()


def test_modulators_that_do_not_fit(run: Run, llama: Any):
    shape = shape_of(llama)
    with pytest.raises(ModelError, match="this modulator was made for"):
        run(modulator=tiny_modulator(replace(shape, width=24)))
    modulator = tiny_modulator(shape)
    control = modulator.with_levels(tiny_control("constant", modulator.predictor.config))
    with pytest.raises(VesicleError, match="'constant' control is no trained modulator"):
        run(modulator=control)


def test_windows_beyond_the_model(run: Run, config: EvalConfig):
    with pytest.raises(VesicleError, match="length is 1000; this model was made for up to 512"):
        run(replace(config, length=1000))


def test_folder_that_cannot_be_written(run: Run, tmp_path: Path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(VesicleError, match="cannot use"):
        run()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"methods": ("unifrm",)}, r"unknown method 'unifrm' \(did you mean uniform"),
        ({"methods": ("zzz",)}, "unknown method 'zzz'; known: learnt, uniform"),
        ({"methods": ()}, "methods is empty"),
        ({"budgets": ()}, "budgets is empty"),
        ({"budgets": (0.8, 1.2)}, r"budget is 1\.2; allowed: above 0, up to 1"),
        ({"length": 1}, "length is 1; allowed: whole numbers from 2"),
        ({"limit": 0}, "limit is 0; allowed: whole numbers from 1"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: bfloat16"),
    ],
)
def test_config_checks_itself(settings: dict[str, Any], fault: str):
    with pytest.raises(VesicleError, match=fault):
        EvalConfig(data="x", **settings)


def test_config_round_trip():
    config = EvalConfig(data="owner/name:raw", limit=None, oracle=OracleConfig(step=0.5))
    assert EvalConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(VesicleError, match="unknown evaluation setting 'lenght'; known: data"):
        EvalConfig.from_dict({"data": "x", "lenght": 1})


def test_config_sorts_budgets_and_methods():
    config = EvalConfig(data="x", budgets=(0.6, 0.9, 0.6), methods=("uniform", "learnt"))
    assert config.budgets == (0.9, 0.6)
    assert config.methods == ("learnt", "uniform")


def test_fingerprint_tells_models_apart():
    a, b = tiny_model("llama"), tiny_model("llama", seed=1)
    assert fingerprint(a) == fingerprint(tiny_model("llama"))
    assert fingerprint(a) != fingerprint(b)


def test_rows_of_other_code_are_computed_again(
    run: Run, config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, budgets=(0.8,), methods=("uniform",))
    first, said = run(config), list[str]()
    real = session.versions()
    for module in (session, part_run):
        monkeypatch.setattr(module, "versions", lambda: {**real, "code": "other"})
    second = run(config, say=said.append)
    rows = tmp_path / "out" / "rows.jsonl"
    assert said[0] == (
        "2 of 2 rows were done by other code than this and are run again; "
        f"their lines stay in {rows}"
    )
    assert unmeasured(second) == unmeasured(first)
    assert second.config_hash != first.config_hash
    said.clear()
    assert run(config, say=said.append).to_dict() == second.to_dict()
    assert said == ["2 of 2 rows were done before and are kept"]


def test_a_static_shape_is_run_where_it_is_asked_for(run: Run, config: EvalConfig):
    result = run(replace(config, methods=("static-shape",), budgets=(0.8,)))
    row = result.find("text", "static-shape", 0.8)
    assert row.details["priced"] == pytest.approx(0.8, rel=TOLERANCE)
    assert "dither" in row.details
