"""Two processes train as one does, and go on from where they were."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.tiny_run import run
from vesicle.training.processes import Processes, launched, rank


def launch(folder: Path, processes: int) -> None:
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "tests.training.tiny_run", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def test_one_process_alone_is_the_first_and_adds_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    team = Processes()
    assert (launched(), rank(), team.count, team.first) == (1, 0, 1, True)
    assert list(team.shared(3)) == [0, 1, 2]
    assert team.add(torch.ones(2)).tolist() == [1, 1]
    with team.first_first():
        pass


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_go_on_where_they_were(tmp_path: Path, resumes: bool):
    run(tmp_path / "one")
    launch(tmp_path / "two", 2)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [x["step"] for x in two] == [x["step"] for x in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key not in ("event", "points"):
                assert value == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    if not resumes:
        return
    # Killed: the newest checkpoint and the lines after it are gone.
    newest = max((tmp_path / "two" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    launch(tmp_path / "two", 2)
    assert curve(tmp_path / "two") == two
    assert (tmp_path / "two" / "metrics.jsonl").read_text() != before  # times are others
