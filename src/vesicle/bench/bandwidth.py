"""How fast this machine reads memory: the limit that decoding is measured against.

Several plain reductions run over a buffer with all threads, and the fastest single pass counts: a
limit is what the machine can do, not what it does on average. The large buffer is at least twice
the last cache, so that what is read comes from memory.
"""

from __future__ import annotations

import time
from typing import Any

from vesicle.bench.machine import last_cache_bytes, memory_bytes

LEAST_BYTES = 1 << 30
SMALL_BYTES = 128 << 20


def buffer_bytes() -> int:
    """The large buffer's size: twice the last cache, 1 GiB at least, a quarter of memory at most.

    Caches are shared by more than this process, so more than half of one is never counted on.
    """
    wanted = max(LEAST_BYTES, 2 * (last_cache_bytes() or 0))
    free = memory_bytes("MemAvailable")
    return wanted if free is None else max(SMALL_BYTES, min(wanted, free // 4))


def measure_bandwidth(threads: int, repeats: int) -> dict[str, Any]:
    """Read bandwidth in GB/s (1e9 bytes), the best of `repeats` passes of each reduction.

    Returns:
        `read_gb_per_s` over a buffer of `buffer_bytes`, and `small_read_gb_per_s` over one of 128
        MiB, which may stay in a large cache, as a small model's weights may.
    """
    import torch

    torch.set_num_threads(threads)
    size = buffer_bytes()
    buffer = torch.ones(size // 4, dtype=torch.float32)
    return {
        "read_gb_per_s": _best(buffer, repeats),
        "small_read_gb_per_s": _best(buffer[: SMALL_BYTES // 4], repeats),
        "buffer_bytes": size,
        "threads": threads,
    }


def _best(buffer: Any, repeats: int) -> float:
    import torch

    words = buffer.view(torch.int64)
    passes = (buffer.sum, words.sum, lambda: torch.dot(buffer, buffer), buffer.amax)
    best_s = float("inf")
    for reduce in passes:
        for _ in range(repeats):
            begun = time.perf_counter()
            reduce()
            best_s = min(best_s, time.perf_counter() - begun)
    return float(buffer.numel() * 4 / best_s / 1e9)
