"""What is forgotten is gone: the engine's smaller cache against the reference's hidden keys."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, beside, modulator_for, native
from tests.parity.test_engine import FP32, FP64, SAME, close, counted, executed, reference
from tests.tiny import DECIDED, random_plan, shape_of, tiny_modulator, tokens
from vesicle.cost import kv_bytes_peak, price
from vesicle.engine import Engine, Sequence
from vesicle.families import cache_argument, find_cache
from vesicle.plan import FOREVER, Dense, Method, Plan, Replay
from vesicle.plan.events import evict_after_of
from vesicle.reference.attach import attach
from vesicle.retention import Retention
from vesicle.shapes import ModelShape

pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


def random_kept(
    shape: ModelShape, at: int, rng: np.random.Generator, most: float = 0.6
) -> list[list[np.ndarray]]:
    """Different entries in each layer and KV head, and different numbers of them."""
    return [
        [
            rng.permutation(at)[: rng.integers(0, int(most * at) + 1)]
            for _ in range(shape.n_kv_heads)
        ]
        for _ in range(shape.n_layers)
    ]


def forgetful_plan(shape: ModelShape, t: int, rng: np.random.Generator) -> Plan:
    """Every field varied, and entries forgotten at three times."""
    evict_after = np.full((t, shape.n_layers, shape.n_kv_heads), FOREVER, np.int32)
    for length in (19, 40, 41):
        complete = length // 16 * 16
        for layer in range(shape.n_layers):
            n = 16 * int(rng.integers(0, complete // 16))
            for head in range(shape.n_kv_heads):
                held = np.nonzero(evict_after[:complete, layer, head] == FOREVER)[0]
                gone = rng.permutation(held)[: min(n, len(held) // 16 * 16)]
                evict_after[gone, layer, head] = length - 1
    plan = random_plan(shape, t, rng).with_fields(evict_after=evict_after)
    plan.check(shape)
    return plan


CUTS = {
    "whole": (),
    "at": (50,),
    "chunks": (1, 17, 48, 64),
    "tokens": tuple(range(1, 70)),
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("at", [5, 48, 50, 69])
def test_execution(llama: Any, ids: Tensor, rng: np.random.Generator, cuts, at: int):
    """However the prompt is cut, and wherever the eviction falls in a block."""
    engine = Engine.from_model(llama)
    method = Retention(random_kept(engine.shape, at, rng), at)
    logits, sequence = executed(engine, ids, method, cuts)
    expected, plan = reference(llama, ids, method)
    close(logits, expected, FP64)
    assert sequence.plan.equals(plan)
    assert (sequence.plan.evict_after[:at] == method.evict_after(engine.shape)).all()
    plan.check(engine.shape)
    counted(sequence, engine)
    assert sequence.kv_bytes_peak == kv_bytes_peak(sequence.plan, engine.shape)
    if at in (48, 50):
        assert (logits[at:] - llama(ids).logits[0, at:]).abs().mean() > 0.01


def test_every_family(model: Any, ids: Tensor, rng: np.random.Generator):
    engine = Engine.from_model(model)
    method = Retention(random_kept(engine.shape, 53, rng), 53)
    logits, sequence = executed(engine, ids, method, (30,))
    close(logits, reference(model, ids, method)[0], FP64)
    counted(sequence, engine)
    assert sequence.plan.forgets == (0 in engine.shape.layer_windows)  # others have their windows


def test_before_the_eviction_nothing_differs(llama: Any, ids: Tensor, rng: np.random.Generator):
    engine = Engine.from_model(llama)
    kept = random_kept(engine.shape, 50, rng)
    logits, _ = executed(engine, ids, Retention(kept, 50), (50,))
    assert torch.equal(logits[:50], executed(engine, ids, Dense(), (50,))[0][:50])
    later, sequence = executed(engine, ids, Retention(random_kept(engine.shape, 71, rng), 71))
    assert torch.equal(later, executed(engine, ids, Dense())[0])
    assert sequence.cache.length == 70
    counted(sequence, engine)


@pytest.mark.parametrize("make", [Engine.from_model, None], ids=["engine", "reference"])
def test_keeping_everything_is_dense_bit_for_bit(llama: Any, ids: Tensor, make):
    shape = shape_of(llama)
    every = [[np.arange(50)] * shape.n_kv_heads] * shape.n_layers
    method = Retention(every, 50)
    if make is None:
        assert torch.equal(reference(llama, ids, method)[0], llama(ids).logits[0])
        return
    engine = make(llama)
    logits, sequence = executed(engine, ids, method, (50, 51))
    dense, other = executed(engine, ids, Dense(), (50, 51))
    assert torch.equal(logits, dense)
    assert sequence.plan.equals(other.plan)
    assert sequence.cost == other.cost


@pytest.mark.parametrize("t", [16, 49, 60])
def test_causal(llama: Any, ids: Tensor, rng: np.random.Generator, t: int):
    engine = Engine.from_model(llama)
    inner = tiny_modulator(engine.shape, "recurrent", ladder=True).at(0.6)
    method = Retention(random_kept(engine.shape, 50, rng), 50, inner)
    other = ids.clone()
    other[:, t + 1 :] = tokens(69 - t, seed=8)
    (a, first), (b, second) = (executed(engine, x, method) for x in (ids, other))
    assert first.plan.tokens(0, t + 1).equals(second.plan.tokens(0, t + 1))
    close(a[: t + 1], b[: t + 1], SAME)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_together_with_a_modulator(
    llama: Any, ids: Tensor, rng: np.random.Generator, cuts, summary: str
):
    """Blocks are chosen among what is left, by both executors alike."""
    engine = Engine.from_model(llama)
    inner = tiny_modulator(engine.shape, ladder=True, summary=summary, bypass_below=0.2).at(0.6)
    method = Retention(random_kept(engine.shape, 50, rng), 50, inner)
    logits, sequence = executed(engine, ids, method, cuts)
    expected, plan = reference(llama, ids, method)
    assert sequence.plan.equals(plan)
    close(logits, expected, FP64)
    counted(sequence, engine)
    assert sequence.levels.shape == (70, 3, 5)
    assert (plan.kv_blocks < Plan.rest(engine.shape, 70).kv_blocks).any()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_replayed_plan_forgets_again(llama: Any, ids: Tensor, tmp_path, cuts):
    """Several evictions, saved and read back, with every other field varied."""
    engine, rng = Engine.from_model(llama), np.random.default_rng(5)
    forgetful_plan(engine.shape, 70, rng).save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    method = Replay(plan, tiny_modulator(engine.shape).stand_ins)
    logits, sequence = executed(engine, ids, method, cuts)
    close(logits, reference(llama, ids, method)[0], FP64)
    assert sequence.plan.equals(plan)
    counted(sequence, engine)
    assert sequence.kv_bytes_peak == kv_bytes_peak(plan, engine.shape)


def check_a_padded_batch(llama: Any, method: Method) -> None:
    """In the reference, in two passes: each row is its own sequence."""
    rows = [tokens(70, seed=1), tokens(61, seed=2)]
    padded = torch.zeros(2, 70, dtype=torch.long)
    for row, text in enumerate(rows):
        padded[row, 70 - text.shape[1] :] = text
    mask = (padded != 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(llama, method) as run:
        first = llama(padded[:, :55], attention_mask=mask[:, :55], position_ids=places[:, :55])
        second = llama(
            padded[:, 55:],
            attention_mask=mask,
            position_ids=places[:, 55:],
            **cache_argument(llama, find_cache(first)),
        )
    logits = torch.cat([first.logits, second.logits], dim=1)
    for row, (text, plan) in enumerate(zip(rows, run.plans, strict=True)):
        alone, expected = reference(llama, text, method)
        assert plan.equals(expected)
        close(logits[row, 70 - text.shape[1] :], alone, SAME)


def test_a_batch_in_the_reference(llama: Any, rng: np.random.Generator):
    check_a_padded_batch(llama, Retention(random_kept(shape_of(llama), 40, rng), 40))


def modulated(engine: Engine) -> Method:
    return modulator_for(engine.shape, "stand-ins").at(0.6)


INNER: dict[str, Callable[[Engine], Method]] = {
    "dense": lambda engine: Dense(),
    "replay": lambda engine: Replay(
        random_plan(engine.shape, len(IDS), np.random.default_rng(3)).with_fields(
            bits=np.full((len(IDS), engine.shape.n_layers, 4), 16, np.int32),
        ),
        modulator_for(engine.shape, "stand-ins").stand_ins,
    ),
    "modulator": modulated,
}


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("fp32", "int8"), ("int4", "fp16")])
def test_native_decoding(weights: str, kv: str, kind: str, rng: np.random.Generator):
    """Token by token, each from the same cache: the core against the general path."""
    engine = native(weights, kv)
    other = beside(engine, weights)
    method = Retention(random_kept(engine.shape, 67, rng), 67, INNER[kind](engine))
    sequence = engine.start(method)
    assert engine._native.reach(sequence)
    engine.forward([(sequence, IDS[:60])], "none")
    far = 0
    for token in IDS[60:110]:
        twin = twin_of(other, sequence)
        (expected,), (logits,) = (
            other.forward([(twin, [token])]),
            engine.forward([(sequence, [token])]),
        )
        same = all(
            (getattr(twin.plan, name)[-1] == getattr(sequence.plan, name)[-1]).all()
            for name in DECIDED
        )
        assert same or kind == "modulator"  # a level may round to the other side of a threshold
        far += not same or bool((logits - expected).abs().max() > 1e-3 * expected.abs().max())
        for name, values in twin.token_costs.items():
            assert not same or values[-1] == sequence.token_costs[name][-1], name
        twin.close()
        ends = evict_after_of(sequence.plan.events, sequence.length, 4, engine.shape.n_kv_heads)
        stays = np.broadcast_to(ends >= sequence.length, (*ends.shape[:2], engine.shape.n_kv_heads))
        held = stays.sum(0)
        assert engine.pool.blocks_in_use == (-(-held // 16)).sum()
    # One channel or block nearly equal to another may be swapped by a rounding.
    assert far <= 3
    asked = np.arange(110) >= 60
    counted_with(sequence, engine, asked)


def twin_of(engine: Engine, sequence: Sequence) -> Sequence:
    twin = engine.start(sequence.method)
    twin.cache = sequence.cache.fork(sequence.length)
    twin.await_eviction()
    return twin


def counted_with(sequence: Sequence, engine: Engine, asked: np.ndarray) -> None:
    cost = price(sequence.plan, engine.shape, sequence.overhead, with_logits=asked)
    assert sequence.cost == cost


@pytest.mark.parametrize("inner", INNER)
def test_a_ragged_batch(inner: str, rng: np.random.Generator):
    """Sequences that forget at different lengths, or never, in one pass: as each alone."""
    engine = native("fp32")
    methods: list[Method] = [
        Retention(random_kept(engine.shape, at, rng), at, INNER[inner](engine))
        for at in (20, 33, 47)
    ]
    methods.append(Dense())
    alone = []
    for method in methods:
        sequence = engine.start(method)
        parts = [
            engine.forward([(sequence, IDS[a:b])], "all")[0] for a, b in pairwise((0, 30, 31, 60))
        ]
        alone.append((torch.cat(parts), sequence))
    sequences = [engine.start(method) for method in methods]
    parts = [
        engine.forward([(s, IDS[a:b]) for s in sequences], "all")
        for a, b in pairwise((0, 30, 31, 60))
    ]
    for i, (expected, single) in enumerate(alone):
        close(torch.cat([part[i] for part in parts]), expected, FP32)
        assert sequences[i].cost == single.cost
        assert sequences[i].plan.equals(single.plan)


def test_the_last_logits_are_those_of_all(llama: Any, ids: Tensor, rng: np.random.Generator):
    """A chunk that is cut at an eviction gives what was asked for, and counts no more heads."""
    engine = Engine.from_model(llama)
    method = Retention(random_kept(engine.shape, 40, rng), 40)
    every, _ = executed(engine, ids, method)
    row = ids[0].tolist()
    last, likely, none = (engine.start(method) for _ in range(3))
    (logits,) = engine.forward([(last, row)])
    close(logits, every[-1:], SAME)
    assert engine.likeliest([(likely, row)]) == [int(every[-1].argmax())]
    assert engine.forward([(none, row)], "none")[0].shape == (0, engine.shape.vocabulary)
    assert likely.cost == last.cost
    assert last.cost.flops_head == 2 * 48 * 97


def test_generate_and_stream(llama: Any, rng: np.random.Generator):
    """An eviction in the middle of a prompt's chunk, and one in the middle of writing."""
    engine, prompt = Engine.from_model(llama), tokens(40)
    for at in (30, 40, 47):
        method = Retention(random_kept(engine.shape, at, rng), at)
        with attach(llama, method) as run:
            text = llama.generate(prompt, max_new_tokens=20, do_sample=False)
        new, sequence = engine.generate(prompt[0].tolist(), method, max_new_tokens=20)
        assert new == text[0, 40:].tolist()
        assert sequence.plan.equals(run.plan)
