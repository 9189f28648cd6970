"""The native decoder against the engine's general path: logits, Plans, levels, counted work.

Both take each step from the same cache, so that what one rounds otherwise is not handed on.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, beside, method_for, modulator_for, native
from tests.tiny import DECIDED
from vesicle.cost import price_tokens
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.linear import ChannelMajor, Projection
from vesicle.engine.packed import PackedPair, PackedWeight, _cuts, _high_part, _trailing_part
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.phases import Phases
from vesicle.plan import Method, Plan, Replay

TOLERANCE = 1e-4
"""Logits of up to 8 in fp32: the same sums in another order, through 4 layers. Measured: 3e-5."""
FLIPPED = 2.0
SELECTION, ROUNDING = 0.07, 0.2
"""A sum that differs in its last bit may decide otherwise: of two nearly equal channels or blocks
the other is read, a level falls on the other side of a threshold, or an 8-bit activation or a key
in few bits rounds to its neighbour (1/127 of the largest of its group). Large random weights make
up to the size of a logit of that. So in few steps - up to the first share where nothing but a
selection is discrete, up to the second where numbers are rounded - logits may differ by up to
`FLIPPED` and decisions may differ. Measured: 0 to 1 and 0 to 2 of 30 steps, by at most 1."""
LEVELS = 2.1e-6
"""Levels are rounded to six decimals; rounding differences may move the last one."""

WEIGHTS, KV = ("fp32", "bf16", "int4", "int8"), ("fp32", "fp16", "bf16", "int8")
STEPS = 30

pytestmark = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


@dataclass
class Step:
    """One token by both, from the same cache."""

    difference: float
    levels: float
    same_plan: bool
    same_counts: bool


def steps(
    engine: Engine,
    other: Engine,
    method: Method,
    prefill: int,
    switch: AbstractContextManager[None] | None = None,
) -> Iterator[Step]:
    """Decode natively; do each step once more by `other`, or under `switch`."""
    a = engine.start(method)
    if prefill:
        engine.forward([(a, IDS[:prefill])], "none")
    for t in range(prefill, prefill + STEPS):
        assert engine._native.reach(a)
        b = other.start(method)
        b.cache = a.cache.fork(t)
        with switch or nullcontext():
            [expected] = other.forward([(b, [IDS[t]])])
        [logits] = engine.forward([(a, [IDS[t]])])
        for sequence, owner in ((a, engine), (b, other)):
            counted_as_priced(sequence, owner, t)
        levels = np.abs(a.levels[-1:] - b.levels[-1:])
        costs = [s.token_costs for s in (a, b)]
        alike = [n for n in costs[0] if engine.shape == other.shape or n != "weight_bytes"]
        yield Step(
            float((logits - expected).abs().max()),
            float(levels.max(initial=0)),
            a.plan.tokens(t).equals(b.plan),
            all(costs[0][n][-1] == costs[1][n][-1] for n in alike),
        )


def counted_as_priced(sequence: Sequence, engine: Engine, position: int) -> None:
    """The newest token's counted work is what its Plan is priced at."""
    row = sequence.plan.tokens(sequence.plan.n_tokens - 1)
    prices = price_tokens(row, engine.shape, sequence.overhead, first_position=position)
    for name, values in prices.items():
        assert sequence.token_costs[name][-1] == values[0], name


def check(found: list[Step], weights: str, kv: str, kind: str) -> None:
    """All steps agree, but for as many flips as the number formats make likely."""
    share = ROUNDING if weights in ("int4", "int8") else SELECTION
    if share == SELECTION and kv == "fp32" and kind in ("dense", "budget 1"):
        share = 0  # nothing is chosen and nothing rounded
    near = [step for step in found if step.difference < TOLERANCE and step.levels < LEVELS]
    worst = max(step.difference for step in found)
    assert len(found) - len(near) <= share * len(found), (len(near), worst)
    assert worst < FLIPPED
    for step in near:
        assert step.same_plan
        assert step.same_counts


CASES = [
    *((weights, kv, "stand-ins", "llama") for weights in WEIGHTS for kv in KV),
    *(
        (weights, "fp32", kind, "llama")
        for weights in WEIGHTS
        for kind in ("plain", "budget 1", "dense", "replay", "ladder")
        if kind != "ladder" or weights in ("int4", "int8")
    ),
    *(
        (weights, "fp32", "stand-ins", family)
        for weights in WEIGHTS
        for family in ("biases", "qk-norm", "windows", "gemma")
    ),
    *(
        ("int4", kv, kind, family)
        for kv in ("fp16", "int8")
        for kind in ("dense", "replay")
        for family in ("windows", "gemma")
    ),
]


@pytest.mark.parametrize(
    ("weights", "kv", "kind", "family"), CASES, ids=["-".join(c) for c in CASES]
)
def test_both_paths_agree(weights: str, kv: str, kind: str, family: str):
    engine = native(weights, kv, family)
    method = method_for(engine, kind)
    found = list(steps(engine, beside(engine, weights, family), method, 52))
    check(found, weights, kv, kind)


@pytest.mark.parametrize(
    "resting", ["dopamine", "serotonin", "gaba", "dopamine serotonin", "serotonin gaba"]
)
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_both_paths_agree_where_some_transmitters_rest(weights: str, resting: str):
    engine = native(weights)
    modulator = modulator_for(engine.shape, "stand-ins")
    phases = Phases.parse([f"{name}=prompt" for name in resting.split()])
    method = ModulatorMethod(modulator, 0.5, phases)
    found = list(steps(engine, beside(engine, weights), method, 70))
    check(found, weights, "fp32", "stand-ins")


@pytest.mark.parametrize("prefill", [0, 1, 15, 130])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_both_paths_agree_from_any_position(weights: str, summary: str, prefill: int):
    engine = native(weights)
    method = method_for(engine, "stand-ins", summary)
    found = list(steps(engine, beside(engine, weights), method, prefill))
    check(found, weights, "fp32", "stand-ins")


@pytest.mark.parametrize("kind", ["stand-ins", "plain", "ladder"])
def test_the_cases_skip_what_they_are_about(kind: str):
    engine = native("int8")
    sequence = engine.start(method_for(engine, kind))
    engine.forward([(sequence, IDS)], "none")
    plan = sequence.plan
    assert (plan.kv_blocks < plan.kv_blocks.max(1, keepdims=True)).any()
    assert (plan.channels < engine.shape.site_widths).any()
    if kind == "stand-ins":
        assert set(plan.ffn.ravel()) == {1, 2}
        assert set(plan.attention.ravel()) == {0, 1}
    if kind == "ladder":
        assert set(plan.bits.ravel()) == {16, 8, 4, 3, 2}


def whole(engine: Engine, method: Method, ids: list[int], prefill: int) -> tuple[Sequence, Tensor]:
    sequence = engine.start(method)
    if prefill:
        engine.forward([(sequence, ids[:prefill])], "none")
    return sequence, torch.cat([engine.forward([(sequence, [i])])[0] for i in ids[prefill:]])


@pytest.mark.parametrize("kind", ["stand-ins", "replay", "dense"])
@pytest.mark.parametrize("prefill", [0, 30])
def test_it_does_not_matter_when_a_plan_is_read(kind: str, prefill: int):
    """What many tokens did lies in the decoder's slot until somebody asks."""
    engine = native("int8")
    late, expected = whole(engine, method_for(engine, kind), IDS, prefill)
    often, logits = engine.start(method_for(engine, kind)), []
    if prefill:
        engine.forward([(often, IDS[:prefill])], "none")
    for t in range(prefill, 160):
        logits += engine.forward([(often, [IDS[t]])])
        assert often.plan.n_tokens == t + 1
    assert torch.equal(torch.cat(logits), expected)
    assert late.plan.equals(often.plan)
    assert late.cost == often.cost
    assert np.array_equal(late.levels, often.levels)
    levels = 160 if kind == "stand-ins" else 0
    assert late.levels.shape == (levels, 4, 5)


@contextmanager
def on_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


KINDS = ("stand-ins", "dense", "replay", "plain", "budget 1")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [2, 5, 16, 17])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_several_sequences_are_each_alone(weights: str, n: int, threads: int):
    """Bit for bit, whatever the others do and wherever they are."""
    with on_threads(threads):
        several_are_each_alone(weights, n)


def several_are_each_alone(weights: str, n: int) -> None:
    engine = native(weights, "fp16")
    methods = [method_for(engine, KINDS[i % 5], ("mean", "bounds")[i % 2], i) for i in range(n)]
    texts = [IDS[i:] + IDS[:i] for i in range(n)]
    sequences = [engine.start(method) for method in methods]
    for i, sequence in enumerate(sequences):
        if i:
            engine.forward([(sequence, texts[i][: 5 * i])], "none")
    out: list[list[Tensor]] = [[] for _ in range(n)]
    for step in range(4):
        results = engine.forward([(s, [texts[i][5 * i + step]]) for i, s in enumerate(sequences)])
        for i, logits in enumerate(results):
            out[i].append(logits)
    for i, method in enumerate(methods):
        alone, logits = whole(engine, method, texts[i][: 5 * i + 4], 5 * i)
        assert torch.equal(torch.cat(out[i]), logits), i
        assert sequences[i].plan.equals(alone.plan)
        assert sequences[i].cost == alone.cost
        assert np.array_equal(sequences[i].levels, alone.levels)


@contextmanager
def on_instructions(name: str) -> Iterator[None]:
    library = core.load()
    if library.vesicle_instructions(name.encode()) is None:
        pytest.skip(f"this processor or build has no {name}")
    try:
        yield
    finally:
        library.vesicle_instructions(None)


class Again(AbstractContextManager[None]):
    """A context manager that is entered for each step."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self._make = lambda: make(*arguments)

    def __enter__(self) -> None:
        self._now = self._make()
        self._now.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._now.__exit__(*error)


@pytest.mark.parametrize("kind", ["stand-ins", "replay"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_agree(weights: str, kind: str, threads: int):
    engine = native(weights)
    found = steps(engine, engine, method_for(engine, kind), 70, Again(on_threads, threads))
    check(list(found), weights, "fp32", kind)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_instruction_sets_agree(weights: str, kv: str, name: str):
    engine = native(weights, kv)
    method = method_for(engine, "replay")
    found = steps(engine, engine, method, 70, Again(on_instructions, name))
    check(list(found), weights, kv, "replay")


# What is skipped is not read ---------------------------------------------------------------------


def spoil(weight: Projection, first: int = 0) -> None:
    """Every weight, or every scale, becomes NaN; of values, keys and queries from `first` on."""
    if isinstance(weight, ChannelMajor):
        weight.weight[:, first:] = torch.nan
    elif isinstance(weight, PackedPair):
        assert first == weight.parts[0].n_out
        weight.parts[1].high.fill_(255)
    else:
        weight.high.fill_(255)


def last_logits(engine: Engine, plan: Plan, spoilt: Any = None) -> Tensor:
    stand_ins = modulator_for(engine.shape, "stand-ins").stand_ins
    sequence = engine.start(Replay(plan, stand_ins))
    engine.forward([(sequence, IDS[:69])], "none")
    if spoilt is not None:
        spoilt(sequence)
    return engine.forward([(sequence, [IDS[69]])])[0]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_skipped_modules_are_not_read(weights: str):
    engine = native(weights)
    plan = Plan.rest(engine.shape, 70)
    plan.ffn[69, 1], plan.ffn[69, 2], plan.attention[69, 2] = 0, 1, 0

    def spoilt(sequence: Sequence) -> None:
        layers = engine._weights.layers
        for weight in (layers[1].ffn_in, layers[1].ffn_out, layers[2].ffn_in, layers[2].ffn_out):
            spoil(weight)
        # The queries; values and keys are written.
        spoil(layers[2].attention_in, 2 * engine.shape.kv_width)
        spoil(layers[2].attention_out)

    expected = last_logits(engine, plan)
    assert torch.equal(last_logits(engine, plan, spoilt), expected)
    assert last_logits(engine, Plan.rest(engine.shape, 70)).isnan().any()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_trailing_planes_are_not_read(bits: int):
    engine = native("int8")
    plan = Plan.rest(engine.shape, 70)
    plan.bits[69] = bits
    expected = last_logits(engine, plan)

    def spoilt(sequence: Sequence) -> None:
        for layer in engine._weights.layers:
            for w in layer.projections:
                for part in w.parts if isinstance(w, PackedPair) else (w,):
                    part.trailing.fill_(255)

    assert torch.equal(last_logits(engine, plan, spoilt), expected)
    assert not torch.equal(last_logits(engine, Plan.rest(engine.shape, 70)), expected)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("what", ["codes", "scales"])
def test_skipped_channels_are_not_read(what: str, tokens: int, stored: int, name: str):
    """Codes of channels that are not read, and scales of groups of which none is."""
    generator = torch.Generator().manual_seed(0)
    weight = PackedWeight.pack(torch.randn(192, 96, generator=generator), stored)
    x = torch.randn(1, 96, generator=generator)
    x[:, 32:64] /= 1000
    unread = torch.ones(96, dtype=torch.bool)
    unread[x[0].abs().argsort(descending=True)[:40]] = False
    unread = unread.view(3, 32)
    assert unread[1].all()

    def product(channels: int) -> Tensor:
        out = torch.empty(tokens, 192)
        counts = np.full(tokens, channels, np.int32)
        core.packed_multiply(x.repeat(tokens, 1), weight, counts, 16, 192, out)
        return out

    with on_instructions(name):
        some, every = product(40), product(96)
        for first, tiles, width in _cuts(192):
            rows = (3, 32, width // 2)
            high = _high_part(weight.high, first, tiles, width, 3)
            if what == "scales":
                high[:, 1, 32 * width // 2 :] = 255
                continue
            high[..., : 32 * width // 2].view(tiles, *rows)[:, unread] = 255
            if weight.trailing is not None:
                _trailing_part(weight.trailing, first, tiles, width, 3).view(tiles, *rows)[
                    :, unread
                ] = 255
        assert torch.equal(product(40), some)
        assert not torch.equal(product(96), every)


@pytest.mark.parametrize("kv", KV)
def test_blocks_that_were_not_chosen_are_not_read(kv: str):
    engine = native("int4", kv)
    plan = Plan.rest(engine.shape, 70)
    plan.kv_blocks[69] = 2  # the first and its own

    def spoilt(sequence: Sequence) -> None:
        for layer in range(engine.shape.n_layers):
            # Summaries are read to choose, and are kept apart.
            for head in range(engine.shape.n_kv_heads):
                sequence.cache.summaries(layer, head, "bounds")
            pool, tables = engine.pool, sequence.cache.tables[layer]
            unread = torch.from_numpy(tables[:, 1:4]).long().ravel()
            stores = (pool.key_scales, pool.value_scales) if kv == "int8" else ()
            for store in stores or (pool.keys, pool.values):
                store[unread] = torch.nan

    modulator = modulator_for(engine.shape, "stand-ins")
    assert modulator.stand_ins.summary == "bounds"
    expected = last_logits(engine, plan)
    assert torch.equal(last_logits(engine, plan, spoilt), expected)
    rest = Plan.rest(engine.shape, 70)
    assert last_logits(engine, rest, spoilt).isnan().any()


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("company", [1, 20])
def test_what_a_window_leaves_behind_is_not_read(kv: str, company: int):
    """Neither blocks that lie there still, nor the part of a block that is out of sight."""
    engine = native("int4", kv, "windows")
    window = engine.shape.windows[0]

    def logits(spoil: int) -> Tensor:
        """Of position 100 and those that are read with it, entries below `spoil` damaged."""
        sequence = engine.start()
        engine.forward([(sequence, IDS[:100])], "none")
        cache, pool = sequence.cache, engine.pool
        for layer in range(engine.shape.n_layers):
            n_blocks = int(cache.n_blocks[layer, 0])
            tables, starts = (x[layer, :, :n_blocks].ravel() for x in (cache.tables, cache.starts))
            for block, start in zip(tables.tolist(), starts.tolist(), strict=True):
                n = int(np.clip(spoil - start, 0, 16))
                if kv == "int8":
                    pool.key_scales[block, :n] = pool.value_scales[block, :n] = torch.nan
                else:
                    pool.keys[block, :, :n] = pool.values[block, :n] = torch.nan
        return engine.forward([(sequence, IDS[100 : 100 + company])], "all")[0]

    first = 100 - window + 1
    assert first % 16
    for name in core.instruction_sets():
        with on_instructions(name):
            assert torch.equal(logits(first), logits(0)), name
            assert logits(first + 1)[0].isnan().any(), name


# The rest ----------------------------------------------------------------------------------------


def test_what_the_core_cannot_do_takes_the_general_path():
    dense, packed = native("fp32"), native("int4")
    plan = Plan.rest(dense.shape, 3)
    plan.bits[1] = 4
    for engine, covered in ((packed, True), (dense, False)):
        assert bool(engine._native.reach(engine.start(method_for(engine, "ladder")))) == covered
        sequence = engine.start(Replay(plan))
        assert engine._native.reach(sequence) == (3 if covered else 1)  # the one before it
        for token in IDS[:3]:
            engine.forward([(sequence, [token])])
        assert all(
            np.array_equal(getattr(sequence.plan, name), getattr(plan, name)) for name in DECIDED
        )
        with pytest.raises(VesicleError, match="the plan covers 3 tokens; token 3 was asked for"):
            engine.forward([(sequence, [1])])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_steps_and_passes_mix(weights: str):
    """Single tokens, chunks and other sequences' tokens in one call, as each alone."""
    engine = native(weights)
    method = method_for(engine, "stand-ins")
    a, b, c = (engine.start(method) for _ in range(3))
    first = engine.forward([(a, IDS[:20]), (b, IDS[:1]), (c, IDS[:7])])
    second = engine.forward([(a, IDS[20:21]), (b, IDS[1:2]), (c, IDS[7:12])])
    for sequence, one, two, cut, end in (
        (a, first[0], second[0], 20, 21),
        (b, first[1], second[1], 1, 2),
        (c, first[2], second[2], 7, 12),
    ):
        alone = engine.start(method)
        expected = [engine.forward([(alone, IDS[i:j])])[0] for i, j in ((0, cut), (cut, end))]
        tolerance = TOLERANCE if weights == "fp32" else 1.0
        assert (
            max((x - y).abs().max() for x, y in zip(expected, (one, two), strict=True)) < tolerance
        )
        assert sequence.length == alone.length == end
