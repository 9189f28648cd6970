"""Where native code is missing, one line says why."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.decoding import tiny
from tests.tiny import tiny_model
from vesicle.engine import Engine, core
from vesicle.engine.core import library
from vesicle.engine.native import uncovered


@pytest.fixture(autouse=True)
def _loaded_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is loaded is remembered: not what these tests pretend."""
    monkeypatch.delenv(library.DISABLE, raising=False)
    yield
    monkeypatch.undo()
    core.load.cache_clear()


def test_each_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def line() -> str:
        found = core.fallback()
        assert found is not None
        assert "\n" not in found
        assert found.endswith("running in PyTorch, slower")
        return found

    monkeypatch.setenv(library.LIBRARIES, str(tmp_path))
    assert f"{tmp_path} has no _core*.so; was there no C++ compiler at installation?" in line()
    note = tmp_path / "_core.failed.txt"
    note.write_text("command 'g++' failed: No such file or directory\n")
    assert "its build failed at installation: command 'g++' failed: No such file" in line()
    broken = tmp_path / "_core.so"
    broken.write_bytes(b"no library")
    assert f"{broken} cannot be loaded: " in line()
    monkeypatch.setenv(library.DISABLE, "1")
    assert "VESICLE_NO_NATIVE is 1" in line()


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(core._SIGNATURES, "vesicle_of_another_version", (None, []))
        line = core.fallback()
        assert line is not None
        assert "is of another version: " in line
        assert "vesicle_of_another_version" in line

    class Longer(ctypes.Structure):
        _fields_ = [("first", ctypes.c_int64)]

    with monkeypatch.context() as patch:
        patch.setattr(core, "_MIRRORS", (*core._MIRRORS[:-1], Longer))
        line = core.fallback()
        assert line is not None
        assert "is of another version: its Longer takes" in line
    assert core.fallback() is None


@pytest.mark.parametrize("missing", [True, False])
def test_it_is_told_when_it_is_loaded(
    missing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    if missing:
        monkeypatch.setenv(library.LIBRARIES, str(tmp_path))
    else:
        monkeypatch.setenv(library.DISABLE, "1")  # who wants that need not be told
    core.load.cache_clear()
    assert core.load() is None
    lines = [str(w.message) for w in recwarn]
    assert [line[:26] for line in lines] == ["the native core is missing"] * missing


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
def test_instructions_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(core.INSTRUCTIONS, "avx1024")
    core.load.cache_clear()
    with pytest.warns(UserWarning, match="is 'avx1024', which this processor or build does not"):
        assert core.load() is not None


@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
def test_what_the_core_does_not_cover_is_told():
    assert Engine.from_model(tiny()).uncovered is None
    assert Engine.from_model(tiny(), dtype=torch.float64).uncovered == "weights are fp64"
    assert Engine.from_model(tiny(), kv="fp64").uncovered == "keys and values are fp64"
    neox = Engine.from_model(tiny_model("gpt_neox_parallel"), dtype=torch.float32)
    assert neox.uncovered is None
    half = replace(neox.config, activation="mish")
    assert uncovered(neox._weights, half, neox.pool) == "the model's activation is 'mish'"


@pytest.mark.parametrize("variable", [library.DISABLE, core.INSTRUCTIONS])
def test_tests_fail_without_native_code_where_it_is_required(variable: str, tmp_path: Path):
    value = "1" if variable == library.DISABLE else "none-such"
    environment = os.environ | {library.REQUIRE: "1", variable: value}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", "tests/test_plan.py"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "VESICLE_REQUIRE_NATIVE is 1, but" in run.stdout + run.stderr
