"""What the operating system is told about large tensors: to make their pages large.

Decoding walks through megabytes that are read once a token. With pages of 4 KiB the processor
spends a good part of that time on looking up addresses; with pages of 2 MiB it does not. Linux
gives large pages to regions that ask for them. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20


def make_large(tensor: Tensor) -> None:
    """Ask for large pages where a contiguous CPU tensor spans whole ones."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE
    if end > start:
        _madvise()(start, end - start, mmap.MADV_HUGEPAGE)


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


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
