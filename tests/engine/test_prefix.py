"""Prefix reuse: what starts from another's blocks is what reads everything itself."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.caching import drop_blocks, heads_of
from tests.tiny import random_plan, tiny_control, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Sequence
from vesicle.engine.prefix import PrefixIndex
from vesicle.errors import VesicleError
from vesicle.phases import EVERYWHERE
from vesicle.plan import BLOCK, Dense, Method, Replay
from vesicle.predictors import CONTROLS

SAME = {torch.float64: 1e-5, torch.float32: 2e-3}
"""Logits about 2 in size, chunked otherwise; chosen blocks take their softmax in fp32."""


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With an empty pool, before and after."""
    engine = Engine.from_model(tiny_model("llama", dtype=request.param))
    yield engine
    assert engine.pool.blocks_in_use == 0


@pytest.fixture
def index(engine: Engine) -> Iterator[PrefixIndex]:
    index = PrefixIndex(engine)
    yield index
    index.clear()
    assert index.bytes_held == 0


def method_of(engine: Engine, kind: str) -> Method:
    if kind == "dense":
        return Dense()
    form = "mlp" if kind == "mlp" else "linear"
    modulator = tiny_modulator(engine.shape, form, dtype=engine.dtype)
    if kind in CONTROLS:
        modulator = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    return modulator.at(1.0 if kind == "rest" else 0.6, EVERYWHERE)


def read(engine: Engine, method: Method, ids: list[int]) -> Sequence:
    sequence = engine.start(method)
    engine.forward([(sequence, ids)])
    return sequence


def known(index: PrefixIndex, method: Method, ids: list[int]) -> int:
    """Tokens that a prompt would reuse."""
    sequence = index.start(method, ids)
    if sequence is None:
        return 0
    sequence.close()
    return sequence.length


def close(first: Tensor, second: Tensor) -> None:
    difference = (first - second).abs()
    assert difference.max() < SAME[first.dtype], (difference.max(), difference.mean())


def blocks(engine: Engine, n: int) -> int:
    """Bytes of n blocks of every KV head."""
    return n * heads_of(engine) * engine.pool.bytes_per_block


@pytest.mark.parametrize("kind", ["dense", "rest", "linear", "mlp", *CONTROLS])
def test_reuse_changes_nothing(engine: Engine, index: PrefixIndex, kind: str):
    """A second text goes on otherwise; logits, Plan and levels are those of reading all of it."""
    method = method_of(engine, kind)
    first, tail = tokens(61)[0].tolist(), tokens(30, seed=9)[0].tolist()
    with closing(read(engine, method, first[:40])) as source:
        for token in first[40:]:  # blocks completed in decoding are as good
            engine.forward([(source, [token])])
        index.add(source)
    ids = first[:50] + tail
    whole, reused = engine.start(method), index.start(method, ids)
    assert reused is not None
    assert reused.length == 48
    expected = engine.forward([(whole, ids)], "all")[0][48:]
    got = [engine.forward([(reused, ids[48:60])], "all")[0]]
    got += [engine.forward([(reused, [token])])[0] for token in ids[60:]]
    close(torch.cat(got), expected)
    assert reused.plan.equals(whole.plan)
    np.testing.assert_allclose(reused.levels, whole.levels, atol=3e-6)
    assert reused.token_ids == whole.token_ids
    for name, values in whole.token_costs.items():
        assert not reused.token_costs[name][:48].any(), name
        np.testing.assert_array_equal(reused.token_costs[name][48:], values[48:], err_msg=name)
    assert reused.cost.kv_bytes_held == whole.cost.kv_bytes_held
    whole.close()
    reused.close()


def keep(index: PrefixIndex, method: Method, ids: list[int]) -> None:
    with closing(read(index.engine, method, ids)) as sequence:
        index.add(sequence)


@pytest.fixture
def wide(engine: Engine) -> list[int]:
    return tokens(96, seed=4)[0].tolist()


def test_whole_blocks_and_a_token_to_compute(index: PrefixIndex, wide: list[int]):
    keep(index, Dense(), wide[:50])
    assert len(index) == 1
    lengths = {n: known(index, Dense(), wide[:n]) for n in (1, 16, 17, 32, 33, 48, 49, 50, 96)}
    assert lengths == {1: 0, 16: 0, 17: 16, 32: 16, 33: 32, 48: 32, 49: 48, 50: 48, 96: 48}
    assert known(index, Dense(), [*wide[:20], *wide[:60]]) == 16
    assert known(index, Dense(), wide[1:]) == 0
    assert index.start(Dense(), wide, beyond=48) is None


def test_the_longest_match_is_taken(index: PrefixIndex, wide: list[int]):
    keep(index, Dense(), wide[:64])
    keep(index, Dense(), wide[:32] + wide[:32])
    assert len(index) == 2
    assert known(index, Dense(), wide) == 64
    assert known(index, Dense(), wide[:32] + wide) == 64


def test_only_the_same_method_matches(engine: Engine, index: PrefixIndex, wide: list[int]):
    modulator, other = tiny_modulator(engine.shape), tiny_modulator(engine.shape)
    keep(index, modulator.at(0.6, EVERYWHERE), wide)
    assert known(index, modulator.at(0.6, EVERYWHERE), wide) == 80
    others = (modulator.at(0.5, EVERYWHERE), modulator.at(1.0), other.at(0.6), modulator.at(0.6))
    for method in (*others, Dense()):
        assert known(index, method, wide) == 0


def test_what_was_generated_is_not_a_prompt(engine: Engine, index: PrefixIndex, wide: list[int]):
    """Tokens that were governed when they were generated rest when they are read again."""
    method = tiny_modulator(engine.shape).at(0.6)
    sequence = engine.start(method)
    with closing(sequence):
        sequence.begin_prompt(50)
        engine.forward([(sequence, wide[:50])])
        for token in wide[50:]:
            engine.forward([(sequence, [token])])
        index.add(sequence)
    assert known(index, method, wide) == 48


def test_what_is_not_kept(
    engine: Engine, index: PrefixIndex, wide: list[int], rng: np.random.Generator
):
    """A state that has moved on, a method of unknown identity, a text with gaps, half a block."""
    plan = random_plan(engine.shape, 96, rng)
    for method in (tiny_modulator(engine.shape, "recurrent").at(0.6), Replay(plan)):
        keep(index, method, wide)
        assert known(index, method, wide) == 0
    with closing(read(engine, Dense(), wide)) as sequence:
        drop_blocks(sequence.cache, 1, [2])
        index.add(sequence)
    keep(index, Dense(), wide[:15])
    assert len(index) == 0


def test_a_snapshot_that_is_continued_is_dropped(
    engine: Engine, index: PrefixIndex, wide: list[int]
):
    keep(index, Dense(), wide[:32])
    with closing(index.start(Dense(), wide)) as sequence:
        engine.forward([(sequence, wide[32:64])])
        index.add(sequence)
        index.add(sequence)
    assert len(index) == 1
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 4)
    keep(index, Dense(), wide[:48])  # known already
    assert len(index) == 1
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 4)


def test_shared_blocks_count_once(engine: Engine, index: PrefixIndex, wide: list[int]):
    keep(index, Dense(), wide[:64])
    for seed in (5, 6):
        ids = wide[:48] + tokens(32, seed=seed)[0].tolist()
        with closing(index.start(Dense(), ids)) as sequence:
            engine.forward([(sequence, ids[48:])])
            index.add(sequence)
    assert len(index) == 3
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 4 + 2 + 2)
    index.evict()
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 3 + 2 + 2)
    index.evict()
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 3 + 2)
    assert known(index, Dense(), wide) == 48


def test_a_snapshot_outlives_its_source_and_a_reader_outlives_it(
    engine: Engine, index: PrefixIndex, wide: list[int]
):
    keep(index, Dense(), wide[:64])
    with closing(index.start(Dense(), wide)) as reader:
        index.clear()
        assert engine.pool.bytes_in_use == blocks(engine, 4)
        (logits,) = engine.forward([(reader, wide[64:])])
    with closing(engine.start()) as alone:
        close(logits, engine.forward([(alone, wide)])[0])


def test_the_least_recently_used_goes_first(engine: Engine, wide: list[int]):
    index = PrefixIndex(engine, blocks(engine, 4))
    texts = [tokens(33, seed=seed)[0].tolist() for seed in (20, 21, 22)]
    keep(index, Dense(), texts[0])
    keep(index, Dense(), texts[1])
    assert known(index, Dense(), texts[0]) == 32  # used again
    keep(index, Dense(), texts[2])
    assert [known(index, Dense(), text) for text in texts] == [32, 0, 32]
    assert index.bytes_held == blocks(engine, 4)
    keep(index, Dense(), wide)  # six blocks: its opening is kept
    assert known(index, Dense(), wide) == 64
    assert index.bytes_held == engine.pool.bytes_in_use == blocks(engine, 4)
    assert len(index) == 1
    index.clear()


@pytest.mark.parametrize("limit", [0, 1])
def test_no_room_keeps_nothing(engine: Engine, wide: list[int], limit: int):
    index = PrefixIndex(engine, limit)
    keep(index, Dense(), wide)
    assert len(index) == index.bytes_held == 0
    assert not index.evict()


def test_a_limit_below_zero_is_refused(engine: Engine):
    with pytest.raises(VesicleError, match="prefix cache limit is -1 bytes; allowed: 0 and above"):
        PrefixIndex(engine, -1)


def test_random_use_leaks_nothing(engine: Engine, rng: np.random.Generator):
    """Texts from few openings, kept, reused and evicted in any order; the books always balance."""
    index = PrefixIndex(engine, blocks(engine, 14))
    openings = [tokens(40, seed=seed)[0].tolist() for seed in range(3)]
    methods = [Dense(), tiny_modulator(engine.shape).at(0.6)]
    for _ in range(60):
        method = methods[rng.integers(2)]
        tail = rng.integers(1, 3, rng.integers(1, 40)).tolist()
        ids = openings[rng.integers(3)][: rng.integers(1, 41)] + tail
        sequence = index.start(method, ids) or engine.start(method)
        assert sequence.length % BLOCK == 0
        assert sequence.token_ids == ids[: sequence.length]
        engine.forward([(sequence, ids[sequence.length :])])
        index.add(sequence)
        sequence.close()
        if rng.random() < 0.1:
            index.evict()
        assert index.bytes_held == engine.pool.bytes_in_use <= blocks(engine, 14)
    index.clear()


def test_a_method_made_of_the_dense_one_is_another(
    engine: Engine, index: PrefixIndex, wide: list[int]
):
    class Other(Dense):
        """Decides what nobody here knows."""

    keep(index, Dense(), wide)
    assert known(index, Other(), wide) == 0
    keep(index, Other(), wide[::-1])
    assert known(index, Other(), wide[::-1]) == known(index, Dense(), wide[::-1]) == 0
