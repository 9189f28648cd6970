"""The share of the dense model's work: exactly 1 at rest, whatever was asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.decoding import IDS, native
from tests.tiny import tiny_model, tiny_modulator, tokens
from vesicle.cost import Cost, price, price_dense
from vesicle.engine import Engine, Sampling, Sequence
from vesicle.engine.scheduler import Finished, Request, Scheduler
from vesicle.plan import Method, Plan, Replay
from vesicle.retention import Retention

PROMPT = IDS[:37]
ENGINES: dict[str, Callable[[], Engine]] = {
    "general": lambda: Engine.from_model(tiny_model("llama")),
    "native": lambda: native("fp32"),
    "packed": lambda: native("int8", "int8"),
    "neox": lambda: Engine.from_model(tiny_model("gpt_neox_parallel")),
}
MADE: dict[str, Engine] = {}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param not in MADE:
        MADE[request.param] = ENGINES[request.param]()
    return MADE[request.param]


def at_rest(engine: Engine, kind: str) -> Method | None:
    if kind == "replay":
        return Replay(Plan.rest(engine.shape, 120))
    if kind == "modulator":
        return tiny_modulator(engine.shape, dtype=torch.float32).at(1.0)
    return None


def whole(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    sequence = engine.start(method)
    engine.forward([(sequence, PROMPT)], logits)
    return sequence


def chunks(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    sequence = engine.start(method)
    for start in range(0, len(PROMPT), 5):
        engine.forward([(sequence, PROMPT[start : start + 5])], logits)
    return sequence


def single(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    sequence = engine.start(method)
    for token in PROMPT:
        engine.forward([(sequence, [token])], logits)
    return sequence


def batch(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    sequence, other = engine.start(method), engine.start()
    engine.forward([(other, PROMPT[:3]), (sequence, PROMPT)], logits)
    engine.forward([(other, PROMPT[:1]), (sequence, PROMPT[:1])], logits)
    return sequence


def forked(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    fork = engine.fork(whole(engine, method, logits))
    engine.forward([(fork, PROMPT[:9])], logits)
    again = engine.fork(fork, 40)
    engine.forward([(again, PROMPT[:3])], logits)
    engine.forward([(again, PROMPT[:1])], logits)
    return again


def generated(engine: Engine, method: Method | None, logits: Any) -> Sequence:
    sampling = Sampling(temperature=0.8, seed=2) if logits == "all" else None
    return engine.generate(PROMPT, method, max_new_tokens=12, sampling=sampling, stop=()).sequence


@pytest.mark.parametrize("kind", ["dense", "replay", "modulator"])
@pytest.mark.parametrize("logits", ["last", "all", "none"])
@pytest.mark.parametrize("way", [whole, chunks, single, batch, forked, generated])
def test_rest_is_exactly_the_dense_model(engine: Engine, way: Any, logits: str, kind: str):
    sequence = way(engine, at_rest(engine, kind), logits)
    assert sequence.share == 1.0
    assert sequence.cost == sequence.dense_cost
    assert set(sequence.cost.ratio(sequence.dense_cost).values()) == {1.0}
    own = sequence.token_shares[sequence.taken_over :]
    assert (own == 1.0).all()
    for name, values in sequence.token_costs.items():
        np.testing.assert_array_equal(sequence.dense_token_costs[name], values, err_msg=name)


@pytest.mark.parametrize("prefix_bytes", [0, None])
def test_rest_is_exactly_the_dense_model_under_a_scheduler(
    engine: Engine, prefix_bytes: int | None
):
    scheduler = Scheduler(engine, chunk=16, prefix_bytes=prefix_bytes)
    for method in (None, at_rest(engine, "modulator"), at_rest(engine, "replay")):
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            for tail in ([], PROMPT[:20]):
                scheduler.add(
                    Request(
                        prompt=PROMPT + tail,
                        method=method,
                        max_new_tokens=9,
                        sampling=sampling,
                        stop=(),
                    )
                )
    ends = [event for event in scheduler.run() if isinstance(event, Finished)]
    scheduler.close()
    assert len(ends) == 12
    assert any(end.reused_tokens for end in ends) == (prefix_bytes is None)
    for end in ends:
        assert end.sequence.share == 1.0
        assert end.cost == end.sequence.dense_cost


def test_the_readme_example_at_rest():
    """It priced the head at every position, and printed 0.86."""
    engine = MADE.setdefault("general", ENGINES["general"]())
    generation = engine.generate(PROMPT, max_new_tokens=8)
    every = generation.cost.ratio(price_dense(engine.shape, generation.sequence.length))
    assert every["flops"] < 1
    assert generation.share == 1.0


def test_a_share_is_executed_over_dense(engine: Engine):
    method = tiny_modulator(engine.shape, dtype=torch.float32).at(0.6)
    sequence = engine.generate(PROMPT, method, max_new_tokens=20, stop=()).sequence
    ran = np.arange(sequence.length) >= len(PROMPT) - 1
    assert sequence.dense_cost == price_dense(engine.shape, sequence.length, with_logits=ran)
    assert sequence.cost == price(
        sequence.plan,
        engine.shape,
        sequence.overhead,
        with_logits=ran,
        released=sequence.released,
    )
    assert sequence.share == sequence.cost.flops_total / sequence.dense_cost.flops_total < 1


def test_shares_of_some_tokens(engine: Engine):
    """The prompt's and the answer's; together they are all."""
    method = tiny_modulator(engine.shape, dtype=torch.float32).at(0.6)
    sequence = engine.generate(PROMPT, method, max_new_tokens=20, stop=()).sequence
    parts = [sequence.phase("prompt"), sequence.phase("generated")]
    shares = [
        sequence.cost_of(p).flops_total / sequence.dense_cost_of(p).flops_total for p in parts
    ]
    assert shares[0] == 1.0  # at rest by default
    assert shares[1] < 1
    assert (sequence.token_shares[parts[0]] == 1).all()
    together = sequence.dense_cost_of(parts[0]) + sequence.dense_cost_of(parts[1])
    assert together.flops_total == sequence.dense_cost.flops_total


def test_what_a_fork_took_over_counts_in_neither(engine: Engine):
    method = tiny_modulator(engine.shape, dtype=torch.float32).at(0.6)
    source = whole(engine, method, "all")
    fork = engine.fork(source, 20)
    assert fork.share == 1.0
    assert fork.cost.flops_total == fork.dense_cost.flops_total == 0
    engine.forward([(fork, PROMPT[20:30])], "none")
    expected = price_dense(
        engine.shape, 10, first_position=20, with_logits=np.zeros(10, bool)
    ).flops_total
    assert fork.dense_cost.flops_total == expected
    assert np.isnan(fork.token_shares[:20]).all()
    assert not fork.token_costs["flops_linear"][:20].any()
    assert fork.share == fork.cost.flops_total / expected


def test_the_dense_cache_is_whole():
    """Where entries are forgotten, the dense model holds and reads them still."""
    engine = MADE.setdefault("general", ENGINES["general"]())
    shape = engine.shape
    kept = [[np.arange(16)] * shape.n_kv_heads] * shape.n_layers
    sequence = engine.start(Retention(kept, at=64))
    engine.forward([(sequence, tokens(80)[0].tolist())])
    dense = sequence.dense_cost
    assert dense.kv_bytes_held == shape.n_layers * 80 * shape.position_bytes
    assert sequence.cost.kv_bytes_held < dense.kv_bytes_held
    assert sequence.cost.kv_bytes_read < dense.kv_bytes_read
    assert dense == price_dense(shape, 80, with_logits=np.arange(80) == 79)


def test_before_the_first_token(engine: Engine):
    sequence = engine.start()
    assert sequence.share == 1.0
    assert sequence.cost == sequence.dense_cost == Cost()
    assert len(sequence.token_shares) == 0
