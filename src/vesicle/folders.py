"""A folder that a command writes to: one process at a time, and nothing of an earlier run lost.

`locked` holds a folder for one process. The lock is the system's own, so that it ends with its
process, however that ends; the file beside it only tells whose it is. `check_free` asks first.

`set_aside` moves what an earlier run left there to `earlier/<digest>/`, under the same names, so
that it can be read from there as it was: a folder of results, or a modulator.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vesicle.errors import VesicleError
from vesicle.files import atomic_path

LOCK, EARLIER = ".vesicle-lock", "earlier"
_LOOK_AGAIN = 0.2
"""Seconds between looks at a folder that another process holds."""

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked(folder: Path | str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if it is missing, for this process while the body runs.

    A folder that was made for nothing is removed. A process that holds one may ask again. On file
    systems that know no locks, none is held.

    Args:
        folder: To hold.
        wait: For another process that holds it to let go, in place of an error.

    Raises:
        VesicleError: Another process holds it, or it cannot be made or written.
    """
    path = Path(folder) / LOCK
    made = [part for part in path.parents if not part.exists()]  # innermost first
    descriptor, ours = _acquire(path, wait)
    try:
        yield
    finally:
        if ours:
            # While it is held: whoever opened it meanwhile sees that it is gone, and makes another.
            with suppress(OSError):
                path.unlink(missing_ok=True)
                for part in made:
                    part.rmdir()  # unless there is something in it
        if descriptor is not None:
            os.close(descriptor)


def check_free(folder: Path | str) -> None:
    """Tell at once that another process holds a folder, before what takes long is begun.

    Raises:
        VesicleError: Another process holds it, or it cannot be made or written.
    """
    with locked(folder):
        return


def set_aside(folder: Path, names: Sequence[str], *, copy: bool = False) -> Path | None:
    """Keep files of an earlier run under `earlier/`.

    Args:
        folder: That holds them.
        names: Of files, the main one first; those that are missing are passed over.
        copy: Leave them where they are, too.

    Returns:
        The folder that has them now; None if there was nothing to keep.

    Raises:
        VesicleError: They cannot be moved.
    """
    try:
        there = [name for name in names if (folder / name).is_file()]
        if not there:
            return None
        digest = hashlib.sha256()
        for name in there:
            digest.update(name.encode() + (folder / name).read_bytes())
        target = folder / EARLIER / digest.hexdigest()[:8]
        for name in there:
            with atomic_path(target / name) as part:
                shutil.copy2(folder / name, part)
        # Only once all are there, and the main one last: a kill on the way splits no run in two.
        for name in [] if copy else reversed(there):
            (folder / name).unlink()
    except OSError as error:
        raise VesicleError(
            f"cannot keep {names[0]} of an earlier run in {folder}: {error.strerror or error}"
        ) from error
    return target


def _acquire(path: Path, wait: bool) -> tuple[int | None, bool]:
    """A descriptor that holds the lock, and whether it was taken here.

    None where the file system has no locks, or this process has it already.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # who made the folder has just removed it
        except OSError as error:
            raise VesicleError(f"cannot use {path.parent}: {error.strerror or error}") from error
        try:
            _lock(descriptor)
        except OSError as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            owner = os.read(descriptor, 300).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if error.errno not in _BUSY:
                return None, False
            if owner == _name():
                return None, False
            if wait:
                time.sleep(_LOOK_AGAIN)
                continue
            process, _, host = owner.partition(" ")
            where = f" on {host}" if host and host != socket.gethostname() else ""
            raise VesicleError(
                f"{path.parent} is in use: process {process or 'of an unknown number'}{where} is "
                "writing to it; wait until it ends, or give another --out"
            ) from error
        if _is_still(path, descriptor):
            with suppress(OSError):  # a full disk, and the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, _name().encode())
            return descriptor, True
        # It was released, and removed, between opening and locking it.
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _name() -> str:
    return f"{os.getpid()} {socket.gethostname()}"


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # A lock on Windows keeps others from reading, too: it lies beyond the name.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
