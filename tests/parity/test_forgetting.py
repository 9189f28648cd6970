"""Forgetting as a text goes on: engine, reference and native core tell and do the same."""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, method_for, modulator_for, native, read
from tests.parity.test_engine import FP64, close, counted, executed, reference
from tests.parity.test_retention import check_a_padded_batch
from tests.tiny import shape_of, tiny_modulator, tokens
from vesicle.cost import kv_bytes_peak
from vesicle.engine import Engine, core
from vesicle.errors import VesicleError
from vesicle.eviction import EvictionPolicy, HeavyHitters, SinksAndRecent
from vesicle.plan import Dense, Events, Evidence, Forgetter, Method, Plan, Replay, all_but
from vesicle.plan.events import table_of
from vesicle.reference.attach import attach
from vesicle.retention import Retention

needs_core = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Watched(EvictionPolicy):
    """Heavy hitters, all of whose evidence is kept."""

    def __init__(self, entries: int, interval: int = 16, inner: Method | None = None) -> None:
        super().__init__(entries, interval=interval, inner=inner)
        self.seen: dict[tuple[int, int], Evidence] = {}

    def forgetter(self, shape: Any) -> Forgetter:
        return Watching(self, HeavyHitters(self.entries).forgetter(shape))


class Watching(Forgetter):
    reads_attention = True

    def __init__(self, method: Watched, inner: Forgetter) -> None:
        self._method, self._inner, self.interval = method, inner, method.interval

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        self._method.seen[layer, length] = evidence
        return self._inner.forget(layer, length, evidence)

    def fork(self, n_tokens: int) -> Forgetter:
        return Watching(self._method, self._inner.fork(n_tokens))


class Says(EvictionPolicy):
    """Gives events that somebody has made up."""

    def __init__(self, make: Any, interval: int = 16) -> None:
        super().__init__(1)
        self.make, self.interval = make, interval

    def forgetter(self, shape: Any) -> Forgetter:
        return Saying(self)


class Saying(Forgetter):
    def __init__(self, method: Says) -> None:
        self._method, self.interval = method, method.interval

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        return self._method.make(layer, length, evidence)


def close_evidence(mine: Evidence, other: Evidence, rtol: float = 0, atol: float = 0) -> None:
    """The same entries in each KV head, which received as much."""
    assert len(mine.positions) == len(other.positions)
    for head, positions in enumerate(mine.positions):
        assert np.array_equal(positions, other.positions[head])
        np.testing.assert_allclose(mine.received[head], other.received[head], rtol=rtol, atol=atol)


CUTS = {"whole": (), "chunks": (1, 17, 48, 64), "tokens": tuple(range(1, 70))}


def policies(inner: Method | None = None) -> dict[str, EvictionPolicy]:
    return {
        "recent": SinksAndRecent(20, interval=16, inner=inner),
        "hitters": HeavyHitters(16, recent=6, interval=16, inner=inner),
        "seldom": HeavyHitters(30, interval=48, inner=inner),
    }


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", policies())
def test_engine_and_reference_agree(llama: Any, ids: Tensor, cuts, name: str):
    """However the text is cut: the Plan, logits, work and memory."""
    engine = Engine.from_model(llama)
    logits, sequence = executed(engine, ids, policies()[name], cuts)
    expected, plan = reference(llama, ids, policies()[name])
    assert plan.forgets
    assert sequence.plan.equals(plan)
    plan.check(engine.shape)
    close(logits, expected, FP64)
    counted(sequence, engine)
    assert sequence.kv_bytes_peak == kv_bytes_peak(plan, engine.shape)
    assert (sequence.cost.flops_evidence > 0) == (name != "recent")
    with attach(llama, policies()[name]) as run:
        llama(ids)
    assert run.cost == sequence.cost
    assert (logits[48:] - llama(ids).logits[0, 48:]).abs().mean() > 0.001


def test_every_family(model: Any, ids: Tensor):
    engine = Engine.from_model(model)
    method = HeavyHitters(16, interval=16)
    logits, sequence = executed(engine, ids, method, (30,))
    expected, plan = reference(model, ids, method)
    assert sequence.plan.equals(plan)
    close(logits, expected, FP64)
    counted(sequence, engine)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_together_with_a_modulator(llama: Any, ids: Tensor, cuts, summary: str):
    """Queries that skip attention, and blocks that are not read, add nothing to the evidence."""
    engine = Engine.from_model(llama)
    inner = tiny_modulator(engine.shape, ladder=True, summary=summary, bypass_below=0.2).at(0.6)
    method, other = Watched(16, inner=inner), Watched(16, inner=inner)
    logits, sequence = executed(engine, ids, method, cuts)
    expected, plan = reference(llama, ids, other)
    assert sequence.plan.equals(plan)
    close(logits, expected, FP64)
    counted(sequence, engine)
    assert (plan.attention == 0).any()
    assert method.seen.keys() == other.seen.keys()
    for key, evidence in method.seen.items():
        close_evidence(evidence, other.seen[key], atol=1e-4)


def test_evidence_is_attention_summed(llama: Any, ids: Tensor):
    """By what the model itself says of its attention, before anything is forgotten."""
    method = Watched(64, interval=64)
    executed(Engine.from_model(llama), ids, method)
    llama.config._attn_implementation = "eager"
    attention = llama(ids, output_attentions=True).attentions
    llama.config._attn_implementation = "sdpa"
    for layer, chances in enumerate(attention):
        summed = chances[0, :, :64, :64].sum(1).unflatten(0, (shape_of(llama).n_kv_heads, -1))
        np.testing.assert_allclose(
            method.seen[layer, 64].received, summed.sum(1).numpy(), atol=1e-5
        )


def test_a_batch_in_the_reference(llama: Any):
    check_a_padded_batch(llama, HeavyHitters(16, interval=16))


@pytest.mark.parametrize("t", [31, 40, 49])
def test_causal(llama: Any, ids: Tensor, t: int):
    engine = Engine.from_model(llama)
    other = ids.clone()
    other[:, t + 1 :] = tokens(69 - t, seed=8)
    method = HeavyHitters(16, interval=16, inner=tiny_modulator(engine.shape).at(0.6))
    (a, first), (b, second) = (executed(engine, x, method) for x in (ids, other))
    known = [s.plan.events[s.plan.events["position"] <= t + 1] for s in (first, second)]
    assert len(known[0]) > 0
    assert np.array_equal(*known)
    assert np.array_equal(first.plan.rows[: t + 1], second.plan.rows[: t + 1])
    close(a[: t + 1], b[: t + 1], 1e-5)


NATIVE = [("int4", "fp16"), ("int8", "int8"), ("fp32", "fp32"), ("bf16", "fp32")]
INNER = ("dense", "stand-ins", "replay")
PIECES = {"chunks": [1, 16, 80, 33, 30], "tokens": [1] * 160, "mixed": [100, *[1] * 60]}


@needs_core
@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize(("weights", "kv"), NATIVE)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pieces_change_no_bit(weights: str, kv: str, kind: str, pieces: list[int]):
    """Natively: evidence, Plan, logits and counted work."""
    engine = native(weights, kv)
    assert engine._native is not None
    first, second = (Watched(32, 32, method_for(engine, kind)) for _ in range(2))
    whole, logits = read(engine, first, [160])
    cut, again = read(engine, second, pieces)
    assert torch.equal(logits, again)
    assert cut.plan.equals(whole.plan)
    assert (
        first.seen.keys()
        == second.seen.keys()
        == {(i, n) for i in range(4) for n in range(32, 161, 32)}
    )
    for key, evidence in first.seen.items():
        close_evidence(evidence, second.seen[key])
    counted(whole, engine)
    for name, values in whole.token_costs.items():
        np.testing.assert_array_equal(cut.token_costs[name], values, err_msg=name)


@needs_core
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int):
    """Packed products may differ in the last bit by the number of threads; dense ones do not."""
    engine = native("fp32", "fp16")
    first, second = (Watched(32, 32, method_for(engine, "stand-ins")) for _ in range(2))
    _, expected = read(engine, first, [100, *[1] * 60])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, logits = read(engine, second, [100, *[1] * 60])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits, expected)
    for key, evidence in first.seen.items():
        close_evidence(evidence, second.seen[key])


@needs_core
@pytest.mark.parametrize("kind", ["dense", "replay"])
@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_the_core_gathers_what_pytorch_does(kind: str, kv: str):
    engine, without = native("fp32", kv), native("fp32", kv)
    without._native = None
    first, second = (Watched(48, 48, method_for(engine, kind)) for _ in range(2))
    mine, logits = read(engine, first, [100, *[1] * 60])
    theirs, expected = read(without, second, [160])
    # Rounded keys may fall to the other side, and blocks nearly as good be chosen, in later layers.
    exact = kv == "fp32"
    for (layer, length), evidence in first.seen.items():
        if exact or layer == 0:
            close_evidence(evidence, second.seen[layer, length], rtol=2e-3, atol=2e-4)
    assert mine.cost == theirs.cost
    if exact:
        assert mine.plan.equals(theirs.plan)
        assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@needs_core
@pytest.mark.parametrize("kind", INNER)
def test_a_replay_gives_the_same_bits_and_gathers_nothing(kind: str, tmp_path):
    engine = native("int4")
    inner = method_for(engine, kind)
    first, logits = read(engine, Watched(32, 32, inner), [160])
    first.plan.save(tmp_path / "plan")
    method = Replay(Plan.load(tmp_path / "plan"), inner.stand_ins)
    again, replayed = read(engine, method, [70, 90])
    assert torch.equal(logits, replayed)
    assert again.plan.equals(first.plan)
    assert again.cost.flops_evidence == 0 < first.cost.flops_evidence


@pytest.mark.parametrize("policy", [SinksAndRecent, HeavyHitters])
@pytest.mark.parametrize(("entries", "interval"), [(32, 16), (80, 16), (16, 48)])
def test_memory_is_bounded(policy: Any, entries: int, interval: int):
    """In a prompt and while writing: all at first, then the entries and what came since."""
    engine = native("int4")
    with closing(engine.start(policy(entries, interval=interval))) as sequence:
        for start, stop in [(0, 100), *((i, i + 1) for i in range(100, 160))]:
            engine.forward([(sequence, IDS[start:stop])], "none")
            asked = stop // interval * interval
            held = min(entries, asked) + stop - asked
            assert {len(row) for i in range(4) for row in sequence.cache.held(i)} == {held}
            assert sequence.cost.kv_bytes_held == held * 4 * engine.shape.position_bytes
            heads = 4 * engine.shape.n_kv_heads
            assert engine.pool.blocks_in_use == heads * -(-held // 16)


def test_which_entries_stay():
    engine = native("int4")
    with closing(engine.start(SinksAndRecent(32, interval=16))) as sequence:
        engine.forward([(sequence, IDS[:160])], "none")
        assert sequence.cache.held(0)[0].tolist() == [*range(4), *range(132, 160)]
    method = Watched(32, 32)
    with closing(engine.start(method)) as sequence:
        engine.forward([(sequence, IDS[:64])], "none")
        for head, held in enumerate(sequence.cache.held(1)):
            later = method.seen[1, 64].received[head]
            old = np.concatenate([method.seen[1, 32].received[head] + later[:32], later[32:48]])
            best = np.sort(np.argsort(-old, kind="stable")[:16])
            assert held.tolist() == [*best.tolist(), *range(48, 64)]


@needs_core
def test_a_ragged_batch():
    """Sequences that forget at different lengths, or never, in one pass: as each alone."""
    engine = native("int4")
    methods: list[Method] = [
        HeavyHitters(16, interval=16),
        HeavyHitters(32, interval=48, inner=method_for(engine, "stand-ins")),
        SinksAndRecent(16, interval=32),
        Dense(),
    ]
    sizes = [30, 1, 40, 1, 1, 30]
    alone = [read(engine, method, sizes) for method in methods]
    sequences, at, rows = [engine.start(m) for m in methods], 0, []
    for size in sizes:
        rows.append(engine.forward([(s, IDS[at : at + size]) for s in sequences], "all"))
        at += size
    for i, (single, logits) in enumerate(alone):
        assert torch.equal(torch.cat([part[i] for part in rows]), logits)
        assert sequences[i].plan.equals(single.plan)
        assert sequences[i].cost == single.cost


@pytest.mark.parametrize("n", [37, 64, 70])
def test_forks(n: int):
    """Where it stands, a fork goes on as its source does; both alone."""
    engine = native("int4")
    method = HeavyHitters(16, interval=16, inner=modulator_for(engine.shape, "stand-ins").at(0.6))
    source = engine.start(method)
    engine.forward([(source, IDS[:n])], "none")
    fork = engine.fork(source)
    for sequence in (fork, source):
        alone = engine.start(method)
        engine.forward([(alone, IDS[:n])], "none")
        (expected,) = engine.forward([(alone, IDS[n:130])], "all")
        assert torch.equal(engine.forward([(sequence, IDS[n:130])], "all")[0], expected)
        assert sequence.plan.equals(alone.plan)
    with pytest.raises(VesicleError, match=r"forked at 100 tokens; allowed: 130, where it stands"):
        engine.fork(source, 100)


def test_a_forgetter_must_say_how_it_is_forked():
    engine = native("int4")
    sequence = engine.start(Says(lambda layer, length, evidence: table_of(layer=[])))
    engine.forward([(sequence, IDS[:20])])
    with pytest.raises(VesicleError, match="a sequence with a Saying cannot be forked"):
        engine.fork(sequence)


def stays(n: int) -> Any:
    """Keeps the first n entries."""

    def make(layer: int, length: int, evidence: Evidence) -> Events:
        keep = [np.arange(len(positions)) < n for positions in evidence.positions]
        return all_but(layer, length, evidence.positions, keep)

    return make


def changed(**values: int) -> Any:
    def make(layer: int, length: int, evidence: Evidence) -> Events:
        events = stays(0)(layer, length, evidence)
        for name, value in values.items():
            events[name] = value
        return events

    return make


WRONG = [
    (lambda *a: [], "forget gives list; allowed: a table of events"),
    (changed(position=15), "position 15; allowed: 16"),
    (changed(layer=3), "layer 3; allowed: 0"),
    (changed(kind=1), "kind 1; allowed: 0"),
    (changed(first=-1), "first -1; allowed: 0 to 15"),
    (changed(last=16), "last 16; allowed: 0 to 15"),
    (changed(kv_head=2), "kv_head 2; allowed: -1 to 1"),
    (changed(last=3), "leaves .12, 12. entries in the KV heads of layer 0; allowed: multiples"),
    (changed(kv_head=1, last=3), "leaves .16, 12. entries"),
    (changed(first=8, last=4), "last 4; allowed: 8 and above"),
    (changed(value=7), "value 7; allowed: 0"),
]


@pytest.mark.parametrize(("make", "line"), WRONG, ids=[line for _, line in WRONG])
@pytest.mark.parametrize("run", ["native", "reference"])
def test_events_are_checked_before_anything_is_freed(make: Any, line: str, run: str, llama: Any):
    if run == "reference":
        with pytest.raises(VesicleError, match=line), attach(llama, Says(make)):
            llama(tokens(20))
        return
    engine = native("int4")
    method = Says(make)
    sequence = engine.start(method)
    with pytest.raises(VesicleError, match=line):
        engine.forward([(sequence, IDS[:20])])
    assert (sequence.length, engine.pool.blocks_in_use) == (16, 4 * engine.shape.n_kv_heads)
    method.make = stays(16)  # it is asked once more
    expected = engine.start()
    engine.forward([(expected, IDS[:16])])
    pair = [engine.forward([(s, IDS[16:20])])[0] for s in (sequence, expected)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("interval", [0, 8, 24, -16, 16.0, True])
@pytest.mark.parametrize("run", ["engine", "reference"])
def test_intervals_are_checked(llama: Any, interval: Any, run: str):
    method = Says(stays(16), interval=interval)
    start = Engine.from_model(llama).start if run == "engine" else partial(reference, llama)
    what = (method,) if run == "engine" else (tokens(3), method)
    with pytest.raises(VesicleError, match=f"interval of .* is {interval}; allowed: multiples"):
        start(*what)


def test_one_of_the_two_may_forget(llama: Any):
    engine = Engine.from_model(llama)
    kept = Retention([[[]] * 2] * 3, 16)
    with pytest.raises(VesicleError, match="has evict_after and a forgetter"):
        engine.start(SinksAndRecent(16, inner=kept))
    with pytest.raises(VesicleError, match="has a forgetter already"):
        engine.start(SinksAndRecent(16, inner=SinksAndRecent(16)))


@needs_core
def test_a_pass_that_was_broken_off_leaves_no_evidence():
    """Its own author fails in a middle layer; then all goes on as if nothing had been."""
    engine = native("int4")
    inner = method_for(engine, "stand-ins")
    method = Watched(32, 32, Failing(inner))
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:20])])
    Failing.on = True
    with pytest.raises(ValueError, match="no"):
        engine.forward([(sequence, IDS[20:28])])
    Failing.on = False
    (logits,) = engine.forward([(sequence, IDS[20:100])], "all")
    other = Watched(32, 32, Failing(inner))
    _, expected = read(engine, other, [20, 80])
    assert torch.equal(logits, expected[20:])
    for key, evidence in other.seen.items():
        assert np.array_equal(evidence.received, method.seen[key].received)


class Failing(Method):
    """Another method's author, asked layer by layer, which fails while `on`."""

    on = False

    def __init__(self, inner: Method) -> None:
        self.inner = inner

    @property
    def stand_ins(self) -> Any:
        return self.inner.stand_ins

    def author(self, shape: Any) -> Any:
        author = self.inner.author(shape)
        ffn = type(author).ffn

        class Asked(type(author)):  # type: ignore[misc]
            planned = lambda self, positions: None  # noqa: E731
            reads_hidden = False

            def ffn(self, layer: int, *rest: Any) -> None:
                if Failing.on and layer == 2:
                    raise ValueError("no")
                ffn(self, layer, *rest)

        author.__class__ = Asked
        return author


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: HeavyHitters(0), "entries is 0; allowed: 1 and above"),
        (lambda: HeavyHitters(40.5), "entries is 40.5; allowed: 1 and above"),
        (lambda: HeavyHitters(16, recent=17), "recent is 17; allowed: 0 to 16"),
        (lambda: SinksAndRecent(16, sinks=17), "sinks is 17; allowed: 0 to 16"),
        (
            lambda: SinksAndRecent(16, interval=20),
            "interval of SinksAndRecent is 20; allowed: m",
        ),
        (lambda: SinksAndRecent(16, inner=3), "inner is a int; allowed: a Method such as"),
    ],
)
def test_policies_refuse_what_cannot_be(make: Any, line: str):
    with pytest.raises(VesicleError, match=line):
        make()
    assert SinksAndRecent(2).sinks == 2


def with_forgetter(what: Any) -> Method:
    class Some(Dense):
        def author(self, shape: Any) -> Any:
            author = super().author(shape)
            author.forgetter = what
            return author

    return Some()


@pytest.mark.parametrize("what", ["x", Saying])
def test_what_is_no_forgetter_is_refused(what: Any):
    with pytest.raises(VesicleError, match=r"forgetter is .*; allowed: an instance of a Forgetter"):
        native("int4").start(with_forgetter(what))


def test_an_interval_that_is_missing_is_told():
    saying = Saying(Says(None))
    del saying.interval
    with pytest.raises(VesicleError, match="interval of Saying is None; allowed: multiples of 16"):
        native("int4").start(with_forgetter(saying))


def test_what_it_is_given_and_gives_is_its_own():
    """Evidence cannot be written to, and a table that it uses again does not change the Plan."""
    engine = native("int4")
    seen: list[Evidence] = []
    table = all_but(0, 0, np.zeros((2, 16), np.int32), np.zeros((2, 16), bool))

    def make(layer: int, length: int, evidence: Evidence) -> Events:
        seen.append(evidence)
        table["position"], table["layer"] = length, layer
        table["first"], table["last"] = length - 16, length - 1
        return table

    sequence = engine.start(Says(make))
    engine.forward([(sequence, IDS[:70])])
    table["position"] = 0
    sequence.plan.check(engine.shape)
    assert sorted(set(sequence.plan.events["position"].tolist())) == [16, 32, 48, 64]
    for evidence in seen:
        with pytest.raises(ValueError, match="read-only"):
            evidence.positions[1][:] = 0
        with pytest.raises(ValueError, match="read-only"):
            evidence.received[0][:] = 0


def test_what_is_read_once_may_not_change_on_the_way(llama: Any, ids: Tensor):
    """Interval and whether attention is read: as when the sequence started, in both executors."""

    class Changing(Watched):
        def forgetter(self, shape: Any) -> Forgetter:
            found = super().forgetter(shape)
            forget = found.forget

            def changing(*args: Any) -> Events:
                found.interval, found.reads_attention = 7, False  # type: ignore[misc]
                return forget(*args)

            found.forget = changing  # type: ignore[method-assign]
            return found

    engine = Engine.from_model(llama)
    logits, sequence = executed(engine, ids, Changing(16, 16), (30,))
    expected, other = executed(engine, ids, Watched(16, 16), (30,))
    assert torch.equal(logits, expected)
    assert sequence.cost == other.cost
    found, plan = reference(llama, ids, Changing(16, 16))
    close(found, expected, FP64)
    assert plan.equals(other.plan)


class Fails(Says):
    """Keeps the newest 16 entries, and raises when it is asked about a layer for the first time."""

    def __init__(self, layer: int, error: type[BaseException], inner: Forgetter) -> None:
        super().__init__(self.answer)
        self.layer, self.error, self.hitters, self.asked = layer, error, inner, []

    def answer(self, layer: int, length: int, evidence: Evidence) -> Events:
        self.asked.append((layer, length))
        if layer == self.layer and self.asked.count((layer, length)) == 1:
            self.hitters.forget(layer, length, evidence)
            raise self.error("no")
        return self.hitters.forget(layer, length, evidence)

    def forgetter(self, shape: Any) -> Forgetter:
        found = super().forgetter(shape)
        found.reads_attention = True
        found.fork = lambda n: self.forgetter(shape)  # type: ignore[method-assign]
        return found


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("forked", [False, True])
def test_one_that_fails_is_asked_again_about_that_layer(layer: int, error: Any, forked: bool):
    """Then all is as if it had not failed, in its sequence and in a fork of it."""
    engine = native("int4")
    hitters = HeavyHitters(16, interval=16)
    method = Fails(layer, error, hitters.forgetter(engine.shape))
    sequence, clean = engine.start(method), engine.start(hitters)
    with pytest.raises(error, match="no"):
        engine.forward([(sequence, IDS[:16])])
    engine.forward([(clean, IDS[:16])])
    assert (sequence.length, sequence.evicts_at) == (16, 16)
    going = engine.fork(sequence) if forked else sequence
    for start, stop in ((16, 17), (17, 31)):
        pair = [engine.forward([(s, IDS[start:stop])])[0] for s in (going, clean)]
        assert torch.equal(*pair)
    assert method.asked[: layer + 2] == [*((i, 16) for i in range(layer + 1)), (layer, 16)]
    assert going.plan.equals(clean.plan)


def test_what_it_may_not_do_while_it_is_asked():
    engine = native("int4")
    expected = engine.start()
    alone = engine.forward([(expected, IDS[:40])])[0]

    def asked(act: Any) -> Any:
        def make(layer: int, length: int, evidence: Evidence) -> Events:
            act(sequences[0])
            return table_of(layer=[])

        return make

    for act, line in (
        (lambda s: engine.forward([(s, IDS[:1])]), "to be read whose forgetter is being asked"),
        (engine.fork, "to be forked whose forgetter is being asked"),
        (lambda s: s.close(), "the sequence is closed"),
    ):
        sequences = [engine.start(Says(asked(act))), engine.start()]
        first, second = engine.attempt([(s, IDS[:40]) for s in sequences])
        assert isinstance(first, VesicleError)
        assert line in str(first)
        assert torch.equal(second, alone)


def test_closing_another_stops_that_one_alone():
    engine = native("int4")

    def make(layer: int, length: int, evidence: Evidence) -> Events:
        sequences[1].close()
        return table_of(layer=[])

    sequences = [engine.start(Says(make)), engine.start(), engine.start()]
    found = engine.attempt([(s, IDS[:40]) for s in sequences])
    assert [type(outcome) for outcome in found] == [Tensor, VesicleError, Tensor]


@pytest.mark.parametrize("what", [None, "x"])
def test_a_fork_of_a_forgetter_must_be_one(what: Any):
    engine = native("int4")
    method = Says(stays(16))
    sequence = engine.start(method)
    sequence.forgetter.fork = lambda n: what
    with pytest.raises(VesicleError, match=r"fork of Saying gives .*; allowed: a Forgetter"):
        engine.fork(sequence)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (np.ones((1, 16), bool), "of 1 KV heads; allowed: 2"),
        (np.ones((2, 16)), "float64 of .16,. in a KV head; allowed: an array of bool of .16,."),
        (np.ones((2, 15), bool), "bool of .15,. in a KV head; allowed: an array of bool of .16,."),
        (torch.ones(2, 16), "allowed: an array of bool of"),
    ],
)
def test_masks_of_all_but_are_checked(wrong: Any, line: str):
    with pytest.raises(VesicleError, match=f"stays is .*{line}"):
        all_but(0, 16, np.zeros((2, 16), np.int32), wrong)
