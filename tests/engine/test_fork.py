"""A forked sequence is one that has read everything itself, and its source never notices."""

import importlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vesicle
from tests.engine.caching import heads_of
from tests.engine.decoding import IDS, method_for, native
from tests.tiny import random_plan, tiny_control, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Sequence
from vesicle.errors import CacheFullError, VesicleError
from vesicle.evaluation.execution.language_modelling import Together
from vesicle.plan import (
    FFN_SKIP,
    Author,
    Dense,
    Method,
    Replay,
    Rows,
)
from vesicle.predictors import CONTROLS
from vesicle.shapes import ModelShape

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
        return Replay(plan, modulator.stand_ins)
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
        kv_capacity=4 * heads_of(engine) * engine.pool.bytes_per_block,
    )
    source = read_all(tight)
    first, used = tight.fork(source), tight.pool.blocks_in_use
    with pytest.raises(CacheFullError, match="6 blocks needed, 0 of 24 free"):
        tight.fork(source)
    assert tight.pool.blocks_in_use == used
    first.close()
    source.close()


class Alternating(Method):
    """Skips FFNs by a count of the tokens that it has seen, which is all its state."""

    def author(self, shape: ModelShape) -> Author:
        return Counting(shape)


class Counting(Author):
    def __init__(self, shape: ModelShape) -> None:
        self.shape, self.seen = shape, [0]

    def attention(self, layer: int, positions: Any, rows: Rows) -> None:
        return None

    def ffn(self, layer: int, hidden: Tensor, positions: Any, rows: Rows) -> None:
        if layer == 0:
            self.seen += range(self.seen[-1] + 1, self.seen[-1] + len(positions) + 1)
        rows["ffn"][np.array(self.seen[-len(positions) :]) % 3 == 1] = FFN_SKIP


class ForkingCounting(Counting):
    def fork(self, n_tokens: int) -> Author:
        other = ForkingCounting(self.shape)
        other.seen = self.seen[: n_tokens + 1]
        return other


class Forking(Alternating):
    def author(self, shape: ModelShape) -> Author:
        return ForkingCounting(shape)


def test_an_author_of_ones_own_is_not_forked_unasked(engine: Engine):
    """Its state was dropped: the fork's author began anew."""
    with closing(engine.start(Alternating())) as source:
        read(engine, source, PROMPT)
        used = engine.pool.blocks_in_use
        with pytest.raises(VesicleError, match=r"a sequence under Counting cannot be forked; give"):
            engine.fork(source)
        assert engine.pool.blocks_in_use == used


@pytest.mark.parametrize("n", [16, 19, 41])
def test_an_author_of_ones_own_that_can_be_forked(engine: Engine, n: int):
    source, alone = engine.start(Forking()), engine.start(Forking())
    read(engine, source, PROMPT)
    expected = read(engine, alone, PROMPT[:n], FIRST)[n:]
    with closing(engine.fork(source, n)) as fork:
        torch.testing.assert_close(read(engine, fork, FIRST), expected)
        assert fork.plan.equals(alone.plan)
    source.close()
    alone.close()


def test_a_fork_under_several_methods_keeps_its_own(engine: Engine):
    """`Together` hands out another author each time; the fork had the next one's."""
    modulator = tiny_modulator(engine.shape)
    together = Together([modulator.at(0.5), modulator.at(0.9)])
    source, alone = engine.start(together), engine.start(modulator.at(0.5))
    read(engine, source, PROMPT)
    expected = read(engine, alone, PROMPT, FIRST)[len(PROMPT) :]
    with closing(engine.fork(source)) as fork:
        assert torch.equal(read(engine, fork, FIRST), expected)
        assert fork.plan.equals(alone.plan)
    source.close()
    alone.close()


def test_every_author_of_the_package_can_be_forked():
    for path in sorted(Path(vesicle.__file__).parent.rglob("*.py")):
        if "Author)" in path.read_text(encoding="utf-8"):
            name = ".".join(
                path.relative_to(Path(vesicle.__file__).parents[1]).with_suffix("").parts
            )
            importlib.import_module(name)
    found, queue = list[type[Author]](), [Author]
    while queue:
        for kind in queue.pop().__subclasses__():
            queue.append(kind)
            if kind.__module__.startswith("vesicle."):
                found.append(kind)
    assert len(found) >= 3
    assert [kind for kind in found if kind.fork is Author.fork] == []


@pytest.mark.parametrize("kind", [*KINDS, "recurrent"])
def test_prompts_go_with_the_fork(engine: Engine, kind: str):
    """What was said to be prompt and not read yet is the source's alone."""
    method = method_of(engine, kind)
    source, alone = engine.start(method), engine.start(method)
    for sequence in (source, alone):
        sequence.begin_prompt(len(PROMPT))
        read(engine, sequence, PROMPT)
    with closing(engine.fork(source)) as fork:
        for sequence in (fork, alone):
            sequence.begin_prompt(len(FIRST))
        assert torch.equal(read(engine, fork, FIRST), read(engine, alone, FIRST))
        assert fork.plan.equals(alone.plan)
        np.testing.assert_array_equal(fork.phase("prompt"), alone.phase("prompt"))
        np.testing.assert_array_equal(fork.levels, alone.levels)
    read(engine, source, SECOND)
    source.close()
    alone.close()
