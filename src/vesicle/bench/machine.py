"""What the numbers were measured on: hardware, versions, and how busy the cores are.

Load is read from the kernel's own counters (`/proc/stat`): the share of time in which the cores
that this process may use did nothing. Where those counters are missing, the load average stands in,
which is only of use before anything has been started.
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vesicle.processors import allowed, described, model_name

FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16"),
)
"""Instruction sets that matter to these kernels; those the CPU has are reported."""

PACKAGES = (
    *("torch", "transformers", "numpy"),
    *("llama-cpp-python", "openvino-genai", "onnxruntime-genai"),
)

_IDLE, _IOWAIT = 3, 4
_COLUMNS = 8  # user to steal; guest time is part of user time already
_KB = 1024


def busy_core_seconds() -> float | None:
    """Seconds that the usable cores have worked since the machine started, summed over cores.

    Time stolen by other guests of a virtual machine's host counts as work. None where the kernel
    does not tell.
    """
    wanted = {f"cpu{core}" for core in allowed()}
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ticks = 0
        for line in lines:
            name, *values = line.split()
            if name in wanted:
                columns = [int(value) for value in values[:_COLUMNS]]
                ticks += sum(columns) - columns[_IDLE] - columns[_IOWAIT]
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def energy_j(root: Path = Path("/sys/class/powercap")) -> dict[str, tuple[float, float]] | None:
    """Of each processor package, the Joules that its counter (RAPL) shows, and where it wraps.

    None where the kernel does not tell, or not to this user.
    """
    found = {}
    for domain in sorted(root.glob("*-rapl:[0-9]*")):
        try:
            if not (domain / "name").read_text(encoding="ascii").startswith("package"):
                continue
            shown, most = (
                int((domain / name).read_text(encoding="ascii")) / 1e6
                for name in ("energy_uj", "max_energy_range_uj")
            )
        except (OSError, ValueError):
            return None
        found[domain.name] = shown, most
    return found or None


def energy_between(
    before: dict[str, tuple[float, float]] | None, after: dict[str, tuple[float, float]] | None
) -> float | None:
    """Joules that all packages used between two readings, of counters that wrap once at most."""
    if before is None or after is None or before.keys() != after.keys():
        return None
    used = 0.0
    for name, (shown, most) in after.items():
        used += shown - before[name][0] + (most if shown < before[name][0] else 0.0)
    return used


def idle_share(sample_s: float) -> float | None:
    """The share of the next `sample_s` seconds in which the usable cores do nothing, 0 to 1.

    None where the kernel does not tell.
    """
    before, begun = busy_core_seconds(), time.perf_counter()
    time.sleep(sample_s)
    after, passed = busy_core_seconds(), time.perf_counter() - begun
    if before is None or after is None:
        return None
    return min(1.0, max(0.0, 1 - (after - before) / (passed * len(allowed()))))


def idle_by_load_average() -> float | None:
    """An estimate of the idle share from the load average, for before anything is started."""
    try:
        return max(0.0, 1 - os.getloadavg()[0] / (os.cpu_count() or 1))
    except (AttributeError, OSError):
        return None


def memory_bytes(field: str) -> int | None:
    """A field of `/proc/meminfo`, such as `MemTotal`; None where there is none."""
    return _kilobytes(Path("/proc/meminfo"), field)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now, file pages included; None if unknown."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def last_cache_bytes() -> int | None:
    """The size of the largest cache that the first core reads through; None if unknown."""
    sizes = []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes, default=None)


def hardware() -> dict[str, Any]:
    """CPU, its flags of note, cores, cache, memory and operating system."""
    name, flags = _cpu()
    return {
        "cpu": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "usable_cores": len(allowed()),
        "cores": os.cpu_count(),
        "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": memory_bytes("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of this package, of Python and of what the contenders run on; only what is installed."""
    from vesicle import __version__

    found = {"vesicle": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field and value.split():
            return int(value.split()[0]) * _KB
    return None


def _cpu() -> tuple[str, set[str]]:
    """Name and flags of the first CPU listed."""
    facts = described()
    return model_name(), set((facts.get("flags") or facts.get("Features") or "").split())
