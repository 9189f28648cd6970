"""Ledger: what it prices without running is what the engine counts when it runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.decoding import modulator_for, tiny
from tests.evaluation.helpers import Bytes, ledger_of
from tests.tiny import SHAPE, shape_of, tiny_modulator, tokens
from vesicle.cost import price, price_dense
from vesicle.engine import Engine
from vesicle.evaluation.execution.engine_executor import EngineExecutor
from vesicle.evaluation.execution.executor import Execution, Span
from vesicle.evaluation.execution.prompts import Prompt
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.modulator import Modulator
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import FloatArray
from vesicle.transmitters import index

LENGTHS = (40, 23, 61)
CHOICES = ([5, 6, 7, 8], [9], [10, 11])


def executor_of(model: Any, weights: str = "fp64") -> EngineExecutor:
    return EngineExecutor(Engine.from_model(model, weights=weights))


def ids_of(i: int, length: int) -> list[int]:
    found: list[int] = tokens(length, seed=i)[0].tolist()
    return found


def run(
    kind: str,
    executor: EngineExecutor,
    modulator: Modulator,
    deficits: Sequence[FloatArray],
    phases: Phases,
) -> list[Execution]:
    """Items of three lengths, each under deficits of its own."""
    ledger = Ledger(modulator, executor.shape, [(Span(0, 1, 0),)], phases=phases)
    found = []
    for i, (length, own) in enumerate(zip(LENGTHS, deficits, strict=True)):
        method = ledger.method(ledger.table(own))
        prompt = Prompt(ids=ids_of(i, length), n_context=0)
        if kind == "generate":
            found.append(executor.generate(prompt, method, Bytes(), max_new_tokens=9 - 4 * i))
        elif kind == "choose":
            found.append(executor.choose(prompt, CHOICES, method))
        else:
            found.append(executor.loss(prompt.ids, method))
    return found


def counted_spans(found: Sequence[Execution], phases: Phases) -> list[tuple[Span, ...]]:
    """The tokens that a budget counts: the generated ones, unless all are treated alike."""
    if phases == EVERYWHERE:
        return [e.spans for e in found]
    return [tuple(span.behind(e.prompt) for span in e.spans) for e in found]


def executed(found: Sequence[Execution], executor: EngineExecutor, phases: Phases) -> float:
    """Counted FLOPs over those of the dense model on the same tokens."""
    counted = sum(e.prefill.flops_total + e.decode.flops_total for e in found)
    if phases != EVERYWHERE:
        counted = sum(e.generated.flops_total for e in found)
    spans = counted_spans(found, phases)
    return counted / sum(executor.dense(part).flops_total for part in spans)


def of_one(deficits: FloatArray) -> list[FloatArray]:
    return [deficits] * len(LENGTHS)


PHASES = pytest.mark.parametrize(
    "phases",
    [Phases(), EVERYWHERE, Phases.parse(["gaba=all"]), Phases.parse(["dopamine=prompt"])],
    ids=["generated", "all", "gaba on all", "dopamine on prompts"],
)
KINDS = pytest.mark.parametrize("kind", ["generate", "choose", "loss"])


@KINDS
@PHASES
@pytest.mark.parametrize("timed", [False, True])
def test_the_price_is_what_the_engine_counts(kind: str, timed: bool, llama: Any, phases: Phases):
    """Answers, branches of one prompt, and windows; deficits of layers alone and of tokens too."""
    executor = executor_of(llama)
    modulator = tiny_modulator(executor.shape, bypass_below=0.3)
    rng = np.random.default_rng(4)
    deficits = rng.uniform(0, 0.9, (80, 3, 3) if timed else (3, 3))
    found = run(kind, executor, modulator, of_one(deficits), phases)
    spans = counted_spans(found, phases)
    ledger = Ledger(modulator, executor.shape, spans, screens=True, phases=phases)
    longest = max(span.stop for e in found for span in e.spans)
    share = ledger.share(deficits[:longest] if timed else deficits)
    assert share == executed(found, executor, phases)
    assert share < (1 if phases.dopamine == "prompt" else 0.95)
    assert ledger.n_tokens == longest


@KINDS
@PHASES
def test_each_item_has_deficits_of_its_own(kind: str, llama: Any, phases: Phases):
    """Those of the first two start over before their item ends, as replayed levels do."""
    executor = executor_of(llama)
    modulator = tiny_modulator(executor.shape)
    rng = np.random.default_rng(5)
    own = [rng.uniform(0, 1, (n, 3, 3)) for n in (17, 5, 80)]
    found = run(kind, executor, modulator, own, phases)
    spans = counted_spans(found, phases)
    ledger = Ledger(modulator, executor.shape, spans, screens=False, phases=phases)
    assert ledger.each(own) == executed(found, executor, phases)
    assert ledger.each(own) != ledger.each(own[1:] + own[:1])
    same = [np.tile(own[0][:1], (80, 1, 1))] * 3
    assert ledger.each(same) == ledger.share(own[0][0])
    with pytest.raises(ValueError, match="shorter"):
        ledger.each(own[:2])


def test_resting_levels_cost_as_much_as_the_dense_model(llama: Any):
    executor = executor_of(llama)
    modulator = tiny_modulator(executor.shape)
    spans = [(Span(0, 30, 29), Span(30, 34, 30)), (Span(0, 70, 0),)]
    ledger = Ledger(modulator, executor.shape, spans, screens=True)
    assert ledger.share(np.zeros((3, 3))) == 1.0
    assert ledger.each([np.zeros((9, 3, 3))] * 2) == 1.0


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("screens", [False, True])
def test_a_screened_head_is_priced(weights: str, screens: bool):
    """Some tokens' dopamine lies below the level from which the head is screened."""
    executor = executor_of(tiny(), weights)
    shape = executor.shape
    modulator = modulator_for(shape, "plain", head_survivors=11, head_below=0.6)
    n_transmitters = len(modulator.predictor.config.transmitters)
    deficits = np.random.default_rng(6).uniform(0, 0.8, (80, 4, n_transmitters))
    found = run("generate", executor, modulator, of_one(deficits), EVERYWHERE)
    ledger = Ledger(modulator, shape, [e.spans for e in found], screens=screens, phases=EVERYWHERE)
    share = ledger.share(deficits[: ledger.n_tokens])
    counted = executed(found, executor, EVERYWHERE)
    heads = sum(s.stop - max(s.head, s.start) for e in found for s in e.spans)
    ran = sum(e.prefill.flops_head + e.decode.flops_head for e in found)
    again = ran - 2 * shape.width * shape.vocabulary * heads
    assert again % (2 * shape.width * 11) == 0
    if not shape.screens_head:  # nothing is ranked twice where four bits are all there is
        assert again == 0
        assert share == counted
        return
    assert 0 < again < 2 * shape.width * 11 * heads
    dense = sum(executor.dense(e.spans).flops_total for e in found)
    assert share == (counted if screens else pytest.approx(counted - again / dense, rel=1e-12))


def test_the_last_layers_dopamine_screens_the_head():
    shape = executor_of(tiny(), "int8").shape
    modulator = modulator_for(shape, "plain", head_survivors=11, head_below=0.6)
    ledger = Ledger(modulator, shape, [(Span(0, 40, 0),)], screens=True)
    levels = np.random.default_rng(9).uniform(0, 1, (40, 4, 5))
    low = levels[:, -1, index("dopamine")] < 0.6
    assert 5 < low.sum() < 35
    assert ledger.plan(levels).head.tolist() == np.where(low, 11, 0).tolist()


def test_only_a_head_that_can_be_screened_is(llama: Any):
    shape = shape_of(llama)
    modulator = modulator_for(shape, "plain", head_survivors=11)
    levels = np.full((20, 3, 5), 0.5)
    ledger = Ledger(modulator, shape, [(Span(0, 20, 0),)], screens=True)
    assert not ledger.plan(levels).head.any()


def test_of_whole_windows_it_is_the_price_of_their_plan():
    modulator, rng = tiny_modulator(SHAPE, bypass_below=0.3), np.random.default_rng(7)
    ledger = ledger_of(modulator, SHAPE, 70, n=2)
    overhead = ledger.method(ledger.table(np.zeros((3, 3)))).overhead(SHAPE)
    dense = price_dense(SHAPE, 70).flops_total

    def plainly(deficits: FloatArray) -> float:
        levels = np.ones((70, 3, 5))
        levels[..., ledger.columns] = 1.0 - np.clip(deficits, 0.0, 1.0)
        return price(ledger.plan(levels), SHAPE, overhead).flops_total / dense

    for size in ((3, 3), (70, 3, 3)):
        for deficits in (np.zeros(size), np.ones(size), rng.uniform(-0.2, 1.2, size)):
            assert ledger.share(deficits) == plainly(deficits)
    own = [rng.uniform(-0.2, 1.2, (70, 3, 3)) for _ in range(2)]
    assert ledger.share(own) == pytest.approx((plainly(own[0]) + plainly(own[1])) / 2, rel=1e-12)
    assert ledger.share(rng.uniform(0, 1, (3, 3))) < 1


def test_items_add_up():
    """A span's work is that of a Plan's tokens, priced where they stand."""
    modulator, rng = tiny_modulator(SHAPE), np.random.default_rng(8)
    spans = [(Span(0, 33, 32), Span(33, 33, 33), Span(33, 40, 33)), (Span(0, 50, 20),)]
    ledger = Ledger(modulator, SHAPE, spans, screens=False)
    levels = rng.uniform(0, 1, (50, 3, 5)).round(6)
    levels[..., [i for i in range(5) if i not in ledger.columns]] = 1.0
    plan = ledger.plan(levels)
    overhead = ledger.method(ledger.table(np.zeros((3, 3)))).overhead(SHAPE)
    total = dense = 0
    for span in (s for item in spans for s in item if s.stop > s.start):
        heads = np.arange(span.start, span.stop) >= span.head
        where: dict[str, Any] = {"first_position": span.start, "with_logits": heads}
        part = plan.tokens(span.start, span.stop)
        total += price(part, SHAPE, overhead, **where).flops_total
        dense += price_dense(SHAPE, span.stop - span.start, **where).flops_total
    deficits = 1 - levels[..., ledger.columns]
    assert ledger.share(deficits) == pytest.approx(total / dense, rel=1e-12)


MODULATOR = tiny_modulator(SHAPE, bypass_below=0.3)
TABLES = st.lists(st.floats(0, 1), min_size=9, max_size=9).map(
    lambda values: np.array(values).reshape(3, 3)
)


@given(
    deficits=TABLES,
    rise=TABLES,
    prompt=st.integers(1, 70),
    answer=st.integers(0, 12),
    branch=st.integers(0, 12),
)
def test_share_falls_as_deficits_rise(
    deficits: FloatArray, rise: FloatArray, prompt: int, answer: int, branch: int
):
    """Up to a few blocks of context: in long ones, choosing a block costs what reading one does."""
    spans = (
        Span(0, prompt, prompt - 1),
        Span(prompt, prompt + answer, prompt),
        Span(prompt, prompt + branch, prompt),
    )
    ledger = Ledger(MODULATOR, SHAPE, [spans], screens=False)
    more = np.minimum(deficits + rise, 1.0)
    assert ledger.share(np.ones((3, 3))) <= ledger.share(more) <= ledger.share(deficits) <= 1.0
    assert ledger.share(np.ones((3, 3))) < 0.7
    assert ledger.each([np.stack([more] * 3)]) == ledger.share(more)
