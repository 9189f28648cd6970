"""Forgetting in the engine: memory that comes back, forks, batches, a full pool, prefix reuse."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.caching import drop_blocks, gather, heads_of
from tests.engine.decoding import IDS, method_for, native
from tests.parity.test_retention import random_kept
from tests.tiny import tiny_model, tiny_modulator, tokens
from vesicle.cost import kv_bytes_peak
from vesicle.engine import Engine
from vesicle.engine.prefix import PrefixIndex
from vesicle.engine.scheduler import Failed, Finished, Request, Scheduler
from vesicle.errors import CacheFullError, VesicleError
from vesicle.plan import Dense, Plan, Replay
from vesicle.retention import Retention

ROW = tokens(120, seed=3)[0].tolist()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """With an empty pool, before and after."""
    engine = Engine.from_model(tiny_model("llama"))
    yield engine
    assert engine.pool.blocks_in_use == 0


def recent(engine: Engine, at: int, n: int, inner: Any = None) -> Retention:
    """The first 4 and the last n - 4 of the first `at` entries."""
    kept = [*range(4), *range(at - n + 4, at)]
    shape = engine.shape
    return Retention([[kept] * shape.n_kv_heads] * shape.n_layers, at, inner)


def test_memory_comes_back(engine: Engine, rng: np.random.Generator):
    """In blocks, in bytes, and never a block more than the dense cache had."""
    layers, heads = engine.shape.n_layers, heads_of(engine)
    with closing(engine.start(recent(engine, 100, 36))) as sequence:
        engine.forward([(sequence, ROW[:99])])
        assert engine.pool.blocks_in_use == 7 * heads
        engine.forward([(sequence, ROW[99:100])])
        # 32 of the 96 complete ones, and the last block's 4
        assert engine.pool.blocks_in_use == 3 * heads
        assert sequence.cost.kv_bytes_held == 36 * layers * engine.shape.position_bytes
        assert sequence.kv_bytes_peak == 100 * layers * engine.shape.position_bytes
        assert sequence.kv_bytes_peak == kv_bytes_peak(sequence.plan, engine.shape)
        engine.forward([(sequence, ROW[100:113])])
        assert engine.pool.blocks_in_use == 4 * heads
        assert engine.pool._fresh == 7 * heads  # blocks that were ever given out


def test_keeping_nothing_of_the_complete_blocks(engine: Engine):
    method = Retention([[[]] * engine.shape.n_kv_heads] * engine.shape.n_layers, 96)
    with closing(engine.start(method)) as sequence:
        engine.forward([(sequence, ROW[:96])])
        assert engine.pool.blocks_in_use == sequence.cost.kv_bytes_held == 0
        engine.forward([(sequence, ROW[96:97]), (other := engine.start(), ROW[:1])])
        alone = sequence.token_costs["kv_bytes_read"][-1]
        assert alone == other.token_costs["kv_bytes_read"][-1]  # its own entry
        other.close()


@pytest.mark.parametrize("kind", ["dense", "replay", "modulator"])
@pytest.mark.parametrize("n", [40, 70, 75])
def test_forks_before_at_and_after_the_eviction(kind: str, n: int, rng: np.random.Generator):
    """Each is a sequence of its own, decodes natively, and leaves the others' cache alone."""
    engine = native("fp32")
    inner = method_for(engine, kind)
    method = Retention(random_kept(engine.shape, 70, rng), 70, inner)
    source = engine.start(method)
    engine.forward([(source, IDS[:n])], "none")
    forks = [engine.fork(source), engine.fork(source)]
    for sequence, tail in zip([*forks, source], (80, 100, 80), strict=True):
        alone = engine.start(method)
        engine.forward([(alone, IDS[:n])], "none")
        ids = IDS[tail : tail + 50]
        for token in ids:
            (expected,) = engine.forward([(alone, [token])])
            assert torch.equal(engine.forward([(sequence, [token])])[0], expected)
        assert sequence.plan.equals(alone.plan)
        assert sequence.cost.kv_bytes_held == alone.cost.kv_bytes_held
        for name, values in alone.token_costs.items():
            np.testing.assert_array_equal(sequence.token_costs[name][n:], values[n:], err_msg=name)
        alone.close()
    for sequence in (*forks, source):
        sequence.close()
    assert engine.pool.blocks_in_use == 0


def test_a_fork_that_forgets_leaves_its_source_whole(engine: Engine):
    """Shared pages: the dense source goes on as if nothing had been forgotten elsewhere."""
    method = recent(engine, 100, 36)
    with closing(engine.start(method)) as source, closing(engine.start()) as dense:
        engine.forward([(source, ROW[:99])])
        engine.forward([(dense, ROW[:99])])
        fork = engine.fork(source)
        engine.forward([(fork, ROW[99:])])
        # The source itself has not come to the eviction: its entries are all there.
        for layer in range(engine.shape.n_layers):
            for mine, others in zip(
                gather(source.cache, layer, torch.float64),
                gather(dense.cache, layer, torch.float64),
                strict=True,
            ):
                assert torch.equal(mine, others)
        fork.close()


def test_no_fork_of_what_was_there_before(engine: Engine):
    with closing(engine.start(recent(engine, 60, 20))) as source:
        engine.forward([(source, ROW[:70])])
        line = "50 tokens are to be shared, but entries were forgotten after 60"
        with pytest.raises(VesicleError, match=line):
            engine.fork(source, 50)
        engine.fork(source, 60).close()


def test_room_to_copy_shared_pages_is_asked_for_first():
    """A pass that would evict on a full pool is refused before anything is touched."""
    model = tiny_model("llama")
    layers = Engine.from_model(model).shape.n_layers
    size = Engine.from_model(model).pool.bytes_per_block
    tight = Engine.from_model(model, kv_capacity=8 * 2 * layers * size)
    source = tight.start(Retention([[range(8, 40)] * 2] * layers, 68))
    tight.forward([(source, ROW[:67])])
    fork = tight.fork(source)  # 4 shared, 2 tails: 2 are free, 4 may be needed
    with pytest.raises(CacheFullError, match="24 blocks needed, 12 of 48 free"):
        tight.forward([(fork, ROW[67:69])])
    assert fork.length == source.length == 67
    source.close()
    (logits,) = tight.forward([(fork, ROW[67:69])])
    alone = tight.start(fork.method)
    tight.forward([(alone, ROW[:67])])
    assert torch.equal(logits, tight.forward([(alone, ROW[67:69])])[0])
    assert tight.pool.blocks_in_use == 2 * 3 * 2 * layers


def test_compacting_needs_no_room_of_its_own():
    model = tiny_model("llama")
    layers = Engine.from_model(model).shape.n_layers
    size = Engine.from_model(model).pool.bytes_per_block
    tight = Engine.from_model(model, kv_capacity=4 * 2 * layers * size)
    sequence = tight.start(Retention([[range(1, 33)] * 2] * layers, 64))
    tight.forward([(sequence, ROW[:64])])
    assert tight.pool.blocks_free == 2 * 2 * layers
    tight.forward([(sequence, ROW[64:96])])
    with pytest.raises(CacheFullError):
        tight.forward([(sequence, ROW[96:97])])


def test_prefixes_are_not_reused(engine: Engine):
    """Before and after the eviction: a method's own kept entries belong to its own text."""
    index, method = PrefixIndex(engine), recent(engine, 60, 20)
    for n in (50, 70):
        with closing(engine.start(method)) as sequence:
            engine.forward([(sequence, ROW[:n])])
            index.add(sequence)
        assert len(index) == 0
        assert index.start(method, ROW) is None
    with closing(engine.start()) as sequence:
        engine.forward([(sequence, ROW[:70])])
        index.add(sequence)
    assert index.start(method, ROW) is None
    index.clear()


def test_the_scheduler(engine: Engine):
    """Requests that forget, beside one that does not, each as alone."""
    methods = [recent(engine, 40, 20), recent(engine, 33, 20), Dense(), recent(engine, 60, 20)]
    scheduler = Scheduler(engine, chunk=16)
    for method in methods:
        scheduler.add(Request(prompt=ROW[:50], method=method, max_new_tokens=20))
    events = list(scheduler.run())
    assert not [e for e in events if isinstance(e, Failed)]
    ends = {e.request_id: e for e in events if isinstance(e, Finished)}
    for number, method in enumerate(methods):
        tokens_alone, alone = engine.generate(ROW[:50], method, max_new_tokens=20)
        assert ends[number].tokens == tokens_alone
        assert ends[number].sequence.plan.equals(alone.plan)
        assert ends[number].cost == alone.cost
        alone.close()
    scheduler.close()


def test_two_evictions_in_one_chunk(engine: Engine):
    shape = engine.shape
    evict_after = np.full((70, shape.n_layers, shape.n_kv_heads), 2**31 - 1, np.int32)
    evict_after[:16], evict_after[16:32] = 35, 50
    method = Replay(Plan.rest(shape, 70).with_fields(evict_after=evict_after))
    with closing(engine.start(method)) as whole, closing(engine.start(method)) as pieces:
        expected = [engine.forward([(pieces, [token])])[0] for token in ROW[:70]]
        (logits,) = engine.forward([(whole, ROW[:70])], "all")
        torch.testing.assert_close(logits, torch.cat(expected))
        assert whole.plan.equals(pieces.plan)
        assert whole.plan.equals(method.plan)
        assert whole.cost == pieces.cost
        assert whole.kv_bytes_peak == kv_bytes_peak(whole.plan, shape)


def test_evicting_by_hand_and_by_plan_do_not_mix_silently(engine: Engine):
    with closing(engine.start(recent(engine, 60, 20))) as sequence:
        engine.forward([(sequence, ROW[:50])])
        drop_blocks(sequence.cache, 0, [0])
        with pytest.raises(ValueError, match="positions that layer 0 does not hold"):
            engine.forward([(sequence, ROW[50:])])


def test_levels_are_the_inner_modulators(engine: Engine):
    inner = tiny_modulator(engine.shape).at(0.6)
    with closing(engine.start(recent(engine, 60, 20, inner))) as sequence:
        engine.forward([(sequence, ROW[:70])])
        assert sequence.levels.shape == (70, 3, 5)
        assert (sequence.levels < 1).any()
