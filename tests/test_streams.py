"""Standard streams that are closed, full or abandoned, and Ctrl-C, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment, shell

CLOSED = b"vesicle: error: cannot write standard output: it is closed\n"
FULL = b"vesicle: error: cannot write standard output: No space left on device\n"
CHEAP = [["--version"], ["--help"], ["run", "--help"]]


@pytest.mark.parametrize("words", CHEAP, ids=" ".join)
@pytest.mark.parametrize(
    ("redirection", "status", "err"),
    [
        ("<&-", 0, b""),
        (">&-", 2, CLOSED),
        ("<&- >&-", 2, CLOSED),
        ("> /dev/full", 2, FULL),
        ("2>&-", 0, b""),
        ("2> /dev/full", 0, b""),
        (">&- 2>&-", 2, b""),
    ],
)
def test_cheap_commands(words: list[object], redirection: str, status: int, err: bytes):
    done = shell(words, redirection)
    assert (done.returncode, done.stderr) == (status, err)
    assert bool(done.stdout) == (status == 0)


@pytest.mark.parametrize("words", [*CHEAP, ["bogus"]], ids=" ".join)
def test_a_reader_that_is_gone(words: list[object]):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vesicle", *words]
    done = subprocess.run(command, stdout=write, stderr=write, env=environment(), check=False)
    os.close(write)
    assert done.returncode == 141


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "<&- >&- 2>&-"])
def test_a_mistake_that_cannot_be_told(redirection: str):
    done = shell(["bogus"], redirection)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_standard_input_that_is_closed_or_cannot_be_read(tmp_path: Path):
    for redirection, part in (("<&-", b"it is closed"), (f"0> {tmp_path}/x", b"descriptor")):
        done = shell(["run", "-"], redirection)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"vesicle: error: cannot read standard input: ")
        assert part in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_a_pipe_that_does_not_block_gets_everything():
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, "-c", "import sys; from vesicle.streams import StandardStreams\n"]
    command[-1] += "with StandardStreams() as streams:\n print('x' * 1_000_000); streams.finish()"
    with subprocess.Popen(command, stdout=write, env=environment()) as process:
        os.close(write)
        with open(read, "rb") as file:
            assert file.read() == b"x" * 1_000_000 + b"\n"
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["vesicle.cli", "typer", "vesicle.streams", "rich.panel", "torch"])
def test_an_interruption_while_something_is_imported(name: str):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        " def find_spec(self, name, path, target=None):\n"
        f"  if name == {name!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['vesicle', *({['run', 'hi'] if name == 'torch' else ['--help']})]\n"
        "from vesicle.__main__ import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr == b"\nvesicle: interrupted\n"
