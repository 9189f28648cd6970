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
        return n >= self.compacted and (n == edge or all(edge in la[0] for la in self.layers))

    def held(self, layer: int) -> np.ndarray:
        return np.array([sorted(head) for head in self.layers[layer]], int).reshape(HEADS, -1)

    def drop_slots(self, layer: int, slots: list[int]) -> None:
        for head, positions in zip(self.layers[layer], self.held(layer).tolist(), strict=True):
            for slot in slots:
                del head[positions[slot]]


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
    for layer, heads in enumerate(model.layers):
        held = model.held(layer)
        assert cache.held(layer).tolist() == held.tolist()
        keys, values = gather(cache, layer, torch.float64)
        for got, which in ((keys, 0), (values, 1)):
            for head, rows_of in enumerate(heads):
                expected = [rows_of[p][which] for p in held[head].tolist()]
                stacked = torch.stack(expected) if expected else torch.empty(0, 8)
                assert torch.equal(got[head], stacked.double())
        later = held[0] >= model.compacted // BLOCK * BLOCK
        positions = held[0][later].astype(np.int32)
        assert cache.slots(layer, positions).tolist() == np.nonzero(later)[0].tolist()
        starts = cache.starts[layer, : cache.n_blocks[layer]]
        assert (np.diff(starts) > 0).all()
        firsts = sorted({p // BLOCK * BLOCK for p in positions.tolist()})
        assert starts[: -(-held.shape[1] // BLOCK)].tolist()[-len(firsts) :] == firsts or not firsts
    held_positions = sum(model.held(layer).shape[1] for layer in range(LAYERS))
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
        action = rng.choice(
            ["start", "extend", "extend", "evict", "compact", "fork", "free", "reserve"]
        )
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
            complete = model.held(layer).shape[1] // BLOCK
            if rng.random() < 0.7:
                cache.summaries(layer, str(rng.choice(["mean", "bounds"])))
            some = [i for i in range(complete) if rng.random() < 0.4]
            shared = cache.n_shared
            if pool.blocks_free < shared:
                continue
            drop_blocks(cache, layer, some)
            if some:
                model.compacted = model.length
            model.drop_slots(layer, [BLOCK * i + j for i in some for j in range(BLOCK)])
        elif action == "compact":
            layer = int(rng.integers(LAYERS))
            held = model.held(layer)
            complete = held.shape[1] // BLOCK
            n = int(rng.integers(complete + 1))
            columns = np.sort(
                [rng.permutation(complete * BLOCK)[: n * BLOCK] for _ in range(HEADS)], axis=1
            ).astype(int)
            if rng.random() < 0.3:  # leading blocks stay whole
                columns[:, : n * BLOCK] = np.arange(n * BLOCK)
            kept = np.take_along_axis(held, columns, 1).astype(np.int32)
            before, shared = pool.blocks_in_use, cache.n_shared
            if pool.blocks_free < shared:
                continue
            cache.compact(layer, kept)
            assert before - complete <= pool.blocks_in_use <= before + min(shared, n)
            if n < complete:
                model.compacted = model.length
                for head, positions in enumerate(kept.tolist()):
                    rows_of = model.layers[layer][head]
                    for p in held[head, : complete * BLOCK].tolist():
                        if p not in positions:
                            del rows_of[p]
        elif action == "fork":
            n = int(rng.integers(0, model.length + 1))
            if not model.forkable(n):
                with pytest.raises(ValueError, match=r"has evicted the|forgotten after"):
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
            kept = gather(pairs[-1][0], layer, torch.float64)[0] if pairs else rows(0)[0]
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
            assert torch.equal(*(gather(c, layer, torch.float32)[i] for c in (whole, pieces)))
        assert torch.equal(whole.summaries(layer, "bounds"), pieces.summaries(layer, "bounds"))
    made = whole.summaries(0, "mean")
    assert made.dtype == summary_dtype(kv)
    assert made.shape == (2, 4, 1, 8)
    exact = summarise(gather(whole, 0, torch.float64)[0], "mean")
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
            drop_blocks(cache, layer, [0])
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
        drop_blocks(cache, layer, [1])
        model.drop_slots(layer, list(range(16, 32)))
    model.compacted = model.length
    extend(cache, model, 16, 2)
    check(cache, model)
    assert set(cache.tables[:, :4].ravel().tolist()) == before


@pytest.mark.parametrize("kv", FORMATS)
def test_compacting_copies_what_is_stored(kv: str):
    """Codes, scales and all: keys read back are bit for bit those of before."""
    pool, rng = pool_of(kv, 60), np.random.default_rng(1)
    cache = SequenceCache(pool, LAYERS)
    extend(cache, Model(), 75, 1)
    used = pool.blocks_in_use
    for layer in range(LAYERS):
        before = gather(cache, layer, torch.float32)
        kept = np.sort([rng.permutation(64)[:32] for _ in range(HEADS)], axis=1).astype(np.int32)
        cache.summaries(layer, "bounds")
        cache.compact(layer, kept)
        index = np.concatenate([kept, np.tile(np.arange(64, 75), (HEADS, 1))], axis=1)
        for old, new in zip(before, gather(cache, layer, torch.float32), strict=True):
            expected = torch.stack([old[g, index[g]] for g in range(HEADS)])
            assert torch.equal(new, expected)
        assert pool.blocks_in_use == used - 2 * (layer + 1)
        whole = gather(cache, layer, torch.float64)[0]
        made = cache.summaries(layer, "bounds")
        exact = summarise(whole, "bounds")
        assert made.shape == exact.shape
        assert (made.double() - exact).abs().max() < {"bf16": 2e-2}.get(kv, 1e-2)


def test_compacting_shared_blocks_leaves_the_other_alone():
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 70, 1)
    fork, other = cache.fork(70), model.fork(70)
    used = pool.blocks_in_use
    kept = np.stack([np.arange(0, 32), np.arange(10, 42)]).astype(np.int32)
    for layer in range(LAYERS):
        fork.compact(layer, kept)
        for head in range(HEADS):
            for p in set(range(64)) - set(kept[head].tolist()):
                del other.layers[layer][head][p]
    other.compacted = 70
    check(cache, model)
    check(fork, other)
    assert pool.blocks_in_use == used + 2 * LAYERS  # the copies: the source holds its own still
    cache.free()
    check(fork, other)
    extend(fork, other, 20, 3)
    check(fork, other)
    assert pool.blocks_in_use == 4 * LAYERS
    with pytest.raises(ValueError, match="69 tokens are to be shared, but entries were forgotten"):
        fork.fork(69)


def test_blocks_that_stay_whole_are_not_copied():
    """The first block, shared, and the two last: only what lies between is gathered."""
    pool = pool_of("fp64", 60)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 100, 1)
    fork = cache.fork(100)
    before = fork.tables[0].copy()
    kept = np.concatenate([np.arange(16), np.arange(20, 36), np.arange(64, 96)]).astype(np.int32)
    used = pool.blocks_in_use
    fork.compact(0, np.stack([kept, kept]))
    assert fork.tables[0, [0, 2, 3, 4]].tolist() == before[[0, 4, 5, 6]].tolist()
    assert pool.blocks_in_use == used + 1


def test_compacting_a_full_pool_takes_no_room():
    pool = pool_of("fp64", 12)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 64, 1)
    assert pool.blocks_free == 0
    for layer in range(LAYERS):
        cache.compact(layer, np.tile(np.arange(5, 53, dtype=np.int32), (HEADS, 1)))
    assert pool.blocks_free == LAYERS


def test_a_full_pool_refuses_to_copy_shared_blocks():
    pool = pool_of("fp64", 12)
    cache, model = SequenceCache(pool, LAYERS), Model()
    extend(cache, model, 64, 1)
    fork = cache.fork(64)
    assert fork.n_shared == 12
    with pytest.raises(CacheFullError, match="3 blocks needed, 0 of 12 free"):
        fork.compact(0, np.tile(np.arange(5, 53, dtype=np.int32), (HEADS, 1)))
    check(fork, model)
    check(cache, model)


def test_what_may_not_be_kept():
    cache = SequenceCache(pool_of(), LAYERS)
    extend(cache, Model(), 40, 0)
    good = np.tile(np.arange(3, 19, dtype=np.int32), (HEADS, 1))
    for bad in (good[:1], good[:, :15]):
        with pytest.raises(ValueError, match="positions of shape"):
            cache.compact(0, bad)
    outside, falling, twice = good.copy(), good[:, ::-1], good.copy()
    outside[1, 15], twice[0, 1] = 32, 3
    for bad in (outside, falling, twice):
        with pytest.raises(ValueError, match="does not hold in complete blocks"):
            cache.compact(0, bad)
    cache.compact(0, good)
    with pytest.raises(ValueError, match="does not hold in complete blocks"):
        cache.compact(0, good + 1)


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
    assert gather(cache, 0, torch.float32)[0].shape == (2, 0, 8)


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
