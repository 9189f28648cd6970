"""The KV memory: who holds which block, what is kept of a number, what goes back to the system."""

import heapq
from pathlib import Path

import numpy as np
import pytest
import torch

from vesicle.engine.pool import (
    FORMATS,
    BlockPool,
    available_memory,
    block_bytes,
    default_capacity,
    summary_dtype,
    with_kv,
)
from vesicle.errors import CacheFullError, VesicleError
from vesicle.shapes import ModelShape

SHAPE = ModelShape(
    n_layers=3,
    width=32,
    n_heads=4,
    n_kv_heads=2,
    head_size=8,
    ffn_width=48,
    gated=True,
    vocabulary=97,
)
ERROR = {"fp64": 0.0, "fp32": 6e-8, "bf16": 4e-3, "fp16": 5e-4, "int8": 0.5 / 127 + 5e-4}
"""Of a number, relative to the largest of its row: half a step of the format."""


def pool_of(kv: str = "fp32", blocks: int = 40) -> BlockPool:
    return BlockPool(SHAPE, kv, blocks * block_bytes(SHAPE, kv))


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (G, n, K), fp64."""
    generator = torch.Generator().manual_seed(seed)
    size = (SHAPE.n_kv_heads, n, SHAPE.head_size)
    draw = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    return draw[0], draw[1]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_given_out_lowest_first_and_counted(seed: int):
    rng, pool = np.random.default_rng(seed), pool_of()
    holders: dict[int, int] = {}
    free = list(range(pool.capacity))
    for _ in range(300):
        held = sorted(holders)
        action = rng.choice(["allocate", "retain", "release"])
        if action == "allocate":
            n = int(rng.integers(0, 7))
            if n > len(free):
                with pytest.raises(CacheFullError, match=f"{n} blocks needed, {len(free)} of 40"):
                    pool.allocate(n)
                continue
            expected = [heapq.heappop(free) for _ in range(n)]
            assert pool.allocate(n).tolist() == expected
            holders |= dict.fromkeys(expected, 1)
        elif held:
            some = rng.permutation(held)[: rng.integers(0, len(held) + 1)].astype(np.int32)
            (pool.retain if action == "retain" else pool.release)(some)
            for block in some.tolist():
                holders[block] += 1 if action == "retain" else -1
                if not holders[block]:
                    del holders[block]
                    heapq.heappush(free, block)
        assert pool.blocks_in_use == len(holders)
        assert pool.blocks_free == len(free)
        assert pool.bytes_in_use == len(holders) * pool.bytes_per_block
        everything = pool.holders(np.arange(pool.capacity, dtype=np.int32))
        assert {b: n for b, n in enumerate(everything.tolist()) if n} == holders
    if holders:
        pool.release(np.array([*holders], np.int32)[:1])


def test_a_block_that_nobody_holds_cannot_be_released():
    pool = pool_of()
    blocks = pool.allocate(2)
    pool.release(blocks)
    for action in (pool.retain, pool.release):
        with pytest.raises(ValueError, match="nobody holds"):
            action(blocks[:1])


@pytest.mark.parametrize("kv", FORMATS)
def test_bytes_are_those_of_the_tensors(kv: str):
    pool = pool_of(kv)
    parts = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    assert sum(p.nbytes for p in parts if p is not None) == pool.capacity * pool.bytes_per_block
    assert (pool.key_scales is None) == (kv != "int8")
    shape = with_kv(SHAPE, kv)
    assert pool.bytes_per_block == block_bytes(SHAPE, kv) == 16 * shape.entry_bytes
    assert shape.entry_bytes * shape.n_kv_heads == shape.position_bytes
    assert summary_dtype(kv).itemsize == shape.summary_vector_bytes // shape.head_size
    assert summary_dtype(kv) == (torch.float16 if kv == "int8" else FORMATS[kv])


@pytest.mark.parametrize("kv", FORMATS)
def test_numbers_come_back_as_close_as_the_format_allows(kv: str):
    pool = pool_of(kv)
    keys, values = rows(3 * 16)
    blocks = np.array([[7, 2, 11], [3, 17, 5]], np.int32)
    pool.write(blocks, keys, values)
    for name, numbers in (("read_keys", keys), ("read_values", values)):
        back = getattr(pool, name)(blocks, torch.float64)
        assert back.shape == numbers.shape
        assert back.is_contiguous()
        assert ((back - numbers).abs() <= ERROR[kv] * numbers.abs().amax(-1, True)).all()
        assert torch.equal(getattr(pool, name)(blocks, torch.float32), back.float())
        alone = getattr(pool, name)(blocks[1, 1:2], torch.float64)
        assert torch.equal(alone, back[1, 16:32])


@pytest.mark.parametrize("kv", FORMATS)
def test_a_part_of_a_block_is_written_as_the_whole(kv: str):
    whole, parts = pool_of(kv), pool_of(kv)
    keys, values = rows(16)
    blocks = np.array([3, 8], np.int32)
    whole.write(blocks[:, None], keys, values)
    for first, stop in ((0, 1), (1, 5), (5, 16)):
        parts.write_part(blocks, first, keys[:, first:stop], values[:, first:stop])
    for name in ("keys", "values", "key_scales", "value_scales"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(whole, name)[blocks], getattr(parts, name)[blocks])


def test_the_layout_is_the_one_that_kernels_read():
    pool = pool_of()
    keys, values = (x.float() for x in rows(16))
    pool.write(np.array([[5], [9]], np.int32), keys, values)
    assert pool.keys.shape == (40, 8, 16)
    assert pool.values.shape == (40, 16, 8)
    assert torch.equal(pool.keys[[5, 9]], keys.transpose(1, 2))
    assert torch.equal(pool.values[[5, 9]], values)


def test_an_int8_scale_is_rounded_before_codes_are_made():
    pool = pool_of("int8")
    keys, values = (x.float() for x in rows(16))
    keys[0, 3] = 0
    blocks = np.array([[5], [9]], np.int32)
    pool.write(blocks, keys, values)
    assert pool.key_scales is not None
    scale = (keys.abs().amax(-1) / 127).half()
    assert torch.equal(pool.key_scales[[5, 9]], scale)
    codes = (keys / scale.float().clamp(min=1e-9)[..., None]).round().clamp(-127, 127)
    written = pool.keys[[5, 9]].transpose(1, 2).float()
    assert (written - codes).abs().max() <= 1  # ties of rounding
    assert torch.equal(pool.read_keys(blocks, torch.float32)[0, 3], keys[0, 3])


@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_numbers_beyond_the_format_are_kept_finite(kv: str):
    pool = pool_of(kv)
    keys, values = rows(16)
    keys[0, 0, 0], keys[1, 2, 3] = 1e9, -1e30
    blocks = np.array([[0], [1]], np.int32)
    pool.write(blocks, keys, values)
    back = pool.read_keys(blocks, torch.float32)
    assert torch.isfinite(back).all()
    assert back[0, 0, 0] >= 65504
    assert back[1, 2, 3] <= -65504


def test_what_is_refused():
    with pytest.raises(VesicleError, match="kv is 'fp8'; allowed: fp64, fp32, bf16, fp16, int8"):
        BlockPool(SHAPE, "fp8", 1 << 20)
    least = SHAPE.n_layers * SHAPE.n_kv_heads * block_bytes(SHAPE, "fp32")
    for capacity in (-1, 0, least - 1):
        with pytest.raises(VesicleError, match=f"{capacity} bytes; allowed: at least {least}"):
            BlockPool(SHAPE, "fp32", capacity)
    assert BlockPool(SHAPE, "fp32", least).capacity == 6
    with pytest.raises(VesicleError, match="which the system does not grant"):
        BlockPool(SHAPE, "int8", 1 << 60)


def test_the_default_capacity_is_that_of_16_full_contexts_or_half_of_memory(monkeypatch):
    from vesicle.engine import pool

    block = block_bytes(SHAPE, "fp16")
    for memory, expected in ((1 << 40, 16 * 3 * 2 * 7 * block), (6 * block, 3 * block), (0, block)):
        monkeypatch.setattr(pool, "available_memory", lambda memory=memory: memory)
        assert default_capacity(SHAPE, "fp16", 100) == expected
    monkeypatch.setattr(pool, "available_memory", lambda: None)
    assert default_capacity(SHAPE, "fp16", 100) == 16 * 3 * 2 * 7 * block


def test_available_memory_is_plausible():
    available = available_memory()
    assert available is None or available > 1 << 26


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
