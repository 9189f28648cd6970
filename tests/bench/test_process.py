"""A worker process: its answers, its errors, and that nothing is left of it."""

import os
import sys
from pathlib import Path

import pytest

from vesicle.bench.process import Worker, WorkerError, WorkerTimeout

ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit("it went wrong")
    if request["do"] == "hang":
        import time
        time.sleep(600)
    if request["do"] == "fail":
        print(json.dumps({"error": "cannot do that"}), flush=True)
    else:
        print(json.dumps({"pid": __import__("os").getpid(), **request}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    with Worker("echo", {"MARK": "1"}, (sys.executable, str(script))) as started:
        yield started


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_answers(worker: Worker):
    assert worker.ask(do="echo", rows=[[1, 2]])["rows"] == [[1, 2]]
    assert worker.ask(do="echo", text="é\n")["text"] == "é\n"


def test_a_problem_is_one_line(worker: Worker):
    with pytest.raises(WorkerError, match=r"^echo: cannot do that$"):
        worker.ask(do="fail")
    assert worker.ask(do="echo")  # it goes on


def test_a_worker_that_ends_says_why(worker: Worker):
    with pytest.raises(WorkerError, match=r"ended unexpectedly \(status 1: it went wrong\)"):
        worker.ask(do="die")
    assert not worker.running


def test_a_worker_that_hangs_is_ended(worker: Worker):
    pid = worker.ask(do="echo")["pid"]
    with pytest.raises(WorkerTimeout, match=r"took longer than 0\.2 s"):
        worker.ask(0.2, do="hang")
    assert gone(pid)


def test_nothing_is_left_behind(worker: Worker):
    pid = worker.ask(do="echo")["pid"]
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    assert gone(pid)


def test_the_real_worker_ends_with_its_input():
    with Worker("real") as worker:
        with pytest.raises(WorkerError, match=r"KeyError: .* \(worker.py:\d+\)"):
            worker.ask(do="no such thing")
        assert worker._process.stdin is not None
        worker._process.stdin.close()
        assert worker._process.wait(timeout=60) == 0
