"""Reading and writing files so that nothing is ever left half-written.

A writer works on a temporary sibling of its target, which takes the target's name only once the
whole body has succeeded. A reader of the target sees the old content or the new, never a part.

A temporary folder is locked while it is written. The lock goes with its process, however that ends,
so that whoever comes next can tell what was left behind, and remove it.
"""

import codecs
import errno
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from vesicle.errors import DataError, VesicleError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = ".vesicle-tmp-"
_LOCKED = f"{_TEMPORARY}locked-"
_TOKEN_BYTES = 4
_STALE_S = 24 * 3600.0
_MB = 1_000_000
_BOM = "\ufeff"
_UMASK = os.umask(0)  # can only be read by setting it, so it is, before there are threads
os.umask(_UMASK)
# UTF-32 first: its mark begins with that of UTF-16.
_WIDE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@contextmanager
def atomic_path(target: str | os.PathLike[str], needs_bytes: int = 0) -> Iterator[Path]:
    """Give a path to write to that becomes `target` when the body succeeds.

    The file is deleted on any failure, `KeyboardInterrupt` included. Missing parent folders are
    made. A symbolic link keeps pointing where it did, and a target that is not a regular file
    (such as `/dev/null`) is written to directly: by opening it, because what is moved to its name
    replaces it.

    Args:
        target: The file to create or replace.
        needs_bytes: Size to be written, if known; checked against the free space beforehand.

    Yields:
        A path in the target's folder with the target's suffix, which does not exist yet.

    Raises:
        VesicleError: The target cannot be written or the disk is full.
    """
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise VesicleError(f"cannot write {target}: it is a folder, and a file is needed")
    if final.exists() and not final.is_file():
        try:
            yield final
        except OSError as error:
            if error.filename not in (None, str(final)):
                raise  # of a file of the body's own
            raise VesicleError(f"cannot write {target}: {error.strerror or error}") from error
        return
    with _explained(final):
        part = _sibling(final, needs_bytes)
    try:
        with _explained(final, part):
            yield part
            # What opens files with a mode of its own (safetensors: 600) has no say in it.
            part.chmod(0o666 & ~_UMASK)
            part.replace(final)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike[str], needs_bytes: int = 0) -> Iterator[Path]:
    """Give an empty folder to fill that becomes `target` when the body succeeds.

    The folder is deleted on any failure, `KeyboardInterrupt` included; an existing target is
    replaced whole. What killed processes left behind beside it is removed on the way.

    Args:
        target: The folder to create or replace.
        needs_bytes: Size to be written, if known; checked against the free space beforehand.

    Yields:
        An existing, empty folder beside the target.

    Raises:
        VesicleError: The target cannot be written or the disk is full.
    """
    final = Path(os.path.realpath(target))
    if final.exists() and not final.is_dir():
        raise VesicleError(f"cannot write {target}: it is a file, and a folder is needed")
    with _temporary_folder(final, needs_bytes) as part:
        yield part
        _replace_folder(part, final)


def check_target(target: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Refuse a target that cannot be written, before the work that is to end in it.

    It is tried with an empty file, because modes alone do not tell. Nothing is left behind.

    Args:
        target: A file to be created or replaced, or a folder to write files in.
        folder: Whether it is a folder.

    Raises:
        VesicleError: It cannot be written, or is of the other kind.
    """
    final = Path(os.path.realpath(target))
    with _explained(final):
        if final.exists() and final.is_dir() != folder:
            kinds = "a file, and a folder" if folder else "a folder, and a file"
            raise VesicleError(f"cannot write {target}: it is {kinds} is needed")
        if not folder and final.exists():
            if not os.access(final, os.W_OK):
                raise VesicleError(f"cannot write {target}: {os.strerror(errno.EACCES)}")
            if not final.is_file():
                return
        tried = final / "file" if folder else final
        missing = [path for path in tried.parents if not path.exists()]
        try:
            part = _sibling(tried, 0)
            part.touch(exist_ok=False)
            part.unlink()
        finally:
            for path in missing:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def scratch_folder(
    parent: str | os.PathLike[str], needs_bytes: int = 0, name: str = "scratch"
) -> Iterator[Path]:
    """Give an empty folder inside `parent` that is deleted when the body ends, however it ends.

    Args:
        parent: Folder to make it in, itself made if missing.
        needs_bytes: Size to be written, if known; checked against the free space beforehand.
        name: Of what is made in it: until the body ends, `in_work` tells so of `parent / name`.

    Yields:
        An existing, empty folder.

    Raises:
        VesicleError: The folder cannot be made or the disk is full.
    """
    with _temporary_folder(Path(parent).absolute() / name, needs_bytes) as part:
        yield part


def in_work(path: str | os.PathLike[str]) -> bool:
    """Tell whether a process makes, replaces or removes a folder, or has scratch for it.

    Args:
        path: The folder, which need not exist.

    Returns:
        False also on systems and disks that have no locks.
    """
    final = Path(path)
    # Any token of that length, so that a folder whose name ends as this one's is not meant.
    pattern = re.compile(f"{re.escape(_LOCKED)}.{{{2 * _TOKEN_BYTES}}}-{re.escape(final.name)}")
    with suppress(OSError):
        for name in os.listdir(final.parent):
            if pattern.fullmatch(name):
                try:
                    _unlock(_lock(final.with_name(name)))
                except BlockingIOError:
                    return True
    return False


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary folders that processes which were killed left behind.

    Args:
        folder: Where to look for them, not below; it need not exist.
    """
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(_LOCKED)]
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(lock)


def remove_whole(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder at once: nobody sees a part of it, also if this is interrupted.

    Args:
        path: What to remove, if it is there. Of a link, the link alone.

    Raises:
        VesicleError: It cannot be removed.
    """
    final = Path(path)
    try:
        if final.is_symlink() or not final.is_dir():
            final.unlink(missing_ok=True)
            return
        old, lock = _aside(final)
        try:
            final.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            _unlock(lock)
    except FileNotFoundError:
        return  # another process was first
    except OSError as error:
        raise VesicleError(f"cannot remove {final}: {error.strerror or error}") from error


def write_json(path: str | os.PathLike[str], obj: object, *, indent: int | None = 2) -> None:
    """Write `obj` as strict JSON, all or nothing.

    Args:
        path: The file to create or replace.
        obj: Anything `json` can hold.
        indent: Blanks a level; None for one line.

    Raises:
        VesicleError: The file cannot be written, or a number is NaN or infinite.
        TypeError: `obj` holds something that JSON has no form for.
    """
    try:
        text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise VesicleError(
            f"cannot write {path}: it would hold NaN or infinity, and JSON numbers are finite"
        ) from error
    with atomic_path(path) as part:
        # A lone surrogate (an undecodable file name) becomes \udcXX, which is its JSON escape.
        part.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. `NaN` and `Infinity` are accepted: published model configs hold them.

    Args:
        path: The file to read.

    Returns:
        The decoded value.

    Raises:
        DataError: The file is missing, unreadable, not UTF-8 or not JSON (line and column named).
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path} is not usable JSON: it is nested too deeply") from error
    except ValueError as error:  # a whole number too long for Python
        raise DataError(f"{path} is not usable JSON: {error}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, line ends unchanged, without a leading byte-order mark.

    Args:
        path: The file to read, compressed by gzip if its name ends in `.gz`.

    Returns:
        Its text.

    Raises:
        DataError: The file is missing, unreadable, not whole or not UTF-8 (byte offset named).
    """
    with _opened(Path(path)) as file:
        data = file.read()
    return decode_text(data, str(path))


def read_some(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a file, or its beginning.

    Args:
        path: The file to read.
        most: Bytes to read at most, because a device has no end; -1 for all.

    Returns:
        Its bytes.

    Raises:
        DataError: The file is missing or unreadable.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, without a leading byte-order mark.

    Args:
        data: Bytes of text.
        name: What they are called in messages.

    Returns:
        The text.

    Raises:
        DataError: They are not UTF-8 (byte offset named).
    """
    _check_width(data, name)
    try:
        return data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason})"
        ) from error


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Read a file of JSON Lines, compressed by gzip if its name ends in `.gz`.

    Args:
        path: The file to read.

    Yields:
        As `decode_json_lines`; lines are named by the path.

    Raises:
        DataError: The file is missing, unreadable or not whole, or a line is not UTF-8 or not JSON.
    """
    return decode_json_lines(read_lines(path), str(path))


def decode_json_lines(lines: Iterable[str | bytes], name: str) -> Iterator[tuple[str, Any]]:
    """Decode lines of JSON; blank ones are passed over.

    Args:
        lines: The lines, cut at line feeds alone: JSON text may hold other line separators.
        name: What they are called in messages.

    Yields:
        A name for each line, such as `a.jsonl line 3`, to be used in messages; and its value.

    Raises:
        DataError: A line is not UTF-8 or not JSON.
    """
    for number, value, fault in try_json_lines(lines):
        if fault:
            raise DataError(f"{name} line {number} {fault}")
        yield f"{name} line {number}", value


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file, cut at line feeds alone, one in memory at a time.

    Args:
        path: The file to read, compressed by gzip if its name ends in `.gz`.

    Raises:
        DataError: The file is missing, unreadable or not whole, or it is UTF-16 or UTF-32.
    """
    with _opened(Path(path)) as file:
        for number, line in enumerate(file):
            if number == 0:
                _check_width(line, str(path))
            yield line


def try_json_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, Any, str]]:
    """Decode lines of JSON, and go on after those that are none; blank ones are passed over.

    Args:
        lines: As `decode_json_lines`. Byte-order marks are dropped, wherever files were joined.

    Yields:
        For each line its number from 1, its value, and what is wrong with it, "" if nothing.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = decode_text(line, "") if isinstance(line, bytes) else line.removeprefix(_BOM)
        except DataError as error:
            yield number, None, str(error)
            continue
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        # Besides what is no JSON: brackets too deep, and whole numbers too long for Python.
        except (ValueError, RecursionError) as error:
            yield number, None, f"is not JSON: {error}"
            continue
        yield number, value, ""


def lone_surrogate(text: str) -> str | None:
    r"""Half of a surrogate pair in a text, as JSON writes it: no tokenizer and no file takes one.

    Args:
        text: From JSON, whose escapes can say such halves.

    Returns:
        Such as `\ud800`; None if the text is whole.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def cache_root() -> Path:
    """Tell where downloaded and converted models are kept; the folder may not exist yet.

    Returns:
        `$VESICLE_CACHE`, else `$XDG_CACHE_HOME/vesicle`, else `~/.cache/vesicle`.

    Raises:
        VesicleError: None of them can be told.
    """
    try:
        if own := os.environ.get("VESICLE_CACHE"):
            return Path(own).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification says to ignore a relative path.
        return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "vesicle"
    except RuntimeError as error:
        raise VesicleError(
            "this user has no home folder: set VESICLE_CACHE to a folder you can write to"
        ) from error


def check_cache() -> None:
    """Refuse a cache in which no model can be written, and say where it is.

    Raises:
        VesicleError: Naming the cache and how to have another.
    """
    root = cache_root()
    try:
        check_target(root / "models", folder=True)
    except VesicleError as error:
        raise VesicleError(
            f"{error}; the cache is {root}: set VESICLE_CACHE to a folder you can write to"
        ) from error


def folder_bytes(path: str | os.PathLike[str]) -> int:
    """Add up the sizes of the files below a folder that may be changing meanwhile.

    Args:
        path: A folder, or a file, or nothing yet.

    Returns:
        Bytes; what vanishes while it is counted counts nothing.
    """
    root = Path(path)
    if root.is_file():
        files: Iterable[Path] = [root]
    else:
        # Unlike rglob it passes over folders that vanish.
        files = (Path(parent, name) for parent, _, names in os.walk(root) for name in names)
    total = 0
    for file in files:
        with suppress(OSError):
            total += file.lstat().st_size if file.is_file() else 0
    return total


def folder_fingerprint(folder: Path, samples: int = 64, size: int = 4096) -> str:
    """SHA-256 over the files of a model folder: names, sizes, and evenly spread parts of each."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        length = path.stat().st_size
        whole.update(f"{path.name} {length}".encode())
        with path.open("rb") as file:
            for i in range(samples):
                file.seek(max(0, length - size) * i // max(1, samples - 1))
                whole.update(file.read(size))
    return whole.hexdigest()


def disk_is_full(error: Exception) -> bool:
    """Tell whether an error means a full disk, also from libraries that wrap it in their own.

    Args:
        error: What was raised while writing.

    Returns:
        True for no space or no quota left.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file that is to be read, unpacked if its name ends in `.gz`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _check_width(data: bytes, name: str) -> None:
    """Name the encoding of what some editors save in place of UTF-8."""
    for mark, encoding in _WIDE:
        if data.startswith(mark):
            raise DataError(f"{name} is not UTF-8 text: it is {encoding}; save it as UTF-8")


@contextmanager
def _temporary_folder(final: Path, needs_bytes: int) -> Iterator[Path]:
    """Give an empty sibling folder of `final` that is deleted at the end, unless it was moved."""
    with _explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        # First, because they may take the space that is needed.
        remove_leftovers(final.parent)
        _remove_stale(final)
        part, lock = _locked_sibling(final, needs_bytes)
    try:
        with _explained(final, part):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _unlock(lock)


def _locked_sibling(final: Path, needs_bytes: int) -> tuple[Path, int | None]:
    """Make a temporary sibling folder of `final`, and lock it."""
    while True:
        part = _sibling(final, needs_bytes, _LOCKED)
        part.mkdir()
        try:
            lock = _lock(part)
        except (BlockingIOError, FileNotFoundError):
            continue  # someone took it for a leftover before it was locked
        if lock is None or part.exists():
            return part, lock
        _unlock(lock)


def _sibling(final: Path, needs_bytes: int, prefix: str = _TEMPORARY) -> Path:
    """Name a temporary sibling of `final`, once its folder exists and has room for it."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    if needs_bytes > shutil.disk_usage(final.parent).free:
        raise _no_space(final, needs_bytes)
    return final.with_name(f"{prefix}{secrets.token_hex(_TOKEN_BYTES)}-{final.name}")


def _replace_folder(part: Path, final: Path) -> None:
    """Give `part` the name `final`, moving aside what is there (a folder cannot be overwritten)."""
    if not final.exists():
        part.rename(final)
        return
    old, lock = _aside(final)
    try:
        final.rename(old)
        try:
            part.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _unlock(lock)


def _aside(final: Path) -> tuple[Path, int | None]:
    """A name to move a folder to before it is removed, and the lock on it."""
    lock = None
    with suppress(OSError):
        lock = _lock(final)
    # What is not locked must not look like a leftover before it is known to be one.
    return _sibling(final, 0, _TEMPORARY if lock is None else _LOCKED), lock


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives.

    Returns:
        What `_unlock` takes; None on systems and disks that have no locks.

    Raises:
        BlockingIOError: It is locked already.
        FileNotFoundError: It is gone.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove_stale(final: Path) -> None:
    """Remove temporary siblings of `final` that nobody can have been writing for a day."""
    for path in final.parent.glob(f"{_TEMPORARY}*-{final.name}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _explained(final: Path, part: Path | None = None) -> Iterator[None]:
    """Turn the system's complaints about writing `final` into a `VesicleError`."""
    try:
        yield
    except VesicleError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise _no_space(final, folder_bytes(part) if part else 0) from error
        # A body may fail on files of its own: those errors pass through untouched.
        if isinstance(error, OSError) and (part is None or str(error.filename) == str(part)):
            raise VesicleError(f"cannot write {final}: {error.strerror or error}") from error
        raise


def _no_space(final: Path, needs_bytes: int) -> VesicleError:
    free = shutil.disk_usage(final.parent).free / _MB
    # More than was written so far is needed, by an amount nobody knows.
    needs = max(needs_bytes / _MB, 1)
    return VesicleError(
        f"no space left in {final.parent}: {final.name} needs {needs:.0f} MB or more, "
        f"and the disk has {free:.0f} MB free"
    )
