"""The KV memory of an engine: blocks of 16 positions that all its sequences draw from.

One block holds the keys and values of 16 positions of one KV head of one layer of one sequence.
Keys lie transposed, (K, 16), so that one vector instruction multiplies a channel of 16 positions;
values lie (16, K), so that one weight multiplies a position's row. Blocks are counted: a block that
several sequences share goes back when the last of them lets go of it.

The pool asks for address space, not for memory: the operating system commits a page when it is
first written. Blocks of the lowest free number are given out first, so that what was touched stays
dense; `trim` hands pages of free blocks back.

In `int8` each entry has its own scale, amax / 127, kept in fp16. The scale is
rounded before codes are made from it, so that code times scale is all there is to know.
"""

from __future__ import annotations

import heapq
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.engine.pages import make_large
from vesicle.errors import CacheFullError, VesicleError
from vesicle.models.memory import memory_bytes
from vesicle.plan import BLOCK, IntArray
from vesicle.shapes import ModelShape

FORMATS: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
"""What a cached number may be stored as."""

SEQUENCES = 16
"""Sequences of full context that the default capacity has room for, where memory allows."""

_FP16_MAX = 65504.0


def kv_dtype(kv: str) -> torch.dtype:
    """The storage of a KV format.

    Raises:
        VesicleError: If there is no such format.
    """
    if kv not in FORMATS:
        raise VesicleError(f"kv is {kv!r}; allowed: {', '.join(FORMATS)}")
    return FORMATS[kv]


def with_kv(shape: ModelShape, kv: str) -> ModelShape:
    """The sizes by which the costs of a model with this cache are counted."""
    dtype = kv_dtype(kv)
    scaled = dtype == torch.int8
    return replace(
        shape,
        kv_bytes=dtype.itemsize,
        kv_scale_bytes=torch.float16.itemsize if scaled else 0,
        summary_bytes=summary_dtype(kv).itemsize if scaled else None,
    )


def summary_dtype(kv: str) -> torch.dtype:
    """In what the summaries of blocks are kept: as the numbers themselves, int8 as fp16."""
    dtype = kv_dtype(kv)
    return torch.float16 if dtype == torch.int8 else dtype


def default_capacity(shape: ModelShape, kv: str, context_window: int) -> int:
    """Bytes for 16 sequences of full context, but at most half of the memory that is available."""
    blocks = -(-context_window // BLOCK) * SEQUENCES * shape.n_layers * shape.n_kv_heads
    block = block_bytes(shape, kv)
    available = available_memory()
    wanted = blocks * block
    return max(block, wanted if available is None else min(wanted, available // 2))


def block_bytes(shape: ModelShape, kv: str) -> int:
    """Bytes of one block: 16 positions of one KV head of one layer."""
    return BLOCK * with_kv(shape, kv).entry_bytes


def available_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    limits = [memory_bytes()]
    with suppress(OSError, KeyError, ValueError):
        # Linux. What sysconf calls available leaves out the file cache, which is given up on
        # demand.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        limits.append(int(rows["MemAvailable"][0]) * 1024)
    return min((limit for limit in limits if limit is not None), default=None)


class BlockPool:
    """Blocks of 16 positions of one KV head: keys, values, and who holds them.

    Addresses never change while the pool lives. Positions of a block that were not written hold
    anything, NaN included.

    Attributes:
        keys: (capacity, K, 16).
        values: (capacity, 16, K).
        key_scales: (capacity, 16) fp16, for `int8` only.
        value_scales: The same for values.
        capacity: Blocks in all.
        bytes_per_block: Of keys, values and scales.
        kv: The format, one of `FORMATS`.
    """

    def __init__(
        self,
        shape: ModelShape,
        kv: str,
        capacity_bytes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Reserve address space.

        Args:
            shape: Of the model.
            kv: How numbers are stored, one of `FORMATS`.
            capacity_bytes: Most bytes that blocks may take; rounded down to whole blocks.
            device: Where blocks lie.

        Raises:
            VesicleError: If the format is unknown, or there is no room for one position of the
                model, or the system grants no such address space.
        """
        dtype = kv_dtype(kv)
        self.kv = kv
        self.bytes_per_block = block_bytes(shape, kv)
        least = shape.n_layers * shape.n_kv_heads * self.bytes_per_block
        if capacity_bytes < least:
            raise VesicleError(
                f"kv_capacity is {capacity_bytes} bytes; allowed: at least {least}, one block of "
                f"{BLOCK} positions for each KV head of the model's {shape.n_layers} layers"
            )
        self.capacity = min(capacity_bytes // self.bytes_per_block, 2**31 - 1)
        n, k = self.capacity, shape.head_size
        # Made outside inference mode, so that they may be written inside and outside of it.
        with torch.inference_mode(False):
            try:
                # Keys and values side by side: 4 KiB in fp16 with heads of 64, which is as far as
                # processors read ahead by themselves.
                pages = torch.empty(n, 2, k * BLOCK, dtype=dtype, device=device)
                self.keys = pages[:, 0].unflatten(-1, (k, BLOCK))
                self.values = pages[:, 1].unflatten(-1, (BLOCK, k))
                self.key_scales: Tensor | None = None
                self.value_scales: Tensor | None = None
                if dtype == torch.int8:
                    scales = (n, BLOCK)
                    self.key_scales = torch.empty(scales, dtype=torch.float16, device=device)
                    self.value_scales = torch.empty(scales, dtype=torch.float16, device=device)
            except RuntimeError as error:
                raise VesicleError(
                    f"kv_capacity is {capacity_bytes} bytes, which the system does not grant"
                ) from error
        make_large(pages)
        self._pages = pages
        self._holders = np.zeros(n, np.int32)
        self._freed: list[int] = []  # a heap of numbers below `_fresh`
        self._fresh = 0  # blocks from here on were never given out
        # A dropped sequence lets go of its blocks whenever the garbage collector finds it, perhaps
        # from within a call of this very thread.
        self._lock = threading.RLock()

    @property
    def blocks_in_use(self) -> int:
        """Blocks that at least one sequence holds."""
        with self._lock:
            return self._fresh - len(self._freed)

    @property
    def blocks_free(self) -> int:
        """Blocks that can be had."""
        return self.capacity - self.blocks_in_use

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks in use."""
        return self.blocks_in_use * self.bytes_per_block

    def holders(self, blocks: IntArray) -> IntArray:
        """How many sequences hold each of some blocks."""
        return self._holders[blocks]

    def require(self, n_blocks: int) -> None:
        """Refuse what the pool cannot give.

        Raises:
            CacheFullError: If fewer than `n_blocks` are free.
        """
        free = self.blocks_free
        if n_blocks > free:
            raise CacheFullError(
                f"the KV cache is full: {n_blocks} blocks needed, {free} of {self.capacity} free; "
                f"close sequences, or raise kv_capacity "
                f"(now {self.capacity * self.bytes_per_block} bytes)"
            )

    def allocate(self, n_blocks: int) -> IntArray:
        """Take blocks, those of the lowest free numbers, each with one holder.

        Raises:
            CacheFullError: If fewer than `n_blocks` are free; none is taken.
        """
        with self._lock:
            self.require(n_blocks)
            again = [heapq.heappop(self._freed) for _ in range(min(n_blocks, len(self._freed)))]
            fresh = n_blocks - len(again)
            blocks = np.empty(n_blocks, np.int32)
            blocks[: len(again)] = again
            blocks[len(again) :] = np.arange(self._fresh, self._fresh + fresh)
            self._fresh += fresh
            self._holders[blocks] = 1
            return blocks

    def retain(self, blocks: IntArray) -> None:
        """Add a holder to each of some distinct blocks in use."""
        with self._lock:
            self._check_held(blocks)
            self._holders[blocks] += 1

    def release(self, blocks: IntArray) -> None:
        """Remove a holder from each of some distinct blocks in use; without one they are free."""
        with self._lock:
            self._check_held(blocks)
            self._holders[blocks] -= 1
            for block in blocks[self._holders[blocks] == 0].tolist():
                heapq.heappush(self._freed, block)

    def _check_held(self, blocks: IntArray) -> None:
        if (self._holders[blocks] < 1).any():
            raise ValueError("a block that nobody holds was retained or released")

    def write(self, blocks: IntArray, keys: Tensor, values: Tensor) -> None:
        """Fill whole blocks (G, N), each of one KV head, with keys and values (G, 16 N, K)."""
        index = torch.from_numpy(blocks).long()
        for source, store, scales in self._stores(keys, values):
            numbers, scale = self._stored(source)
            split = numbers.unflatten(1, (-1, BLOCK))
            store[index] = split.transpose(2, 3) if store is self.keys else split
            if scales is not None and scale is not None:
                scales[index] = scale.unflatten(1, (-1, BLOCK))

    def write_part(self, blocks: IntArray, first: int, keys: Tensor, values: Tensor) -> None:
        """Fill positions `first` and on of a block of each KV head, (G,), with (G, T, K)."""
        stop, index = first + keys.shape[1], torch.from_numpy(blocks).long()
        for source, store, scales in self._stores(keys, values):
            numbers, scale = self._stored(source)
            if store is self.keys:
                store[index, :, first:stop] = numbers.transpose(1, 2)
            else:
                store[index, first:stop] = numbers
            if scales is not None and scale is not None:
                scales[index, first:stop] = scale

    def read_keys(self, blocks: IntArray, dtype: torch.dtype) -> Tensor:
        """(..., 16 N, K) keys of blocks (..., N), contiguous, in a dtype to compute in."""
        return self._read(self.keys, self.key_scales, blocks, dtype)

    def read_values(self, blocks: IntArray, dtype: torch.dtype) -> Tensor:
        """(..., 16 N, K) values of blocks (..., N), contiguous, in a dtype to compute in."""
        return self._read(self.values, self.value_scales, blocks, dtype)

    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy the contents of blocks to as many others."""
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor is not None:
                tensor[torch.from_numpy(target).long()] = tensor[torch.from_numpy(source).long()]

    def regroup(
        self, blocks: NDArray[np.integer], places: NDArray[np.integer], target: IntArray
    ) -> None:
        """Fill whole blocks with stored entries from anywhere.

        Nothing is converted. All entries are read before any is written.

        Args:
            blocks: (16 N,) where the entries lie now.
            places: (16 N,) their places in these blocks.
            target: (N,) blocks to fill.
        """
        block, place, index = (torch.from_numpy(x).long() for x in (blocks, places, target))
        found = [(self.values, self.values[block, place])]
        for scales in (self.key_scales, self.value_scales):
            if scales is not None:
                found.append((scales, scales[block, place]))
        keys = self.keys[block, :, place].unflatten(0, (len(target), BLOCK))
        for store, entries in found:
            store[index] = entries.unflatten(0, (len(target), BLOCK))
        self.keys[index] = keys.transpose(1, 2)

    def _stores(
        self, keys: Tensor, values: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        return (keys, self.keys, self.key_scales), (values, self.values, self.value_scales)

    def _stored(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers (G, T, K) as they are kept, and their scales (G, T)."""
        if self.key_scales is None:
            if self.kv == "fp16":
                # What is too large becomes the largest, since an infinite key would turn the whole
                # attention into NaN; what is infinite already was wrong before, and stays.
                x = torch.where(x.isinf(), x, x.clamp(-_FP16_MAX, _FP16_MAX))
            return x.to(self.keys.dtype).contiguous(), None
        x = x.float()
        top = x.abs().amax(-1)
        # No code says NaN or infinity: the scale does.
        scale = torch.where(top.isfinite(), (top / 127).clamp(max=_FP16_MAX), torch.nan).half()
        steps = scale.float()[..., None]
        codes = (x * torch.where(steps > 0, 1 / steps, 0.0)).round().clamp(-127, 127)
        return codes.nan_to_num(0.0).to(torch.int8), scale

    def _read(
        self, store: Tensor, scales: Tensor | None, blocks: IntArray, dtype: torch.dtype
    ) -> Tensor:
        index, k = torch.from_numpy(blocks).long().flatten(), self.values.shape[2]
        numbers = store.index_select(0, index)  # (N, K, 16) or (N, 16, K)
        exact = dtype if scales is None else torch.promote_types(dtype, torch.float32)
        # One pass turns and converts at once.
        out = torch.empty(len(index), BLOCK, k, dtype=exact, device=store.device)
        out.copy_(numbers.transpose(1, 2) if store is self.keys else numbers)
        if scales is not None:
            out *= scales.index_select(0, index)[..., None].to(exact)
        return out.view(*blocks.shape[:-1], blocks.shape[-1] * BLOCK, k).to(dtype)
