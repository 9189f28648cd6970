"""The cache of a sequence against a plain model of it: for each layer, a dict of positions."""

import gc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.engine.test_pool import SHAPE, pool_of, rows
from vesicle.blocks import summarise
from vesicle.engine.cache import SequenceCache
from vesicle.engine.pool import FORMATS, BlockPool, block_bytes, summary_dtype
from vesicle.errors import CacheFullError, VesicleError
from vesicle.plan import BLOCK

LAYERS = SHAPE.n_layers


class Model:
    """What a cache should hold: per layer, position to key and value (G, K)."""

    def __init__(self) -> None:
        self.layers: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [
            {} for _ in range(LAYERS)
        ]
        self.length = 0

    def fork(self, n: int) -> "Model":
        fork = Model()
        fork.layers = [{p: row for p, row in layer.items() if p < n} for layer in self.layers]
        fork.length = n
        return fork

    def forkable(self, n: int) -> bool:
        edge = n // BLOCK * BLOCK
        return n == edge or all(edge in layer for layer in self.layers)


def extend(cache: SequenceCache, model: Model, n: int, seed: int) -> None:
    cache.reserve(n)
    for layer in range(LAYERS):
        keys, values = rows(n, seed * LAYERS + layer)
        cache.append(layer, keys, values)
        for i in range(n):
            model.layers[layer][model.length + i] = (keys[:, i], values[:, i])
    cache.advance(n)
    model.length += n


def check(cache: SequenceCache, model: Model) -> None:
    assert cache.length == model.length
    for layer, held in enumerate(model.layers):
        assert cache.positions(layer).tolist() == sorted(held)
        keys, values = cache.gather(layer, torch.float64)
        assert keys.is_contiguous()
        for got, which in ((keys, 0), (values, 1)):
            expected = [held[p][which] for p in sorted(held)]
            stacked = torch.stack(expected, 1) if expected else torch.empty(2, 0, 8)
            assert torch.equal(got, stacked.double())
        positions = np.array(sorted(held), np.int32)
        assert cache.slots(layer, positions).tolist() == list(range(len(held)))
        starts = sorted({p // BLOCK * BLOCK for p in held})
        assert cache.starts[layer, : len(starts)].tolist() == starts
    held_positions = sum(map(len, model.layers))
    assert cache.bytes_held == held_positions * cache.pool.bytes_per_block // BLOCK
    assert cache.bytes_allocated == int(cache.n_blocks.sum()) * cache.pool.bytes_per_block


def check_pool(pool: BlockPool, caches: list[SequenceCache]) -> None:
    """Every block in a list is held, by as many as have it, and no other block is."""
    holders = np.zeros(pool.capacity, int)
    for cache in caches:
        for layer in range(LAYERS):
            listed = cache.tables[layer, : cache.n_blocks[layer]]
            assert len(set(listed.tolist())) == len(listed)
            holders[listed] += 1
    assert (pool.holders(np.arange(pool.capacity, dtype=np.int32)) == holders).all()
    assert pool.blocks_in_use == (holders > 0).sum()


@pytest.mark.parametrize("seed", range(8))
def test_random_histories(seed: int):
    rng, pool = np.random.default_rng(seed), pool_of("fp64", 150)
    pairs: list[tuple[SequenceCache, Model]] = []
    for step in range(150):
        action = rng.choice(["start", "extend", "extend", "evict", "fork", "free", "reserve"])
        if action == "start" or not pairs:
            pairs.append((SequenceCache(pool, LAYERS), Model()))
            continue
        chosen = int(rng.integers(len(pairs)))
        cache, model = pairs[chosen]
        if action == "extend":
            n = int(rng.choice([1, 1, 2, 15, 16, 17, 40]))
            needed = cache.blocks_needed(n)
            if needed > pool.blocks_free:
                with pytest.raises(CacheFullError, match=f"{needed} blocks needed"):
                    cache.reserve(n)
            else:
                extend(cache, model, n, seed * 1000 + step)
        elif action == "reserve":  # a pass that is broken off
            if cache.blocks_needed(33) <= pool.blocks_free:
                cache.reserve(33)
                cache.append(0, *rows(33))
                cache.summaries(0, "mean")
                cache.reserve(1 if cache.blocks_needed(1) <= pool.blocks_free else 0)
        elif action == "evict":
            layer = int(rng.integers(LAYERS))
            starts = sorted({p - p % BLOCK for p in model.layers[layer]})
            complete = [i for i, s in enumerate(starts) if s + BLOCK <= model.length]
            if rng.random() < 0.7:
                cache.summaries(layer, str(rng.choice(["mean", "bounds"])))
            some = [i for i in complete if rng.random() < 0.4]
            cache.evict(layer, some)
            for i in some:
                for p in range(starts[i], starts[i] + BLOCK):
                    del model.layers[layer][p]
        elif action == "fork":
            n = int(rng.integers(0, model.length + 1))
            if not model.forkable(n):
                with pytest.raises(ValueError, match="has evicted the block of positions"):
                    cache.fork(n)
            elif n % BLOCK == 0 or pool.blocks_free >= LAYERS:
                pairs.append((cache.fork(n), model.fork(n)))
            else:
                with pytest.raises(CacheFullError):
                    cache.fork(n)
        else:
            cache.free()
            cache.free()
            assert cache.bytes_held == cache.bytes_allocated == cache.summary_bytes == 0
            del pairs[chosen]
        for cache, model in pairs:
            check(cache, model)
        for layer in range(LAYERS):
            kept = pairs[-1][0].gather(layer, torch.float64)[0] if pairs else rows(0)[0]
            if pairs:
                for summary in ("mean", "bounds"):
                    got = pairs[-1][0].summaries(layer, summary)
                    assert torch.equal(got, summarise(kept, summary))
        check_pool(pool, [cache for cache, _ in pairs])
    del cache, model
    pairs.clear()
    gc.collect()
    assert pool.blocks_in_use == 0


@pytest.mark.parametrize("kv", FORMATS)
def test_pieces_are_the_whole_in_every_format(kv: str):
    pool = pool_of(kv, 60)
    whole, pieces = SequenceCache(pool, LAYERS), SequenceCache(pool, LAYERS)
    keys, values = (x.float() for x in rows(70))
    for cache, cuts in ((whole, (0, 70)), (pieces, (0, 1, 17, 18, 48, 64, 70))):
        for start, stop in pairwise(cuts):
            cache.reserve(stop - start)
            for layer in range(LAYERS):
                cache.append(layer, keys[:, start:stop], values[:, start:stop])
            cache.advance(stop - start)
            cache.summaries(1, "bounds")
    for layer in range(LAYERS):
        for i in range(2):
            assert torch.equal(*(c.gather(layer, torch.float32)[i] for c in (whole, pieces)))
        assert torch.equal(whole.summaries(layer, "bounds"), pieces.summaries(layer, "bounds"))
    made = whole.summaries(0, "mean")
    assert made.dtype == summary_dtype(kv)
    assert made.shape == (2, 4, 1, 8)
    exact = summarise(whole.gather(0, torch.float64)[0], "mean")
    assert (made.double() - exact).abs().max() < {"bf16": 8e-3}.get(kv, 1e-3)


def test_after_reserving_one_the_last_block_is_the_next_tokens():
    """What the native decoder relies on, also after a longer reservation was given up."""
    cache = SequenceCache(pool_of(), LAYERS)
    for length in range(40):
        if length % 7 == 0:
            cache.reserve(30)
        cache.reserve(1)
        last = cache.n_blocks - 1
        assert (cache.starts[np.arange(LAYERS), last] == length // BLOCK * BLOCK).all()
        assert (cache.n_blocks == length // BLOCK + 1).all()
        cache.advance(1)


def test_summaries_leave_room_and_stay_contiguous():
    cache = SequenceCache(pool_of("fp32", 200), LAYERS)
    for _ in range(20):
        extend(cache, Model(), 16, 0)
        made = cache.summaries(0, "bounds")
        assert made.stride()[1:] == (2 * 8, 8, 1)
        assert made.stride(0) % (2 * 8) == 0
        assert cache.summary_bytes == 2 * made.stride(0) * 4


def test_summaries_of_all_layers_have_the_same_room():
    """Whenever each was asked last, and whatever was evicted."""
    cache, rng = SequenceCache(pool_of("fp32", 400), LAYERS), np.random.default_rng(0)
    for step in range(60):
        extend(cache, Model(), int(rng.choice([3, 16, 40])), 0)
        layer = int(rng.integers(LAYERS))
        cache.summaries(layer, "mean")
        if step % 2 and cache.n_blocks[layer] > 2:
            cache.evict(layer, [0])
        made = [cache.summaries(i, "mean") for i in range(LAYERS)]
        assert len({m.stride(0) for m in made}) == 1
        assert all(m.stride(0) >= m.shape[1] * 8 for m in made)


def test_shared_blocks_are_not_copied_and_not_written():
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 40, 1)
    used = pool.blocks_in_use
    fork, other = cache.fork(40), model.fork(40)
    assert pool.blocks_in_use == used + LAYERS  # the incomplete tails
    assert (fork.tables[:, :2] == cache.tables[:, :2]).all()
    assert (pool.holders(cache.tables[:, :2].ravel()) == 2).all()
    extend(cache, model, 20, 2)
    extend(fork, other, 30, 3)
    check(cache, model)
    check(fork, other)
    cache.free()
    check(fork, other)
    fork.free()
    assert pool.blocks_in_use == 0


def test_evicted_blocks_are_reused():
    pool = pool_of("fp64", 12)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 64, 1)
    before = set(cache.tables[:, :4].ravel().tolist())
    with pytest.raises(CacheFullError, match="3 blocks needed, 0 of 12 free"):
        cache.reserve(1)
    check(cache, model)
    for layer in range(LAYERS):
        cache.evict(layer, [1])
        for p in range(16, 32):
            del model.layers[layer][p]
    extend(cache, model, 16, 2)
    check(cache, model)
    assert set(cache.tables[:, :4].ravel().tolist()) == before


def test_what_may_not_be_evicted():
    cache = SequenceCache(pool_of(), LAYERS)
    extend(cache, Model(), 40, 0)
    for blocks in ([2], [-1], [0, 7]):
        with pytest.raises(ValueError, match="its 2 complete blocks may be"):
            cache.evict(0, blocks)
    cache.reserve(30)
    cache.append(0, *rows(30))
    with pytest.raises(ValueError, match="its 2 complete blocks may be"):
        cache.evict(0, [2])
    cache.evict(0, [])


def test_writing_without_room_is_refused():
    cache = SequenceCache(pool_of(), LAYERS)
    cache.reserve(16)
    with pytest.raises(ValueError, match="room ends at position 16; 17 are to be written"):
        cache.append(0, *rows(17))
    with pytest.raises(ValueError, match="17 are to be counted"):
        cache.advance(17)


def test_a_freed_cache_takes_nothing_more():
    cache = SequenceCache(pool_of(), LAYERS)
    extend(cache, Model(), 20, 0)
    cache.free()
    for action in (lambda: cache.reserve(1), lambda: cache.fork(3), cache.check_open):
        with pytest.raises(VesicleError, match="the sequence is closed"):
            action()
    assert cache.gather(0, torch.float32)[0].shape == (2, 0, 8)


def test_a_dropped_cache_frees_its_blocks():
    pool = pool_of()
    cache = SequenceCache(pool, LAYERS)
    extend(cache, Model(), 20, 0)
    assert pool.blocks_in_use == 6
    del cache
    gc.collect()
    assert pool.blocks_in_use == 0


def test_bytes_held_count_scales():
    shape = replace(SHAPE, n_layers=1)
    pool = BlockPool(shape, "int8", 10 * block_bytes(shape, "int8"))
    cache = SequenceCache(pool, 1)
    cache.reserve(5)
    cache.append(0, *rows(5))
    cache.advance(5)
    assert cache.bytes_held == 5 * 2 * 2 * (8 + 2)
