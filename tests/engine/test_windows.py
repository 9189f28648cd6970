"""Windowed layers in the engine: what they hold, and what forks and openings can go on from."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.engine.caching import heads_of
from tests.tiny import tiny_model, tiny_modulator, tokens
from vesicle.cost import kv_bytes_peak, price
from vesicle.engine import Engine
from vesicle.engine.prefix import PrefixIndex
from vesicle.errors import VesicleError
from vesicle.eviction import HeavyHitters
from vesicle.phases import EVERYWHERE
from vesicle.plan import FOREVER, Author, Dense, Method, Plan, Replay
from vesicle.retention import Retention
from vesicle.shapes import ModelShape

WINDOWS = [24, 0, 24]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["fp64", "int4"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With an empty pool, before and after."""
    weights = request.param
    dtype = torch.float64 if weights == "fp64" else torch.float32
    engine = Engine.from_model(tiny_model("gemma3", dtype=dtype), weights=weights)
    assert engine.shape.layer_windows.tolist() == WINDOWS
    yield engine
    assert engine.pool.blocks_in_use == 0


def ids(n: int, seed: int = 1) -> list[int]:
    row: list[int] = tokens(n, seed=seed)[0].tolist()
    return row


@pytest.mark.parametrize("piece", [1, 7, 16, 50, 128])
def test_blocks_come_back(engine: Engine, piece: int):
    """Whatever a text is cut into, no more than a window, its edges and the piece is ever held."""
    sequence, row = engine.start(), ids(300)
    most = -(-24 // 16) + 1
    for start in range(0, 300, piece):
        engine.forward([(sequence, row[start : start + piece])], "none")
        length, blocks = sequence.length, sequence.cache.n_blocks
        assert (blocks[1] == -(-length // 16)).all()
        assert (blocks[[0, 2]] <= most + 1).all()
        assert engine.pool.blocks_in_use == blocks.sum()
        held = sum(min(length, window or length) for window in WINDOWS)
        assert sequence.cache.bytes_held == held * engine.shape.position_bytes
        assert sequence.cost.kv_bytes_held == price(sequence.plan, engine.shape).kv_bytes_held
    assert sequence.kv_bytes_peak == kv_bytes_peak(sequence.plan, engine.shape)
    assert sequence.share == 1


@pytest.mark.parametrize("weights", ["int4", "fp64"])
@pytest.mark.parametrize(("before", "n"), [(0, 400), (1, 129), (37, 300), (200, 128), (31, 200)])
def test_what_is_asked_of_the_pool_is_what_is_taken(weights: str, before: int, n: int):
    """A long text fits where its windows do, though not all of its blocks would."""
    model = tiny_model("gemma3", dtype=torch.float32)
    whole = Engine.from_model(model, weights=weights)
    sequence = whole.start()
    if before:
        whole.forward([(sequence, ids(before))], "none")
    needed = sequence.cache.blocks_needed(n) + int(sequence.cache.n_blocks.sum())
    assert needed <= heads_of(whole) * -(-(before + n) // 16)
    size = needed * whole.pool.bytes_per_block
    engine = Engine.from_model(model, weights=weights, kv_capacity=size)
    assert engine.pool.capacity == needed
    sequence = engine.start()
    if before:
        engine.forward([(sequence, ids(before))], "none")
    engine.forward([(sequence, ids(n))], "none")
    assert sequence.length == before + n


def test_below_rest_it_holds_as_little(engine: Engine):
    modulator = tiny_modulator(engine.shape, dtype=engine.dtype)
    sequence = engine.start(modulator.at(0.5, EVERYWHERE))
    for start in range(0, 300, 100):
        engine.forward([(sequence, ids(300)[start : start + 100])], "none")
    assert sequence.plan.kv_blocks[-1, 1] < 19
    assert (sequence.plan.kv_blocks[:, [0, 2]] <= 3).all()
    assert (sequence.cache.n_blocks[[0, 2]] <= 3).all()


@pytest.mark.parametrize("at", [87, 96, 99, 100])
def test_forks_go_on_where_they_can(engine: Engine, at: int):
    sequence, row = engine.start(), ids(140)
    engine.forward([(sequence, row[:100])], "none")
    fork = engine.fork(sequence, at)
    other = engine.start()
    engine.forward([(other, row[:at])], "none")
    later = ids(30, seed=9)
    same = torch.equal if engine._weights.packed else torch.allclose
    assert same(*(engine.forward([(s, later)], "all")[0] for s in (fork, other)))


def test_where_a_window_has_passed_nothing_forks(engine: Engine):
    sequence = engine.start()
    engine.forward([(sequence, ids(100))], "none")
    for n in (1, 80, 86):
        with pytest.raises(VesicleError, match=rf"^{n} tokens are .*; allowed: 0, or 87 to 100$"):
            engine.fork(sequence, n)
    with pytest.raises(VesicleError, match=r"^101 tokens are .*; allowed: 0, or 87 to 100$"):
        engine.fork(sequence, 101)
    assert engine.fork(sequence, 0).length == 0


def test_the_least_length_to_fork_at_is_told(engine: Engine):
    sequence = engine.start()
    for length in range(1, 120):
        engine.forward([(sequence, [length % 7])], "none")
        cache = sequence.cache
        gone = int(16 * cache.left.max())
        can = [n for n in range(1, length + 1) if not gone or n + 1 - max(WINDOWS) >= gone]
        assert [n for n in range(1, length + 1) if cache.reaches(n)] == can
        least = "0" if can[0] == 1 else f"0, or {can[0]}"
        with pytest.raises(VesicleError, match=rf"; allowed: {least} to {length}$"):
            engine.fork(sequence, length + 1)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_openings_are_reused_from_a_snapshots_end(engine: Engine, budget: float | None):
    method: Method = Dense()
    if budget:
        method = tiny_modulator(engine.shape, dtype=engine.dtype).at(budget, EVERYWHERE)
    index, row = PrefixIndex(engine), ids(200)
    sequence = engine.start(method)
    engine.forward([(sequence, row[:100])], "none")
    index.add(sequence)  # 96 tokens
    assert index.start(method, row[:90] + ids(50, seed=9)) is None  # it turns off before the end
    reused = index.start(method, row)
    assert reused is not None
    assert reused.length == 96
    engine.forward([(reused, row[96:])], "none")
    alone = engine.start(method)
    engine.forward([(alone, row)], "none")
    assert reused.plan.equals(alone.plan)
    same = torch.equal if engine._weights.packed else torch.allclose
    assert same(*(engine.forward([(s, [5])])[0] for s in (reused, alone)))
    index.add(reused)
    assert len(index) == 2  # the longer one does not serve those who go on from the shorter
    shorter = index.start(method, row[:97])
    assert shorter is not None
    assert shorter.length == 96
    index.clear()


def test_forgetting_leaves_windows_alone(engine: Engine):
    shape = engine.shape
    kept = [[np.arange(16)] * shape.n_kv_heads] * shape.n_layers
    for method in (Retention(kept, 80), HeavyHitters(16, interval=16)):
        sequence = engine.start(method)
        engine.forward([(sequence, ids(130))], "all")
        ends = (sequence.plan.evict_after != FOREVER).any((0, 2))
        assert ends.tolist() == [False, True, False]
        assert sequence.cost == price(sequence.plan, shape, sequence.overhead)


def test_nothing_else_is_forgotten_there():
    class Forgetful(Dense):
        def author(self, shape: ModelShape) -> Author:
            author = super().author(shape)
            author.evict_after = np.full((32, shape.n_layers, 1), 40, np.int32)
            return author

    engine = Engine.from_model(tiny_model("gemma3"))
    with pytest.raises(VesicleError, match="layer 0 are to be forgotten, which attends through"):
        engine.start(Forgetful())
    plan = Plan.rest(engine.shape, 64)
    ends = np.full((64, 3, 1), FOREVER, np.int32)
    ends[:16, 0] = 40
    with pytest.raises(VesicleError, match="window of 24 positions; allowed: layers that see all"):
        plan.with_fields(evict_after=ends).check(engine.shape)
    with pytest.raises(VesicleError, match="window of 24"):
        engine.start(Replay(plan.with_fields(evict_after=ends)))


def test_a_modulator_is_of_its_windows():
    shape = Engine.from_model(tiny_model("gemma3")).shape
    modulator = tiny_modulator(shape)
    modulator.check_fits(shape)
    assert modulator.info.model["windows"] == WINDOWS
