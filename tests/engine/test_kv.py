"""The engine over its cache: number formats, eviction, a full pool, sequences that end."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.caching import drop_blocks, heads_of
from tests.tiny import random_plan, tiny_model, tiny_modulator
from vesicle.cost import price
from vesicle.engine import Engine, Sequence
from vesicle.engine.pool import block_bytes
from vesicle.errors import CacheFullError, VesicleError
from vesicle.plan import Dense, Method, Plan, Replay

CLOSE = {"fp32": 0.0, "fp16": 4e-3, "bf16": 3e-2, "int8": 6e-2}
"""Mean difference of logits about 2 in size from those over fp32 keys and values: a
number is rounded by up to 1/2048 or 1/256 of itself, in int8 by 1/254 of the largest of its row,
and three layers of large random weights add that up. About twice what is measured."""
FP64 = 5e-5
"""As in tests/parity: norms and phases of transformers are fp32 in an fp64 model."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def executed(
    engine: Engine, ids: Tensor, method: Method, cuts: tuple[int, ...] = (40, 41)
) -> tuple[Tensor, Sequence]:
    sequence, row = engine.start(method), ids[0].tolist()
    pieces = [
        engine.forward([(sequence, row[start:stop])], logits="all")[0]
        for start, stop in zip((0, *cuts), (*cuts, len(row)), strict=True)
    ]
    return torch.cat(pieces), sequence


def blocks_plan(engine: Engine) -> Plan:
    """Rest, but for how many blocks are read."""
    varied = random_plan(engine.shape, 70, np.random.default_rng(3))
    return Plan.rest(engine.shape, 70).with_fields(kv_blocks=varied.kv_blocks)


@pytest.mark.parametrize("summary", ["mean", "bounds", "dense"])
@pytest.mark.parametrize("kv", CLOSE)
def test_every_format_is_close_to_fp32_and_priced_as_counted(kv: str, summary: str, ids: Tensor):
    model = tiny_model("llama", dtype=torch.float32)
    exact, engine = Engine.from_model(model), Engine.from_model(model, kv=kv)
    method: Method = Dense()
    if summary != "dense":
        stand_ins = tiny_modulator(exact.shape, summary=summary).stand_ins
        method = Replay(blocks_plan(exact), stand_ins)
    expected, _ = executed(exact, ids, method)
    logits, sequence = executed(engine, ids, method)
    # The mean, because rounding a summary may change which block is read, once in a while.
    difference = (logits - expected).abs()
    assert difference.mean() <= CLOSE[kv], (difference.mean(), difference.max())
    assert (difference.max() > 0) == (kv != "fp32")
    assert sequence.cost == price(sequence.plan, engine.shape, method.overhead(engine.shape))
    held = 70 * engine.shape.n_layers * engine.shape.position_bytes
    assert sequence.cost.kv_bytes_held == held


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_chosen_blocks_run_natively_in_every_format(kv: str, ids: Tensor):
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32), kv=kv)
    method = Replay(blocks_plan(engine))
    first, a = executed(engine, ids, method)
    engine._native = None
    second, b = executed(engine, ids, method)
    assert (first - second).abs().max() < 2e-3
    assert a.cost == b.cost


def without(sequence: Sequence, blocks: list[int]) -> None:
    for layer in range(sequence.cache.n_layers):
        drop_blocks(sequence.cache, layer, blocks)


def test_a_token_after_eviction_sees_what_is_left(ids: Tensor):
    """Against the model under a mask: what stays keeps its position."""
    model = tiny_model("llama")
    engine = Engine.from_model(model)
    sequence = engine.start(Dense())
    row = ids[0].tolist()
    engine.forward([(sequence, row[:65])])
    before = engine.pool.blocks_in_use
    without(sequence, [1, 2])
    assert engine.pool.blocks_in_use == before - 2 * heads_of(engine)
    logits = torch.cat(
        [engine.forward([(sequence, part)], "all")[0] for part in (row[65:69], row[69:])]
    )
    mask = torch.full((70, 70), -torch.inf, dtype=torch.float64).triu(1)
    mask[65:, 16:48] = -torch.inf
    expected = model(ids, attention_mask=mask[None, None]).logits[0, 65:]
    assert (logits - expected).abs().max() < FP64
    held = (70 - 32) * engine.shape.n_layers * engine.shape.position_bytes
    assert sequence.cost.kv_bytes_held == held
    visited = sequence.token_costs["kv_bytes_read"][-1]
    assert visited == held


@pytest.mark.parametrize("native", [True, False])
def test_blocks_are_chosen_among_those_held(ids: Tensor, native: bool):
    """Evicted are those that would not have been read: nothing changes but the summaries read."""
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32))
    if not native:
        engine._native = None
    rest = Plan.rest(engine.shape, 70)
    blocks = rest.kv_blocks.copy()
    blocks[69] = 2  # the first and the query's own
    row, logits, read = ids[0].tolist(), [], []
    for evicted, count in (([], 2), ([1, 3], 2), ([1, 2, 3], 2), ([1, 2, 3], 5)):
        blocks[69] = count
        sequence = engine.start(Replay(rest.with_fields(kv_blocks=blocks.copy())))
        engine.forward([(sequence, row[:69])])
        without(sequence, evicted)
        logits += engine.forward([(sequence, row[69:])])
        read.append(int(sequence.token_costs["kv_bytes_read"][-1]))
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() < 1e-4
    shape = engine.shape
    summary = heads_of(engine) * shape.summary_vector_bytes
    assert [a - read[-1] for a in read] == [4 * summary, 2 * summary, 0, 0]


def test_a_full_pool_refuses_before_anything_is_touched(ids: Tensor):
    model, row = tiny_model("llama"), ids[0].tolist()
    shape = Engine.from_model(model).shape
    engine = Engine.from_model(model, kv_capacity=6 * 6 * block_bytes(shape, "fp64"))
    expected = executed(engine, ids, Dense())[0]
    a, b = engine.start(), engine.start()
    (first,) = engine.forward([(a, row[:40])], "all")
    engine.forward([(b, row[:20])])
    used, plan = engine.pool.blocks_in_use, a.plan
    line = "the KV cache is full: 18 blocks needed, 6 of 36 free; close sequences, or raise kv_cap"
    with pytest.raises(CacheFullError, match=line):
        engine.forward([(b, row[20:32]), (a, row[40:]), (engine.start(), [1])])
    assert engine.pool.blocks_in_use == used
    assert a.plan.equals(plan)
    (again,) = engine.forward([(b, row[20:32])])
    assert (again - expected[31]).abs().max() < FP64
    b.close()
    (second,) = engine.forward([(a, row[40:])], "all")
    assert (torch.cat([first, second]) - expected).abs().max() < FP64


def test_a_pass_that_breaks_off_leaves_the_cache_as_it_was(ids: Tensor):
    engine, row = Engine.from_model(tiny_model("llama")), ids[0].tolist()
    expected, _ = executed(engine, ids, Dense())
    sequence = engine.start()
    engine.forward([(sequence, row[:20])])
    run, calls = engine._activation, []

    def breaks(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(x)

    engine._activation = breaks
    with pytest.raises(KeyboardInterrupt):
        engine.forward([(sequence, row[:50])])
    assert sequence.length == 20
    (last,) = engine.forward([(sequence, row[20:])])
    assert (last - expected[-1]).abs().max() < FP64


def test_a_closed_sequence_keeps_its_record_and_frees_its_blocks(ids: Tensor):
    engine = Engine.from_model(tiny_model("llama"))
    _, sequence = executed(engine, ids, Dense())
    flops, used = sequence.cost.flops_total, engine.pool.bytes_in_use
    assert used == 5 * heads_of(engine) * engine.pool.bytes_per_block
    sequence.close()
    sequence.close()
    assert engine.pool.bytes_in_use == 0
    assert sequence.cost.flops_total == flops
    assert sequence.cost.kv_bytes_held == 0
    assert sequence.length == sequence.plan.n_tokens == 70
    with pytest.raises(VesicleError, match="the sequence is closed; start a new one"):
        engine.forward([(sequence, [1])])


def test_dropped_sequences_free_their_blocks():
    engine = Engine.from_model(tiny_model("llama"))
    for _ in range(3):
        engine.generate([1, 2, 3] * 10, max_new_tokens=8)
    stream = engine.stream(engine.start(), [1, 2, 3], max_new_tokens=8)
    next(stream)
    assert engine.pool.blocks_in_use == heads_of(engine)
    stream.close()
    del stream
    gc.collect()
    assert engine.pool.blocks_in_use == 0


@pytest.mark.parametrize(
    ("options", "kv"),
    [
        ({"dtype": torch.float32}, "fp32"),
        ({"dtype": torch.float64}, "fp64"),
        ({"dtype": torch.bfloat16}, "bf16"),
        ({"weights": "int8"}, "fp16"),
        ({"weights": "int8", "kv": "int8"}, "int8"),
    ],
    ids=str,
)
def test_the_default_format_goes_with_the_weights(options: dict[str, Any], kv: str, ids: Tensor):
    engine = Engine.from_model(tiny_model("llama", dtype=torch.float32), **options)
    assert engine.pool.kv == kv
    assert engine.shape.kv_bytes == engine.config.shape.kv_bytes == engine.pool.keys.itemsize
    executed(engine, ids, Dense())


def test_options_from_a_folder(tmp_path: Path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    before = torch.get_num_threads()
    try:
        engine = Engine.from_pretrained(tmp_path, kv="int8", kv_capacity=1 << 20, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    pool = engine.pool
    assert pool.kv == "int8"
    assert pool.capacity == (1 << 20) // pool.bytes_per_block
    for options, line in (
        ({"kv": "fp8"}, "kv is 'fp8'; allowed: fp64, fp32, bf16, fp16, int8"),
        ({"threads": 0}, "threads is 0; allowed: 1 to 512"),
        ({"kv_capacity": 100}, "kv_capacity is 100 bytes; allowed: at least"),
    ):
        with pytest.raises(VesicleError, match=line):
            Engine.from_pretrained(tmp_path, **options)


def test_a_sequence_given_twice_is_refused():
    engine = Engine.from_model(tiny_model("llama"))
    sequence = engine.start()
    with pytest.raises(VesicleError, match="given twice"):
        engine.forward([(sequence, [1]), (sequence, [2])])
