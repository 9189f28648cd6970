"""A command that is asked to end leaves nothing half-written, and says how it ended."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.tiny_gguf import write_gguf
from vesicle.commands.signals import SIGNALS, EndedBySignal, ended_by_signals

CONVERTING = """
import sys, time
from vesicle import cli
from vesicle.models import gguf

def slow(path, header, part):
    (part / "half").write_text("half")
    print("converting", flush=True)
    time.sleep(60)

gguf._save_unpacked = slow
sys.exit(cli.main(["run", "x", "--model", sys.argv[1]]))
"""


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """Under `nohup` pytest ignores a signal, and so would what it starts."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_conversion_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals):
    path = write_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", CONVERTING, str(path)],
        env={**os.environ, "VESICLE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "converting\n"
        assert len(list((cache / "models").iterdir())) == 1
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert told == "\nvesicle: terminated\n"
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_the_exit_status_and_the_handlers_afterwards(number: signal.Signals):
    before = [signal.getsignal(each) for each in SIGNALS]
    cleaned = []

    @ended_by_signals
    def main() -> int:
        try:
            signal.raise_signal(number)
        except EndedBySignal:
            signal.raise_signal(number)  # must not end the clean-up
            cleaned.append(True)
            raise
        return 0

    assert main() == 128 + number
    assert cleaned == [True]
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert ended_by_signals(lambda: 7)() == 7


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch):
    (number, *_) = SIGNALS
    before = signal.signal(number, signal.SIG_IGN)

    def main() -> int:
        signal.raise_signal(number)
        return 0

    try:
        assert ended_by_signals(main)() == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_thread_changes_no_handlers():
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(ended_by_signals(lambda: 3)()))
    thread.start()
    thread.join()
    assert found == [3]
