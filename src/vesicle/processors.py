"""Processors: what they are, and how many this process may use, within its container's quota.

A container's quota (`docker run --cpus 2`) leaves all of the machine's processors in sight, and
stops whoever has used up its time until the next period. With a thread on each of them all work for
a moment and then stand still, those that the others wait for too.
"""

from __future__ import annotations

import math
import os
import platform
from functools import cache
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
"""Environment variable with which a user sets the number of threads; it goes before a quota."""


@cache
def described() -> dict[str, str]:
    """What the system says of the first processor; nothing where it keeps no list of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = dict[str, str]()
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def model_name() -> str:
    """Of the first processor, as far as the system tells."""
    return described().get("model name") or platform.processor() or platform.machine()


def maker() -> str | None:
    """`GenuineIntel`, `AuthenticAMD` and the like; None where the system does not say."""
    return described().get("vendor_id")


def allowed() -> list[int]:
    """The processors that this process may run on, by number."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Processors' worth of time that the process gets; None where nothing limits it.

    Args:
        root: Where control groups are mounted, version 2 or 1.
        own: The list of the groups that the process is in.
    """
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    # Inside a container the root is its own group, whatever path is told.
    limits = [_limit(root), _limit(root / "cpu")]
    for line in lines:
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and "cpu" not in names.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # of somebody outside
            continue
        # A group's parents limit it as well.
        for place in _mounts(root, names):
            limits += [_limit(place.joinpath(*parts[:n])) for n in range(len(parts) + 1)]
    return min((limit for limit in limits if limit is not None), default=None)


def usable() -> int:
    """How many threads can work all the time: the allowed processors, within the quota."""
    limit = quota()
    here = len(allowed())
    return here if limit is None else max(1, min(here, math.floor(limit)))


def threads() -> int:
    """As many threads as the user's environment says, or as can work."""
    given = os.environ.get(THREADS, "")
    return int(given) if given.isdecimal() and int(given) > 0 else usable()


def _mounts(root: Path, names: str) -> list[Path]:
    """Where the controllers `names` are mounted, in whatever order; the root for version 2."""
    if not names:
        return [root]
    wanted = set(names.split(","))
    return [place for place in root.glob("*") if set(place.name.split(",")) in (wanted, {"cpu"})]


def _limit(group: Path) -> float | None:
    """The limit of one control group, in processors."""
    try:
        spent, period = (group / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            spent = (group / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    try:
        share = float(spent) / float(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None
