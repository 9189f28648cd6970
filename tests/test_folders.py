"""One process a folder, whatever becomes of it, and earlier runs that stay readable."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vesicle import folders
from vesicle.errors import VesicleError
from vesicle.folders import EARLIER, LOCK, locked, set_aside

HOLD = """
import sys
from vesicle.folders import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_another_process_is_named(tmp_path: Path):
    folder = tmp_path / "new" / "er"
    with held_by_another(folder) as process:
        with pytest.raises(VesicleError) as raised, locked(folder):
            raise AssertionError("two at once")
        assert str(raised.value) == (
            f"{folder} is in use: process {process.pid} is writing to it; wait until it ends, or "
            "give another --out"
        )
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_who_waits_has_it_once_the_other_lets_go(tmp_path: Path):
    held, done = list[bool](), list[bool]()

    def wait() -> None:
        with locked(tmp_path, wait=True):
            held.append(bool(done))

    with held_by_another(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.5)
        assert not held
        done.append(True)
    thread.join(30)
    assert held == [True]


def test_a_folder_made_for_nothing_is_removed(tmp_path: Path):
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]


def test_a_killed_process_holds_nothing(tmp_path: Path):
    with held_by_another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_ask_again(tmp_path: Path):
    with locked(tmp_path):
        with locked(tmp_path):
            assert (tmp_path / LOCK).exists()
        assert (tmp_path / LOCK).exists()
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with locked(tmp_path):
        (tmp_path / LOCK).write_text("7 elsewhere")
        with (
            pytest.raises(VesicleError, match="process 7 on elsewhere is writing"),
            locked(tmp_path),
        ):
            raise AssertionError


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders, "_lock", unknown)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VesicleError, match=r"^cannot use .*file: "), locked(tmp_path / "file"):
        raise AssertionError


def test_what_is_set_aside_is_under_the_same_names(tmp_path: Path):
    names = ("result.json", "table.md", "plot.png")
    assert set_aside(tmp_path, names) is None
    kept = []
    for number in range(3):
        (tmp_path / "result.json").write_text(json.dumps(number))
        if number != 1:
            (tmp_path / "table.md").write_text(f"table {number}")
        kept.append(set_aside(tmp_path, names))
        assert not (tmp_path / "result.json").exists()
        assert not (tmp_path / "table.md").exists()
    assert len({*kept}) == 3
    for number, folder in enumerate(kept):
        assert folder is not None
        assert folder.parent == tmp_path / EARLIER
        assert json.loads((folder / "result.json").read_text()) == number
        found = sorted(p.name for p in folder.iterdir())
        assert found == (["result.json"] if number == 1 else ["result.json", "table.md"])


def test_a_copy_leaves_the_files(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    kept = set_aside(tmp_path, ("a",), copy=True)
    assert kept == set_aside(tmp_path, ("a",), copy=True)
    assert kept is not None
    assert (tmp_path / "a").read_text() == (kept / "a").read_text() == "1"


def test_what_cannot_be_moved(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    (tmp_path / EARLIER).write_text("a file")
    with pytest.raises(VesicleError, match="cannot "):
        set_aside(tmp_path, ("a",))
    assert (tmp_path / "a").read_text() == "1"
