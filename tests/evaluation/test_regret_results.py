"""The record: statistics, JSON, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vesicle.errors import DataError
from vesicle.evaluation.provenance import hardware, versions
from vesicle.evaluation.text_results import (
    SCHEMA,
    Result,
    Row,
    paired_difference,
)
from vesicle.tasks.metrics.bootstrap import FEWEST


def make_row(method: str = "learnt", budget: float = 0.8, nats: tuple[float, ...] = (1.0,)) -> Row:
    return Row(
        method=method,
        subset="all",
        budget=budget,
        cost_share=budget,
        loss_nats=float(np.mean(nats)),
        delta_nats=0.1,
        delta_se_nats=None,
        delta_low_nats=None,
        delta_high_nats=None,
        bits_per_byte=1.0,
        n_windows=len(nats),
        n_tokens=10 * len(nats),
        seconds=1.0,
        window_nats=list(nats),
    )


@pytest.fixture
def result() -> Result:
    return Result(
        config={"dtype": "float32", "best_of": 3},
        config_hash="0" * 16,
        seed=0,
        versions=versions(),
        hardware=hardware(),
        model={"name": "tiny"},
        modulator={"name": "m"},
        data={"description": "letters", "sha256": "0" * 64, "n_tokens": 10, "n_bytes": 10},
        rows=[make_row(), make_row("uniform", nats=(1.5,))],
        missing=[{"method": "random", "subset": "all", "budget": 0.3, "reason": "too low"}],
    )


def test_paired_difference():
    rng = np.random.default_rng(0)
    hard, effect = 5 * rng.standard_normal(40), 0.1 + 0.02 * rng.standard_normal(40)
    found = paired_difference(hard + effect, hard)
    assert found.mean == pytest.approx(effect.mean())
    # The windows' own spread of 5 drops out: the standard error is that of the effect.
    assert found.standard_error == pytest.approx(effect.std(ddof=1) / 40**0.5)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    width = (found.high - found.low) / found.standard_error
    assert width == pytest.approx(2 * 1.96, rel=0.1)
    assert found == paired_difference(hard + effect, hard)


def test_few_windows_have_no_interval():
    assert paired_difference([1.0], [0.5]).standard_error is None
    few = paired_difference([1.0] * (FEWEST - 1), [0.5] * (FEWEST - 1))
    assert few.standard_error == 0
    assert few.low is None


@pytest.mark.parametrize("lengths", [(0, 0), (2, 3)])
def test_unpaired_windows_are_refused(lengths: tuple[int, int]):
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference([0.0] * lengths[0], [0.0] * lengths[1])


def test_json_round_trip(result: Result, tmp_path: Path):
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    values = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert next(iter(values)) == "schema"
    assert values["schema"] == SCHEMA
    assert values["versions"].keys() >= {"vesicle", "torch", "transformers"}
    assert values["hardware"].keys() >= {"cpu", "cores"}


def test_wrong_records_are_refused(result: Result):
    values = result.to_dict()
    with pytest.raises(DataError, match="schema is 'other'"):
        Result.from_dict({**values, "schema": "other"})
    with pytest.raises(DataError, match="unknown field 'extra'"):
        Result.from_dict({**values, "extra": 1})
    rows = [{k: v for k, v in values["rows"][0].items() if k != "seconds"}]
    with pytest.raises(DataError, match="row lacks the field 'seconds'"):
        Result.from_dict({**values, "rows": rows})


def test_against_learnt(result: Result):
    learnt, uniform = result.rows
    found = result.against_learnt(uniform)
    assert found is not None
    assert found.mean == 0.5
    assert result.against_learnt(learnt) is None
    assert result.against_learnt(replace(uniform, budget=0.7)) is None
    with pytest.raises(KeyError, match="no row for oracle"):
        result.find("oracle", 0.8)
