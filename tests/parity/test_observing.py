"""What attention the newest queries pay: engine, reference and native core tell the same."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, method_for, native, read
from tests.parity.test_engine import counted, executed, reference
from tests.parity.test_forgetting import CUTS, NATIVE, PIECES, Failing, needs_core
from tests.parity.test_retention import check_a_padded_batch
from tests.tiny import shape_of, tiny_modulator
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.eviction import EvictionPolicy
from vesicle.plan import Dense, Events, Evidence, Forgetter, Method, Replay, all_but
from vesicle.reference.attach import attach


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Observes(EvictionPolicy):
    """Keeps what the newest queries look at, others in each KV head, and 16 more in the next.

    All evidence is kept.
    """

    def __init__(
        self,
        entries: int,
        observes: int,
        interval: int = 16,
        inner: Method | None = None,
        reads: bool = False,
    ) -> None:
        super().__init__(entries, interval=interval, inner=inner)
        self.observes, self.reads = observes, reads
        self.seen: dict[tuple[int, int], Evidence] = {}

    def forgetter(self, shape: Any) -> Forgetter:
        return Observing(self)


class Observing(Forgetter):
    def __init__(self, method: Observes) -> None:
        self._method, self.interval = method, method.interval
        self.observes, self.reads_attention = method.observes, method.reads

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        self._method.seen[layer, length] = evidence
        stays = [np.zeros(len(positions), bool) for positions in evidence.positions]
        for head, paid in enumerate(evidence.attention):
            order = np.argsort(-paid.sum(0), kind="stable")
            stays[head][order[: self._method.entries + 16 * head]] = True
        return all_but(layer, length, evidence.positions, stays)

    def fork(self, n_tokens: int) -> Forgetter:
        return self


def same(mine: Observes, other: Observes, atol: float = 0.0) -> None:
    """What one was told is what the other was."""
    assert mine.seen.keys() == other.seen.keys() != set()
    for key, evidence in mine.seen.items():
        theirs = other.seen[key]
        for head, positions in enumerate(evidence.positions):
            assert np.array_equal(positions, theirs.positions[head])
            assert evidence.attention[head].shape == theirs.attention[head].shape
            gap = np.abs(evidence.attention[head] - theirs.attention[head]).max(initial=0)
            assert gap <= atol, f"layer {key[0]} at {key[1]}: {gap:.1e}"


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("observes", "interval"), [(1, 16), (16, 16), (20, 32)])
def test_engine_and_reference_agree(llama: Any, ids: Tensor, cuts, observes: int, interval: int):
    """However the text is cut, with entries forgotten and queries that skip attention."""
    engine = Engine.from_model(llama)
    inner = tiny_modulator(engine.shape, bypass_below=0.2).at(0.6)
    mine, other = (Observes(16, observes, interval, inner, reads=True) for _ in range(2))
    _, sequence = executed(engine, ids, mine, cuts)
    _, plan = reference(llama, ids, other)
    assert sequence.plan.equals(plan)
    same(mine, other, 2e-5)
    counted(sequence, engine)
    with attach(llama, Observes(16, observes, interval, inner, reads=True)) as run:
        llama(ids)
    assert run.cost == sequence.cost
    positions = mine.seen[0, 64].positions
    assert len(positions[0]) < len(positions[1]), "KV heads are to hold more or less"
    if observes > 1 and interval == 16:
        assert set(positions[0].tolist()) - set(positions[1].tolist())
    skipped = 0
    for (layer, length), evidence in mine.seen.items():
        runs = plan.attention[length - observes : length, layer]
        for positions, attention in zip(evidence.positions, evidence.attention, strict=True):
            np.testing.assert_allclose(attention.sum(1), runs, atol=1e-5)
            later = positions > np.arange(length - observes, length)[:, None]
            assert not attention[later].any()
            assert not attention[runs == 0].any()
        skipped += int((runs == 0).sum())
    assert skipped


def test_every_family(model: Any, ids: Tensor):
    """Windowed layers are not asked about."""
    engine = Engine.from_model(model)
    mine, other = Observes(16, 10), Observes(16, 10)
    _, sequence = executed(engine, ids, mine, (30,))
    _, plan = reference(model, ids, other)
    assert sequence.plan.equals(plan)
    same(mine, other, 2e-5)
    counted(sequence, engine)
    full = np.nonzero(engine.shape.layer_windows == 0)[0].tolist()
    assert {layer for layer, _ in mine.seen} == set(full)


def test_it_is_the_models_own_attention(llama: Any, ids: Tensor):
    """By what the model itself says, before anything is forgotten."""
    method = Observes(64, 24, interval=64)
    executed(Engine.from_model(llama), ids, method)
    llama.config._attn_implementation = "eager"
    attention = llama(ids, output_attentions=True).attentions
    llama.config._attn_implementation = "sdpa"
    for layer, chances in enumerate(attention):
        heads = chances[0, :, 40:64, :64].unflatten(0, (shape_of(llama).n_kv_heads, -1))
        np.testing.assert_allclose(
            method.seen[layer, 64].attention, heads.mean(1).numpy(), atol=1e-5
        )


def test_who_observes_nothing_is_told_of_no_query(llama: Any, ids: Tensor):
    for run in (executed, lambda _, *rest: reference(llama, *rest)):
        method = Observes(16, 0)
        run(Engine.from_model(llama), ids, method)
        assert [paid.shape for paid in method.seen[0, 16].attention] == [(0, 16)] * 2


def test_a_batch_in_the_reference(llama: Any):
    check_a_padded_batch(llama, Observes(16, 8))


@needs_core
@pytest.mark.parametrize("kind", ["dense", "stand-ins", "replay"])
@pytest.mark.parametrize(("weights", "kv"), NATIVE)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pieces_change_no_bit(weights: str, kv: str, kind: str, pieces: list[int]):
    """Natively: evidence, Plan, logits and counted work."""
    engine = native(weights, kv)
    first, second = (Observes(32, 20, 32, method_for(engine, kind)) for _ in range(2))
    whole, logits = read(engine, first, [160])
    cut, again = read(engine, second, pieces)
    assert torch.equal(logits, again)
    assert cut.plan.equals(whole.plan)
    same(first, second)
    counted(whole, engine)
    for name, values in whole.token_costs.items():
        np.testing.assert_array_equal(cut.token_costs[name], values, err_msg=name)


@needs_core
@pytest.mark.parametrize("family", ["llama", "qk-norm", "gemma"])
def test_the_core_keeps_what_pytorch_does(family: str):
    engine, without = native("fp32", "fp32", family), native("fp32", "fp32", family)
    without._native = None
    first, second = Observes(32, 32, 32), Observes(32, 32, 32)
    mine, _ = read(engine, first, [100, *[1] * 60])
    theirs, _ = read(without, second, [160])
    same(first, second, 1e-3)
    assert mine.cost == theirs.cost
    assert mine.plan.equals(theirs.plan)


@needs_core
def test_threads_change_nothing():
    engine = native("fp32", "fp16")
    first, second = (Observes(32, 20, 32, method_for(engine, "stand-ins")) for _ in range(2))
    read(engine, first, [100, *[1] * 60])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        read(engine, second, [100, *[1] * 60])
    finally:
        torch.set_num_threads(before)
    same(first, second, 1e-6)  # what is asked for afterwards is PyTorch's


@needs_core
def test_a_replay_gives_the_same_bits_and_observes_nothing():
    engine = native("int4")
    inner = method_for(engine, "stand-ins")
    first, logits = read(engine, Observes(32, 32, 32, inner), [160])
    again, replayed = read(engine, Replay(first.plan, inner.stand_ins), [70, 90])
    assert torch.equal(logits, replayed)
    assert again.plan.equals(first.plan)
    assert again.cost.flops_evidence == 0 < first.cost.flops_evidence


@pytest.mark.parametrize("n", [37, 64, 70])
def test_forks(n: int):
    """Where it stands, a fork goes on as its source does, at the price of its own tokens."""
    engine = native("int4")
    method, other = Observes(16, 32, 32), Observes(16, 32, 32)
    source = engine.start(method)
    engine.forward([(source, IDS[:n])], "none")
    fork = engine.fork(source)
    alone, _ = read(engine, other, [n, 130 - n])
    for sequence in (source, fork):
        engine.forward([(sequence, IDS[n:130])])
        assert sequence.plan.equals(alone.plan)
        same(method, other)
    for name in ("flops_evidence", "kv_bytes_read"):
        values = alone.token_costs[name]
        np.testing.assert_array_equal(source.token_costs[name], values, err_msg=name)
        np.testing.assert_array_equal(fork.token_costs[name][n:], values[n:], err_msg=name)
        assert not fork.token_costs[name][:n].any()
    with pytest.raises(VesicleError, match=r"forked at 100 tokens; allowed: 130, where it stands"):
        engine.fork(source, 100)


@pytest.mark.parametrize("observes", [-1, 17, 1.0, True, None])
@pytest.mark.parametrize("run", ["engine", "reference"])
def test_what_cannot_be_observed_is_refused(llama: Any, ids: Tensor, observes: Any, run: str):
    method = Observes(16, observes)
    start = Engine.from_model(llama).start if run == "engine" else partial(reference, llama, ids)
    line = rf"observes of Observing is {observes}; allowed: 0 to 16"
    with pytest.raises(VesicleError, match=line):
        start(method)


@needs_core
@pytest.mark.parametrize("runs_native", [True, False])
def test_a_pass_that_was_broken_off_leaves_no_evidence(runs_native: bool):
    """Its own author fails in a middle layer, over tokens of before and after; then all goes on."""
    engine = native("int4")
    if not runs_native:
        engine._native = None
    method, other = (Observes(32, 20, 32, Failing(method_for(engine, "stand-ins"))) for _ in "ab")
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:20])])
    Failing.on = True
    for wrong in (IDS[50:58], IDS[90:102]):
        with pytest.raises(ValueError, match="no"):
            engine.forward([(sequence, wrong)])
    Failing.on = False
    engine.forward([(sequence, IDS[20:100])])
    expected, _ = read(engine, other, [20, 80])
    same(method, other)
    assert sequence.cost.flops_evidence == expected.cost.flops_evidence


@pytest.mark.parametrize("forked", [False, True])
def test_one_that_fails_is_asked_again_and_charged_once(forked: bool):
    engine = native("int4")

    class FailsOnce(Observes):
        def forgetter(self, shape: Any) -> Forgetter:
            found = super().forgetter(shape)
            forget = found.forget

            def failing(layer: int, length: int, evidence: Evidence) -> Events:
                if layer == 2 and not self.failed:
                    self.failed = True
                    raise ValueError("no")
                return forget(layer, length, evidence)

            found.forget = failing  # type: ignore[method-assign]
            return found

        failed = False

    method, other = FailsOnce(16, 16), Observes(16, 16)
    sequence, clean = engine.start(method), engine.start(other)
    with pytest.raises(ValueError, match="no"):
        engine.forward([(sequence, IDS[:16])])
    engine.forward([(clean, IDS[:16])])
    going = engine.fork(sequence) if forked else sequence
    for s in (going, clean):
        engine.forward([(s, IDS[16:40])])
    same(method, other)
    assert going.plan.equals(clean.plan)
    own = 16 if forked else 0
    for name in ("flops_evidence", "kv_bytes_read"):
        found, expected = going.token_costs[name], clean.token_costs[name]
        np.testing.assert_array_equal(found[own:], expected[own:])
        assert not found[:own].any()


def test_evidence_cannot_be_written_to():
    method = Observes(16, 16)
    read(native("int4"), method, [20])
    with pytest.raises(ValueError, match="read-only"):
        method.seen[0, 16].attention[1][:] = 0


def test_what_is_observed_is_charged_beside_what_is_received():
    """Of dense tokens: every one reads what lies before it once more, the observed twice."""
    engine = native("fp32")
    costs = {
        (reads, observes): read(engine, Observes(48, observes, 48, Dense(), reads), [100])[0]
        for reads in (False, True)
        for observes in (0, 20)
    }
    each = {key: sequence.token_costs["flops_evidence"] for key, sequence in costs.items()}
    assert not each[False, 0].any()
    one = 2 * engine.shape.query_width * engine.shape.n_layers * (np.arange(48) + 1)
    np.testing.assert_array_equal(each[True, 0][:48], one)
    np.testing.assert_array_equal(each[False, 20][:48], one * (np.arange(48) >= 28))
    np.testing.assert_array_equal(each[True, 20], each[True, 0] + each[False, 20])
    assert each[False, 20][76:96].all()
    assert not each[False, 20][96:].any()  # nobody was asked yet
