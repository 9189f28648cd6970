"""What the operating system is told about large tensors: which pages to make large, which to take.

Decoding walks through megabytes that are read once a token. With pages of 4 KiB the processor
spends a good part of that time on looking up addresses; with pages of 2 MiB it does not. Linux
gives large pages to regions that ask for them. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
_SMALL_PAGE = mmap.PAGESIZE


def make_large(tensor: Tensor) -> None:
    """Ask for large pages where a contiguous CPU tensor spans whole ones."""
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(tensor, 0, tensor.nbytes, LARGE_PAGE, mmap.MADV_HUGEPAGE)


def give_back(tensor: Tensor, first: int, stop: int) -> int:
    """Tell the system that the whole pages of rows `first:stop` are not needed; bytes given back.

    The rows hold anything afterwards.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return 0
    row = tensor.stride(0) * tensor.element_size()
    return _advise(tensor, first * row, stop * row, _SMALL_PAGE, mmap.MADV_DONTNEED)


class Arena:
    """Room of large pages in which blobs that are read one after another lie side by side."""

    def __init__(self, n_bytes: int) -> None:
        """Room for `n_bytes`; memory is taken as it is filled."""
        self._room = torch.empty(n_bytes + LARGE_PAGE, dtype=torch.uint8)
        make_large(self._room)
        self._next = -self._room.data_ptr() % LARGE_PAGE

    def place(self, blob: Tensor) -> Tensor:
        """A copy of a 1-D uint8 tensor on a cache line of the room; itself where none is left."""
        end = self._next + blob.numel()
        if end > len(self._room):
            return blob
        placed = self._room[self._next : end].copy_(blob)
        self._next = -(-end // 64) * 64
        return placed


def _advise(tensor: Tensor, first: int, stop: int, page: int, advice: int) -> int:
    base = tensor.data_ptr()
    start, end = -(-(base + first) // page) * page, (base + stop) // page * page
    if end <= start:
        return 0
    return end - start if _madvise()(start, end - start, advice) == 0 else 0


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
