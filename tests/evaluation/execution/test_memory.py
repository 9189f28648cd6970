"""Peak memory: what was touched counts, and a new peak can be begun."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vesicle.evaluation.execution import memory
from vesicle.evaluation.execution.memory import peak_bytes, reset_peak

SIZE = 50_000_000
SLACK = 5_000_000
"""Pages that were there already, or that something else in the process takes."""

LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lets a process begin a new peak"
)


@pytest.fixture(autouse=True)
def _nothing_left_to_free() -> Iterator[None]:
    """What other tests left behind shall not be given back while memory is measured."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def touch() -> None:
    """Write to `SIZE` bytes of memory and give them back."""
    assert np.ones(SIZE, np.uint8)[::4096].all()


@LINUX
def test_peak_rises_with_what_is_touched_and_falls_when_reset():
    reset_peak()
    before = peak_bytes()
    touch()
    high = peak_bytes()
    assert high - before > SIZE - SLACK
    assert high - before < 3 * SIZE
    reset_peak()
    assert high - peak_bytes() > SIZE - SLACK


@LINUX
def test_memory_in_use_stays_in_a_new_peak():
    reset_peak()
    before = peak_bytes()
    held = np.ones(SIZE, np.uint8)
    reset_peak()
    assert peak_bytes() - before > SIZE - SLACK
    assert held[-1] == 1


def test_peak_is_that_of_this_process():
    """A bare interpreter with numpy and torch takes tens of megabytes; units are bytes."""
    assert 20_000_000 < peak_bytes() < 100_000_000_000


def test_without_linux_the_peak_of_the_process_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear")
    touch()
    high = peak_bytes()
    assert high > SIZE
    reset_peak()  # there is nothing to do it with, and no complaint
    assert peak_bytes() >= high


@pytest.mark.parametrize("text", ["", "VmHWM:", "VmHWM:\tmany kB"])
def test_a_status_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str):
    pytest.importorskip("resource")
    (tmp_path / "status").write_text(text, encoding="ascii")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert peak_bytes() > 20_000_000


def test_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() == 0


def test_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t    2012 kB\n", encoding="ascii")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert peak_bytes() == 2012 * 1024
