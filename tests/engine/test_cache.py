"""The cache of a sequence against a plain model of it: for each layer, a dict of positions."""

import gc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.engine.caching import drop_blocks, gather
from tests.engine.test_pool import SHAPE, pool_of, rows
from vesicle.blocks import summarise
from vesicle.engine.cache import SequenceCache
from vesicle.engine.pool import FORMATS, BlockPool, block_bytes, summary_dtype
from vesicle.errors import CacheFullError, VesicleError
from vesicle.plan import BLOCK

LAYERS = SHAPE.n_layers
HEADS = SHAPE.n_kv_heads


class Model:
    """What a cache should hold: per layer and KV head, position to key and value (K,)."""

    def __init__(self) -> None:
        self.layers: list[list[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = [
            [{} for _ in range(HEADS)] for _ in range(LAYERS)
        ]
        self.length = self.compacted = 0

    def fork(self, n: int) -> "Model":
        fork = Model()
        fork.layers = [
            [{p: row for p, row in head.items() if p < n} for head in layer]
            for layer in self.layers
        ]
        fork.length, fork.compacted = n, self.compacted
        return fork

    def forkable(self, n: int) -> bool:
        edge = n // BLOCK * BLOCK
        there = all(edge in head for layer in self.layers for head in layer)
        return n >= self.compacted and (n == edge or there)

    def held(self, layer: int) -> list[np.ndarray]:
        return [np.array(sorted(head), np.int32) for head in self.layers[layer]]

    def keep(self, layer: int, kept: list[np.ndarray]) -> None:
        """Forget what is in complete blocks and not kept."""
        for head, stays in zip(self.layers[layer], kept, strict=True):
            complete = len(head) // BLOCK * BLOCK
            for p in set(sorted(head)[:complete]) - set(stays.tolist()):
                del head[p]


def extend(cache: SequenceCache, model: Model, n: int, seed: int) -> None:
    cache.reserve(n)
    for layer in range(LAYERS):
        keys, values = rows(n, seed * LAYERS + layer)
        cache.append(layer, keys, values)
        for head in range(HEADS):
            for i in range(n):
                model.layers[layer][head][model.length + i] = keys[head, i], values[head, i]
    cache.advance(n)
    model.length += n


def check(cache: SequenceCache, model: Model) -> None:
    assert cache.length == model.length
    total = 0
    for layer, heads in enumerate(model.layers):
        held = model.held(layer)
        assert [p.tolist() for p in cache.held(layer)] == [p.tolist() for p in held]
        for head, rows_of in enumerate(heads):
            total += len(held[head])
            blocks = np.arange(-(-len(held[head]) // BLOCK))
            read = cache.read(layer, slice(head, head + 1), blocks, torch.float64)
            for got, which in zip(read, (0, 1), strict=True):
                expected = [rows_of[p][which] for p in held[head].tolist()]
                stacked = torch.stack(expected) if expected else torch.empty(0, 8)
                assert torch.equal(got[0, : len(held[head])], stacked.double())
            later = held[head] >= model.compacted // BLOCK * BLOCK
            positions = held[head][later]
            assert cache.slots(layer, head, positions).tolist() == np.nonzero(later)[0].tolist()
            starts = cache.starts[layer, head, : cache.n_blocks[layer, head]]
            assert (np.diff(starts) > 0).all()
            firsts = sorted({p // BLOCK * BLOCK for p in positions.tolist()})
            assert starts[: len(blocks)].tolist()[-len(firsts) :] == firsts or not firsts
        alike = cache.alike(layer)
        assert [g for heads in alike for g in range(heads.start, heads.stop)] == [*range(HEADS)]
        assert all(len(set(cache.n_blocks[layer, heads].tolist())) == 1 for heads in alike)
    assert cache.bytes_held == total * cache.pool.bytes_per_block // BLOCK
    assert cache.bytes_allocated == int(cache.n_blocks.sum()) * cache.pool.bytes_per_block


def check_pool(pool: BlockPool, caches: list[SequenceCache]) -> None:
    """Every block in a list is held, by as many as have it, and no other block is."""
    holders = np.zeros(pool.capacity, int)
    for cache in caches:
        for layer in range(LAYERS):
            for head in range(HEADS):
                listed = cache.tables[layer, head, : cache.n_blocks[layer, head]]
                assert len(set(listed.tolist())) == len(listed)
                holders[listed] += 1
    assert (pool.holders(np.arange(pool.capacity, dtype=np.int32)) == holders).all()
    assert pool.blocks_in_use == (holders > 0).sum()


def some_of(held: np.ndarray, blocks: bool, rng: np.random.Generator) -> np.ndarray:
    """What a head is to keep: some of its complete blocks, or as many entries from anywhere."""
    complete = len(held) // BLOCK
    n = int(rng.integers(complete + 1))
    if blocks or rng.random() < 0.3:  # blocks that stay whole
        chosen = np.sort(rng.permutation(complete)[:n])
        return held[: complete * BLOCK].reshape(-1, BLOCK)[chosen].ravel()
    return np.sort(rng.permutation(held[: complete * BLOCK])[: n * BLOCK])


@pytest.mark.parametrize("seed", range(8))
def test_random_histories(seed: int):
    rng, pool = np.random.default_rng(seed), pool_of("fp64", 300)
    pairs: list[tuple[SequenceCache, Model]] = []
    for step in range(150):
        action = rng.choice(
            ["start", "extend", "extend", "evict", "compact", "fork", "free", "reserve"]
        )
        if action == "start" or not pairs:
            pairs.append((SequenceCache(pool, LAYERS, HEADS), Model()))
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
                cache.summaries(0, 1, "mean")
                cache.reserve(1 if cache.blocks_needed(1) <= pool.blocks_free else 0)
        elif action in ("evict", "compact"):
            layer = int(rng.integers(LAYERS))
            if rng.random() < 0.7:
                cache.summaries(layer, 0, str(rng.choice(["mean", "bounds"])))
            kept = [some_of(held, action == "evict", rng) for held in model.held(layer)]
            before, shared = pool.blocks_in_use, cache.n_shared
            if pool.blocks_free < shared:
                continue
            cache.compact(layer, kept)
            fewer = [
                len(h) // BLOCK - len(k) // BLOCK
                for h, k in zip(model.held(layer), kept, strict=True)
            ]
            assert before - sum(len(h) // BLOCK for h in model.held(layer)) <= pool.blocks_in_use
            assert pool.blocks_in_use <= before + min(shared, sum(len(k) // BLOCK for k in kept))
            if any(fewer):
                model.compacted = model.length
                model.keep(layer, kept)
        elif action == "fork":
            n = int(rng.integers(0, model.length + 1))
            if not model.forkable(n):
                with pytest.raises(ValueError, match=r"has evicted the|forgotten after"):
                    cache.fork(n)
            elif n % BLOCK == 0 or pool.blocks_free >= LAYERS * HEADS:
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
        for layer, head in np.ndindex(LAYERS, HEADS) if pairs else ():
            cache = pairs[-1][0]
            blocks = np.arange(len(cache.held(layer)[head]) // BLOCK)
            keys, _ = cache.read(layer, slice(head, head + 1), blocks, torch.float64)
            for summary in ("mean", "bounds"):
                got = cache.summaries(layer, head, summary)
                assert torch.equal(got, summarise(keys[0], summary))
        check_pool(pool, [cache for cache, _ in pairs])
    del cache, model
    pairs.clear()
    gc.collect()
    assert pool.blocks_in_use == 0


@pytest.mark.parametrize("kv", FORMATS)
def test_pieces_are_the_whole_in_every_format(kv: str):
    pool = pool_of(kv, 60)
    whole, pieces = SequenceCache(pool, LAYERS, HEADS), SequenceCache(pool, LAYERS, HEADS)
    keys, values = (x.float() for x in rows(70))
    for cache, cuts in ((whole, (0, 70)), (pieces, (0, 1, 17, 18, 48, 64, 70))):
        for start, stop in pairwise(cuts):
            cache.reserve(stop - start)
            for layer in range(LAYERS):
                cache.append(layer, keys[:, start:stop], values[:, start:stop])
            cache.advance(stop - start)
            cache.summaries(1, 0, "bounds")
    for layer in range(LAYERS):
        for i in range(2):
            assert torch.equal(*(gather(c, layer, torch.float32)[i] for c in (whole, pieces)))
            assert torch.equal(*(c.summaries(layer, i, "bounds") for c in (whole, pieces)))
    made = whole.summaries(0, 1, "mean")
    assert made.dtype == summary_dtype(kv)
    assert made.shape == (4, 1, 8)
    exact = summarise(gather(whole, 0, torch.float64)[0][1], "mean")
    assert (made.double() - exact).abs().max() < {"bf16": 8e-3}.get(kv, 1e-3)


def test_after_reserving_one_the_last_block_is_the_next_tokens():
    """What the native decoder relies on, also after a longer reservation was given up."""
    cache = SequenceCache(pool_of(), LAYERS, HEADS)
    for length in range(40):
        if length % 7 == 0:
            cache.reserve(30)
        cache.reserve(1)
        last = cache.n_blocks[..., None] - 1
        starts = np.take_along_axis(cache.starts, last, axis=2)
        assert (starts == length // BLOCK * BLOCK).all()
        assert (cache.n_blocks == length // BLOCK + 1).all()
        cache.advance(1)


def test_summaries_leave_room_to_grow():
    cache = SequenceCache(pool_of("fp32", 200), LAYERS, HEADS)
    rooms = set()
    for _ in range(20):
        extend(cache, Model(), 16, 0)
        made = cache.summaries(0, 1, "bounds")
        assert made.is_contiguous()
        rooms.add(made.data_ptr())
        assert cache.summary_bytes >= made.nbytes
    assert len(rooms) <= 2


def test_shared_blocks_are_not_copied_and_not_written():
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 40, 1)
    used = pool.blocks_in_use
    fork, other = cache.fork(40), model.fork(40)
    assert pool.blocks_in_use == used + LAYERS * HEADS  # the incomplete tails
    assert (fork.tables[..., :2] == cache.tables[..., :2]).all()
    assert (pool.holders(cache.tables[..., :2].ravel()) == 2).all()
    extend(cache, model, 20, 2)
    extend(fork, other, 30, 3)
    check(cache, model)
    check(fork, other)
    cache.free()
    check(fork, other)
    fork.free()
    assert pool.blocks_in_use == 0


def test_evicted_blocks_are_reused():
    pool = pool_of("fp64", 24)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 64, 1)
    before = set(cache.tables[..., :4].ravel().tolist())
    with pytest.raises(CacheFullError, match="6 blocks needed, 0 of 24 free"):
        cache.reserve(1)
    check(cache, model)
    stays = np.concatenate([np.arange(16), np.arange(32, 64)]).astype(np.int32)
    for layer in range(LAYERS):
        drop_blocks(cache, layer, [1])
        model.keep(layer, [stays] * HEADS)
    model.compacted = model.length
    extend(cache, model, 16, 2)
    check(cache, model)
    assert set(cache.tables[..., :4].ravel().tolist()) == before


@pytest.mark.parametrize("kv", FORMATS)
def test_compacting_copies_what_is_stored(kv: str):
    """Codes, scales and all: keys read back are bit for bit those of before."""
    pool, rng = pool_of(kv, 60), np.random.default_rng(1)
    cache = SequenceCache(pool, LAYERS, HEADS)
    extend(cache, Model(), 75, 1)
    used = pool.blocks_in_use
    for layer in range(LAYERS):
        before = gather(cache, layer, torch.float32)
        # The first head keeps half, the second a quarter.
        kept = [np.sort(rng.permutation(64)[:n]).astype(np.int32) for n in (32, 16)]
        cache.summaries(layer, 0, "bounds")
        cache.compact(layer, kept)
        for head in range(HEADS):
            index = np.concatenate([kept[head], np.arange(64, 75)])
            blocks, some = np.arange(len(kept[head]) // BLOCK + 1), slice(head, head + 1)
            after = cache.read(layer, some, blocks, torch.float32)
            for old, new in zip(before, after, strict=True):
                assert torch.equal(new[0, : len(index)], old[head, index])
            exact = summarise(after[0][0].double()[: len(kept[head])], "bounds")
            made = cache.summaries(layer, head, "bounds")
            assert made.shape == exact.shape
            assert (made.double() - exact).abs().max() < {"bf16": 2e-2}.get(kv, 1e-2)
        assert pool.blocks_in_use == used - 5 * (layer + 1)


def test_compacting_shared_blocks_leaves_the_other_alone():
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 70, 1)
    fork, other = cache.fork(70), model.fork(70)
    used = pool.blocks_in_use
    kept = [np.arange(0, 32, dtype=np.int32), np.arange(10, 58, dtype=np.int32)]
    for layer in range(LAYERS):
        fork.compact(layer, kept)
        other.keep(layer, kept)
    other.compacted = 70
    check(cache, model)
    check(fork, other)
    assert pool.blocks_in_use == used + 3 * LAYERS  # the copies: the source holds its own still
    cache.free()
    check(fork, other)
    extend(fork, other, 20, 3)
    check(fork, other)
    assert pool.blocks_in_use == (4 + 5) * LAYERS
    with pytest.raises(ValueError, match="69 tokens are to be shared, but entries were forgotten"):
        fork.fork(69)


def test_blocks_that_stay_whole_are_not_copied():
    """The first block, shared, and the two last: only what lies between is gathered."""
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 100, 1)
    fork = cache.fork(100)
    before = fork.tables[0, 1].copy()
    kept = np.concatenate([np.arange(16), np.arange(20, 36), np.arange(64, 96)]).astype(np.int32)
    used = pool.blocks_in_use
    fork.compact(0, [np.arange(96, dtype=np.int32), kept])
    assert fork.tables[0, 1, [0, 2, 3, 4]].tolist() == before[[0, 4, 5, 6]].tolist()
    assert pool.blocks_in_use == used + 1


def test_compacting_a_full_pool_takes_no_room():
    pool = pool_of("fp64", 24)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 64, 1)
    assert pool.blocks_free == 0
    for layer in range(LAYERS):
        cache.compact(layer, [np.arange(5, 53, dtype=np.int32), np.arange(5, 37, dtype=np.int32)])
    assert pool.blocks_free == 3 * LAYERS


def test_a_full_pool_refuses_to_copy_shared_blocks():
    """And changes nothing, not even where there was room for the first head's."""
    pool = pool_of("fp64", 28)
    cache, model = SequenceCache(pool, LAYERS, HEADS), Model()
    extend(cache, model, 64, 1)
    fork = cache.fork(64)
    assert fork.n_shared == 24
    with pytest.raises(CacheFullError, match="6 blocks needed, 4 of 28 free"):
        fork.compact(0, [np.arange(5, 53, dtype=np.int32)] * HEADS)
    check(fork, model)
    check(cache, model)
    check_pool(pool, [cache, fork])


def test_what_may_not_be_kept():
    cache = SequenceCache(pool_of(), LAYERS, HEADS)
    extend(cache, Model(), 40, 0)
    good = np.arange(3, 19, dtype=np.int32)
    with pytest.raises(ValueError, match="1 KV heads are to keep positions; allowed: 2"):
        cache.compact(0, [good])
    with pytest.raises(ValueError, match="positions of shape"):
        cache.compact(0, [good, good[:15]])
    outside, twice = good.copy(), good.copy()
    outside[15], twice[1] = 32, 3
    for bad in (outside, good[::-1], twice):
        with pytest.raises(ValueError, match="does not hold in complete blocks"):
            cache.compact(0, [good, bad])
    cache.compact(0, [good, good])
    with pytest.raises(ValueError, match="does not hold in complete blocks"):
        cache.compact(0, [good, good + 1])


def test_writing_without_room_is_refused():
    cache = SequenceCache(pool_of(), LAYERS, HEADS)
    cache.reserve(16)
    with pytest.raises(ValueError, match="room ends at position 16; 17 are to be written"):
        cache.append(0, *rows(17))
    with pytest.raises(ValueError, match="17 are to be counted"):
        cache.advance(17)


def test_a_freed_cache_takes_nothing_more():
    cache = SequenceCache(pool_of(), LAYERS, HEADS)
    extend(cache, Model(), 20, 0)
    cache.free()
    for action in (lambda: cache.reserve(1), lambda: cache.fork(3), cache.check_open):
        with pytest.raises(VesicleError, match="the sequence is closed"):
            action()
    assert [len(head) for head in cache.held(0)] == [0, 0]


def test_a_dropped_cache_frees_its_blocks():
    pool = pool_of()
    cache = SequenceCache(pool, LAYERS, HEADS)
    extend(cache, Model(), 20, 0)
    assert pool.blocks_in_use == 2 * LAYERS * HEADS
    del cache
    gc.collect()
    assert pool.blocks_in_use == 0


def test_bytes_held_count_scales():
    shape = replace(SHAPE, n_layers=1)
    pool = BlockPool(shape, "int8", 10 * block_bytes(shape, "int8"))
    cache = SequenceCache(pool, 1, HEADS)
    cache.reserve(5)
    cache.append(0, *rows(5))
    cache.advance(5)
    assert cache.bytes_held == 5 * 2 * 2 * (8 + 2)
