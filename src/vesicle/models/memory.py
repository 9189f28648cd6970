"""How much memory this machine has, and whether a model could ever fit."""

import os
from contextlib import suppress
from pathlib import Path

from vesicle.errors import ModelError

# What a container may use: cgroup version 2, then 1.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_bytes() -> int | None:
    """Tell the machine's memory, or less where a container is limited to less.

    Returns:
        Bytes, or None where the system does not tell.
    """
    found = []
    with suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            found.append(int(path.read_text()))
    return min((size for size in found if size > 0), default=None)


def check_memory(needs_bytes: int, what: str) -> None:
    """Refuse work that this machine's memory can never hold.

    Args:
        needs_bytes: The least that the work holds at one time.
        what: The work, for the message, such as "loading /models/x".

    Raises:
        ModelError: The machine has less memory than that.
    """
    has_bytes = memory_bytes()
    if has_bytes is not None and needs_bytes > has_bytes:
        raise ModelError(
            f"{what} needs {needs_bytes / 1e9:.1f} GB of memory or more, "
            f"and this machine has {has_bytes / 1e9:.1f} GB"
        )
