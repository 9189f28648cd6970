"""Every example runs as a reader would run it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
NEURONS = [p for p in sorted((ROOT / "examples" / "neurons").glob("*.py")) if p.stem != "subject"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """None where a modulator is shipped; else an untrained one's folder."""
    from vesicle.engine import Engine
    from vesicle.modulator import Modulator
    from vesicle.shipped import shipped_modulator

    if shipped_modulator() is not None:
        return []
    folder = tmp_path_factory.mktemp("modulator")
    Modulator.new(Engine.from_pretrained().shape).save_pretrained(folder)
    return [str(folder)]


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, arguments: list[str]):
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(example), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "of dense" in done.stdout


@pytest.mark.parametrize("example", NEURONS, ids=lambda path: path.stem)
def test_example_of_neurons_on_a_tiny_model(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [str(example), "--tiny"])
    monkeypatch.syspath_prepend(str(example.parent))  # where a program finds its neighbours
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
