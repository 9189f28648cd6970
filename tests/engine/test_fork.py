"""A forked sequence is one that has read everything itself, and its source never notices."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, method_for, native
from tests.tiny import random_plan, tiny_control, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Sequence
from vesicle.errors import CacheFullError, VesicleError
from vesicle.plan import Dense, Method, Replay
from vesicle.predictors import CONTROLS

PROMPT, FIRST, SECOND = (tokens(n, seed=n)[0].tolist() for n in (41, 23, 9))
KINDS = ["dense", "rest", "linear", "mlp", "saved", *CONTROLS]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """With an empty pool, before and after."""
    engine = Engine.from_model(tiny_model("llama"))
    yield engine
    assert engine.pool.blocks_in_use == 0


def method_of(engine: Engine, kind: str) -> Method:
    if kind == "dense":
        return Dense()
    form = kind if kind in ("mlp", "recurrent") else "linear"
    modulator = tiny_modulator(engine.shape, form)
    if kind == "saved":
        plan = random_plan(engine.shape, 70, np.random.default_rng(3))
        return Replay(plan, modulator.equipment)
    if kind in CONTROLS:
        modulator = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    return modulator.at(1.0 if kind == "rest" else 0.6)


def read(engine: Engine, sequence: Sequence, *parts: list[int]) -> Tensor:
    return torch.cat([engine.forward([(sequence, part)], "all")[0] for part in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 16, 41])
def test_a_fork_is_a_sequence_of_its_own(engine: Engine, kind: str, n: int):
    """Bit for bit: logits, Plan, levels and counted work, of two forks and of their source."""
    method, prompt = method_of(engine, kind), PROMPT[:n]
    source = engine.start(method)
    read(engine, source, prompt)
    forks = [engine.fork(source), engine.fork(source)]
    for sequence, tail in zip([*forks, source], [FIRST, SECOND, FIRST], strict=True):
        alone = engine.start(method)
        expected = read(engine, alone, prompt, tail)[n:]
        assert torch.equal(read(engine, sequence, tail), expected)
        assert sequence.plan.equals(alone.plan)
        np.testing.assert_array_equal(sequence.levels, alone.levels)
        assert sequence.token_ids == alone.token_ids
        for name, values in alone.token_costs.items():
            counted = sequence.token_costs[name]
            np.testing.assert_array_equal(counted[n:], values[n:], err_msg=name)
            assert counted[:n].any() == (values[:n].any() and sequence is source), name
        assert sequence.cost.kv_bytes_held == alone.cost.kv_bytes_held
        alone.close()
    for sequence in (*forks, source):
        sequence.close()


@pytest.mark.parametrize("kind", ["dense", "replay", "modulator"])
def test_native_decoding_after_a_fork(kind: str):
    """Recorded rows that nobody has asked for yet are taken over as well."""
    engine = native("fp32")
    method = method_for(engine, kind)
    source, alone = engine.start(method), engine.start(method)
    for sequence in (source, alone):
        engine.forward([(sequence, IDS[:20])])
        for token in IDS[20:30]:
            engine.forward([(sequence, [token])])
    with closing(engine.fork(source)) as fork:
        for token in IDS[30:60]:
            (expected,) = engine.forward([(alone, [token])])
            assert torch.equal(engine.forward([(fork, [token])])[0], expected)
            assert engine.likeliest([(source, [token])]) == [int(expected.argmax())]
        assert fork.plan.equals(alone.plan)
        assert not fork.token_costs["flops_linear"][:30].any()
        np.testing.assert_array_equal(fork.levels, alone.levels)


def test_an_earlier_point(engine: Engine):
    source = engine.start()
    read(engine, source, PROMPT)
    with closing(engine.fork(source, 19)) as fork, closing(engine.start()) as alone:
        expected = read(engine, alone, PROMPT[:19], FIRST)[19:]
        # Keys of the opening come from a longer pass: sums in another order.
        torch.testing.assert_close(read(engine, fork, FIRST), expected)
    source.close()


def test_the_source_may_end_first(engine: Engine):
    source = engine.start()
    read(engine, source, PROMPT)
    fork = engine.fork(source)
    source.close()
    with closing(fork), closing(engine.start()) as alone:
        expected = read(engine, alone, PROMPT, FIRST)[len(PROMPT) :]
        assert torch.equal(read(engine, fork, FIRST), expected)


def test_carried_state_goes_with_the_fork(engine: Engine):
    """A recurrent predictor's, which is known where the sequence stands."""
    method = method_of(engine, "recurrent")
    source, alone = engine.start(method), engine.start(method)
    read(engine, source, PROMPT)
    fork = engine.fork(source)
    expected = read(engine, alone, PROMPT, FIRST)[len(PROMPT) :]
    assert torch.equal(read(engine, fork, FIRST), expected)
    assert torch.equal(read(engine, source, FIRST), expected)
    assert np.array_equal(fork.levels, alone.levels)
    for sequence in (source, fork, alone):
        sequence.close()


def test_what_cannot_be_forked(engine: Engine):
    recurrent = engine.start(method_of(engine, "recurrent"))
    read(engine, recurrent, PROMPT)
    with pytest.raises(VesicleError, match="fork after all 41 tokens, not after 40"):
        engine.fork(recurrent, 40)
    with pytest.raises(VesicleError, match="42 tokens are to be shared; allowed: 0 to 41"):
        engine.fork(plain := read_all(engine), 42)
    with pytest.raises(VesicleError, match="of another engine"):
        Engine.from_model(tiny_model("llama")).fork(plain)
    plain.close()
    recurrent.close()
    with pytest.raises(VesicleError, match="the sequence is closed"):
        engine.fork(plain)


def read_all(engine: Engine) -> Sequence:
    sequence = engine.start()
    read(engine, sequence, PROMPT)
    return sequence


def test_a_fork_that_does_not_fit_takes_nothing():
    engine = Engine.from_model(tiny_model("llama"))
    tight = Engine.from_model(
        tiny_model("llama"),
        kv_capacity=4 * engine.shape.n_layers * engine.pool.bytes_per_block,
    )
    source = read_all(tight)
    first, used = tight.fork(source), tight.pool.blocks_in_use
    with pytest.raises(CacheFullError, match="3 blocks needed, 0 of 12 free"):
        tight.fork(source)
    assert tight.pool.blocks_in_use == used
    first.close()
    source.close()
