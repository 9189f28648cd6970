"""A NAMM at work in the engine: what it holds, what it costs, and that text cuts do not matter."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.decoding import native
from tests.parity.test_engine import counted
from vesicle.cost import kv_bytes_peak
from vesicle.engine import Engine, core
from vesicle.errors import VesicleError
from vesicle.eviction import SinksAndRecent
from vesicle.namm import Namm, NammMemory, NammSettings
from vesicle.namm.allotment import allot
from vesicle.namm.gates import width_of
from vesicle.namm.method import best
from vesicle.plan import Replay
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape

SETTINGS = NammSettings(network="bam", hidden=4, interval=32, observes=32, sinks=2, recent=16)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def drawn(shape: ModelShape, seed: int = 0, scores: str = "network", **settings: Any) -> Namm:
    """One whose network prefers something, or its gates, or `both`."""
    rng = np.random.default_rng(seed)
    made = NammSettings(**{**SETTINGS.__dict__, **settings})
    size = shape.n_layers, shape.n_kv_heads
    namm = Namm(
        settings=made,
        parameters=rng.normal(size=made.n_parameters).astype(np.float32),
        profile=rng.normal(size=size).astype(np.float32),
    )
    if scores == "gates":
        namm = replace(namm, parameters=np.zeros_like(namm.parameters))
    if scores != "network":
        gates = rng.normal(size=(*size, width_of(shape.head_size)))
        ages = rng.normal(size=size).astype(np.float32)
        namm = replace(namm, gates=gates.astype(np.float32), ages=ages)
    return namm


def read(engine: Engine, method: Any, ids: list[int], cuts: tuple[int, ...] = ()) -> Any:
    sequence = engine.start(method)
    edges = [0, *cuts, len(ids)]
    logits = [engine.forward([(sequence, ids[a:b])], "all")[0] for a, b in pairwise(edges)]
    return torch.cat(logits), sequence


SCORES = ("network", "gates", "both")
IDS = np.random.default_rng(5).integers(1, 97, 150).tolist()


def held_of(sequence: Any) -> list[list[int]]:
    """(L, G) entries that KV heads hold."""
    cache = sequence.cache
    return [[len(head) for head in cache.held(layer)] for layer in range(cache.n_layers)]


def test_heads_hold_their_parts(llama: Any):
    engine = Engine.from_model(llama)
    namm = drawn(engine.shape)
    _, sequence = read(engine, NammMemory(namm, memory=0.5), IDS[:128])
    held, flat = np.array(held_of(sequence)), namm.profile.ravel()
    expected = np.zeros(held.size, int)
    for length in (32, 64, 96, 128):  # what is gone does not come back
        expected = np.minimum(expected + 32, allot(flat, 0.5 * length, length, 18))
    assert held.ravel().tolist() == expected.tolist()
    assert (held[:, 0] != held[:, 1]).any()
    assert held.sum() <= 0.5 * 128 * held.size
    for layer in range(engine.shape.n_layers):
        for head in sequence.cache.held(layer):
            assert {0, 1, *range(112, 128)} <= set(head.tolist())


def test_a_prompts_share_is_of_its_end(llama: Any):
    """A head that may hold all of a prompt loses nothing on the way, and the peak is the same."""
    engine = Engine.from_model(llama)
    n = engine.shape.n_layers
    profile = np.full((n, engine.shape.n_kv_heads), -4.0, np.float32)
    profile[1, 1] = 0
    namm = replace(Namm.fresh(SETTINGS), profile=profile)
    sequence = engine.start(NammMemory(namm, memory=0.5))
    sequence.begin_prompt(128)
    fork = None
    for i in range(0, 128, 16):
        engine.forward([(sequence, IDS[i : i + 16])], "none")
        if i == 48:
            fork = engine.fork(sequence)
    assert held_of(sequence)[1][1] == 128 > held_of(sequence)[1][0]
    whole = 128 * n * engine.shape.position_bytes
    assert sequence.kv_bytes_peak <= 0.5 * whole + 32 * n * engine.shape.position_bytes
    engine.forward([(fork, IDS[64:128])], "none")
    assert held_of(fork)[1][1] == 128
    with attach(llama, NammMemory(namm, memory=0.5), prompt_tokens=128) as run:
        llama(torch.tensor([IDS[:128]]))
    assert run.plans[0].equals(sequence.plan)


def test_without_a_share_scores_below_zero_go(llama: Any):
    engine = Engine.from_model(llama)
    profile = np.array([[1e6, 1e6], [-1e6, 1e6], [0, -1e6]], np.float32)
    keeps = Namm(settings=SETTINGS, parameters=drawn(engine.shape).parameters, profile=profile)
    _, sequence = read(engine, NammMemory(keeps), IDS[:128])
    held = held_of(sequence)
    assert held[0] == [128, 128]
    assert held[1] == [32, 128]  # 18 that always stay, in whole blocks
    assert held[2][1] == 32 <= held[2][0] <= 128


def test_one_that_prefers_nothing_holds_what_is_first_and_newest(llama: Any):
    engine = Engine.from_model(llama)
    fresh = NammMemory(Namm.fresh(SETTINGS), memory=0.5)
    _, sequence = read(engine, fresh, IDS[:128])
    _, other = read(engine, SinksAndRecent(64, sinks=2, interval=32), IDS[:128])
    assert sequence.observed is None  # it need not see anything
    for layer in range(engine.shape.n_layers):
        pairs = zip(sequence.cache.held(layer), other.cache.held(layer), strict=True)
        assert all((mine == theirs).all() for mine, theirs in pairs)


CUTS = {"chunks": (1, 17, 48, 64, 100), "tokens": tuple(range(1, 150))}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("memory", [None, 0.4])
@pytest.mark.parametrize("scores", SCORES)
def test_cuts_of_the_text_change_nothing(
    llama: Any, cuts: tuple[int, ...], memory: float | None, scores: str
):
    engine = Engine.from_model(llama)
    method = NammMemory(drawn(engine.shape, scores=scores), memory=memory)
    whole, sequence = read(engine, method, IDS)
    parts, other = read(engine, method, IDS, cuts)
    assert other.plan.equals(sequence.plan)
    assert (whole - parts).abs().max() < 1e-4


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
def test_priced_as_counted_and_replayed(weights: str, scores: str):
    engine = native(weights)
    namm = drawn(engine.shape, scores=scores, interval=48, observes=32)
    method = NammMemory(namm, memory=0.4)
    ids = (IDS * 2)[:200]
    ids = [i % engine.shape.vocabulary for i in ids]
    logits, sequence = read(engine, method, ids, (64, 65, 66, 130))
    counted(sequence, engine)
    assert (sequence.cost.flops_evidence > 0) == (scores != "gates")
    assert sequence.kv_bytes_peak == kv_bytes_peak(sequence.plan, engine.shape)
    again, replayed = read(engine, Replay(sequence.plan), ids)
    assert replayed.cache.bytes_held == sequence.cache.bytes_held
    assert (again - logits).abs().max() < 1e-3


@pytest.mark.parametrize("scores", SCORES)
def test_the_reference_decides_the_same(model: Any, scores: str):
    """In every family: partial phases, none, two kinds of them, layers with windows."""
    engine = Engine.from_model(model)
    method = NammMemory(drawn(engine.shape, scores=scores), memory=0.4)
    logits, sequence = read(engine, method, IDS)
    with attach(model, method) as run:
        expected = model(torch.tensor([IDS])).logits[0]
    assert run.plans[0].equals(sequence.plan)
    assert run.cost == sequence.cost
    assert (logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
@pytest.mark.skipif(not core.available(), reason="the native core is not built here")
def test_gates_see_keys_without_their_phases(kv: str):
    """What the same tokens give at the beginning of a text, wherever they stand in the cache."""
    engine = native("fp32", kv=kv)
    seen: list[tuple[Any, ...]] = []
    for first in (0, 64):
        ids = [i % engine.shape.vocabulary for i in IDS[: first + 64]]
        sequence = engine.start()
        engine.forward([(sequence, ids)], "none")
        keys, values = sequence.newest_entries(0, first + 64)
        assert keys.shape == (engine.shape.n_kv_heads, first + 64, engine.shape.head_size)
        seen.append((ids, keys, values))
    (short, *theirs), (long, *ours) = seen
    where = [(a, b) for a in range(64) for b in range(64, 128) if short[a] == long[b]]
    assert len(where) > 10
    places, others = (list(x) for x in zip(*where, strict=True))
    for mine, own in zip(ours, theirs, strict=True):  # a layer's first input is the token alone
        gap = (mine[:, others] - own[:, places]).abs().max()
        assert gap < {"fp32": 1e-4, "fp16": 0.02, "int8": 0.2}[kv] * own.abs().max()


def test_of_what_a_head_holds_the_gates_best_stay(llama: Any):
    engine = Engine.from_model(llama)
    namm = replace(drawn(engine.shape, scores="gates"), profile=np.zeros((3, 2), np.float32))
    plain = engine.start()
    engine.forward([(plain, IDS[:128])], "none")
    _, sequence = read(engine, NammMemory(namm, memory=0.5), IDS[:128], (64,))
    interval = NammMemory(namm, memory=0.5, interval=128)
    _, once = read(engine, interval, IDS[:128])
    keys, values = (x.float().numpy() for x in plain.newest_entries(1, 128))
    for head, kept in enumerate(once.cache.held(1)):
        scores = np.concatenate([keys[head], values[head], np.ones((128, 1))], 1)
        scores = scores @ namm.gates[1, head]
        scores += namm.ages[1, head] * np.log(np.arange(128, 0, -1))
        scores[[0, 1, *range(112, 128)]] = np.inf
        assert set(kept.tolist()) == set(np.argsort(-scores)[:64].tolist())
        # What was let go on the way, when less was known, is all that may differ.
        assert len(set(kept) & set(sequence.cache.held(1)[head])) >= 40


@pytest.mark.parametrize("before", [None, SinksAndRecent(80, sinks=2, interval=32)])
def test_gates_take_over_a_text_that_another_has_read(llama: Any, before: Any):
    """They are told of all that is held then, and choose among it."""
    engine = Engine.from_model(llama)
    namm = drawn(engine.shape, scores="gates")
    first = engine.start(before)
    engine.forward([(first, IDS[:96])], "none")
    fork = engine.fork(first, method=NammMemory(namm, memory=0.5))
    held = [first.cache.held(layer) for layer in range(3)]
    engine.forward([(fork, IDS[96:128])], "none")
    plain = engine.start()
    engine.forward([(plain, IDS[:96])], "none")
    keys, values = (x.float().numpy() for x in plain.newest_entries(0, 96))
    for head, kept in enumerate(fork.cache.held(0)):  # whose entries do not depend on others
        old = held[0][head]
        rows = np.concatenate([keys[head, old], values[head, old], np.ones((len(old), 1))], 1)
        scores = rows @ namm.gates[0, head] + namm.ages[0, head] * np.log(128 - old)
        scores[[i for i, p in enumerate(old) if p < 2]] = np.inf
        mine = np.isin(old, kept)
        if mine.all() or not mine.any():
            continue
        # 0.01: what rounding may turn about, and which of a word's entries stays.
        assert scores[mine].min() >= scores[~mine].max() - 0.01
    engine.forward([(fork, IDS[128:])], "none")


def test_a_fork_knows_the_gates_scores(llama: Any):
    engine = Engine.from_model(llama)
    method = NammMemory(drawn(engine.shape, scores="gates"), memory=0.4)
    _, whole = read(engine, method, IDS)
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:70])], "none")
    fork = engine.fork(sequence)
    engine.forward([(sequence, [5] * 40)], "none")
    engine.forward([(fork, IDS[70:])], "none")
    assert fork.plan.equals(whole.plan)


@pytest.mark.parametrize("n", [20, 40, 64, 70])
def test_a_fork_from_before_they_were_asked_last(llama: Any, n: int):
    """Where nothing was forgotten yet, though gates have seen what the fork has not."""
    engine = Engine.from_model(llama)
    namm = replace(drawn(engine.shape, scores="gates"), profile=np.zeros((3, 2), np.float32))
    method = NammMemory(namm, memory=0.4)

    def begun() -> Any:
        sequence = engine.start(method)
        sequence.begin_prompt(250)
        return sequence

    whole, sequence = begun(), begun()
    engine.forward([(whole, IDS)], "none")
    engine.forward([(sequence, [*IDS[:70], *[5] * 20])], "none")
    fork = engine.fork(sequence, n)
    engine.forward([(fork, IDS[n:])], "none")
    assert whole.plan.forgets
    for layer in range(engine.shape.n_layers):
        pairs = zip(fork.cache.held(layer), whole.cache.held(layer), strict=True)
        assert all((mine == theirs).all() for mine, theirs in pairs)


@pytest.mark.parametrize("prefers", [False, True])
def test_spans_stay_in_every_head_within_the_share(llama: Any, prefers: bool):
    engine = Engine.from_model(llama)
    namm = drawn(engine.shape) if prefers else Namm.fresh(SETTINGS)
    spans = [(10, 22), (40, 45)]
    _, sequence = read(engine, NammMemory(namm, memory=0.5, protects=spans), IDS[:128])
    wanted = {0, 1, *range(10, 22), *range(40, 45), *range(112, 128)}
    for layer in range(engine.shape.n_layers):
        for head in sequence.cache.held(layer):
            assert wanted <= set(head.tolist())
    whole = 128 * engine.shape.n_layers * engine.shape.position_bytes
    assert sequence.cache.bytes_held <= 0.5 * whole


def test_spans_that_have_no_room_are_refused(llama: Any):
    engine = Engine.from_model(llama)
    method = NammMemory(Namm.fresh(SETTINGS), memory=0.25, protects=[(0, 33)])
    sequence = engine.start(method)
    line = "33 entries are to be protected, and 0.25 of a prompt of 128 tokens is 32"
    with pytest.raises(VesicleError, match=line):
        sequence.begin_prompt(128, scored=False)
    engine.start(method).begin_prompt(31)  # nothing is forgotten so early
    engine.start(method).begin_prompt(140)


def test_best_keeps_what_is_protected_and_the_newer_of_equals():
    scores = np.array([3.0, 1, 1, 2, 0, 0])
    always = np.array([False, False, False, False, True, False])
    assert best(scores, always, 3).tolist() == [True, False, False, True, True, False]
    assert best(scores, always, 4).tolist() == [True, False, True, True, True, False]
    assert best(np.zeros(6), always, 2).tolist() == [False] * 4 + [True, True]
    assert best(scores, always, 0).sum() == 0
    assert best(scores, always, 7).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 45), st.data())
def test_best_is_what_sorting_says(scores: list[int], n: int, data: Any):
    size = len(scores)
    always = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    rank = [
        (-np.inf if kept else -s, -i)
        for i, (s, kept) in enumerate(zip(scores, always, strict=True))
    ]
    expected = {i for _, i in sorted((r, i) for i, r in enumerate(rank))[:n]}
    found = best(np.array(scores, np.float32), np.array(always), n)
    assert set(np.nonzero(found)[0].tolist()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": 0.0}, "memory is 0.0; allowed: above 0 and up to 1"),
        ({"memory": 1.5}, "memory is 1.5; allowed: above 0 and up to 1"),
        ({"interval": 40}, "interval of NammMemory is 40; allowed: multiples of 16"),
        ({"interval": 16}, "interval is 16; allowed: 32 and above, the queries"),
        ({"protects": [(5, 5)]}, "a protected span is 5 to 5; allowed: rising, from 0 on"),
    ],
)
def test_what_is_not_allowed(given: dict[str, Any], message: str):
    with pytest.raises(VesicleError, match=message):
        NammMemory(Namm.fresh(SETTINGS), **given)


def test_another_models_profile_is_refused(llama: Any):
    engine = Engine.from_model(llama)
    other = replace(engine.shape, n_layers=30)
    line = "profile of 30 layers of 2 KV heads; this model has 3 layers of 2 KV heads"
    with pytest.raises(VesicleError, match=line):
        engine.start(NammMemory(Namm.fresh(SETTINGS, other), memory=0.5))
    line = "gates of 3 layers of 2 KV heads of 8; this model has 3 layers of 2 KV heads of 12"
    namm = drawn(replace(engine.shape, head_size=8), scores="gates")
    with pytest.raises(VesicleError, match=line):
        engine.start(NammMemory(namm, memory=0.5))
