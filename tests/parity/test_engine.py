"""The engine against the reference: one Plan gives the same logits, one method the same Plan.

The engine's arithmetic is fp64 here but for the scores of chosen blocks, while the RMSNorm and
rotary phases of transformers are fp32 in an fp64 model; that sets the tolerance.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import (
    DECIDED,
    random_plan,
    shape_of,
    tiny_control,
    tiny_model,
    tiny_modulator,
    tokens,
)
from vesicle.cost import price, price_dense, price_tokens
from vesicle.engine import Engine, Sequence, core, linear
from vesicle.engine.chunk import OTHERS
from vesicle.errors import VesicleError
from vesicle.modulator import Modulator
from vesicle.plan import Dense, Method, Plan, Replay, StandIns
from vesicle.predictors import CONTROLS, PREDICTORS
from vesicle.reference.attach import attach

FP64 = 5e-5
"""Largest difference of logits about 2 in size."""
FP32 = 2e-3
SAME = 1e-5
"""Of the engine against itself: attention over chosen blocks takes its softmax in fp32, and a pass
in which no token chooses does not."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def reference(model: Any, ids: Tensor, method: Method) -> tuple[Tensor, Plan]:
    with attach(model, method) as run:
        logits = model(ids).logits[0]
    return logits, run.plan


def executed(
    engine: Engine, ids: Tensor, method: Method, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, Sequence]:
    sequence, row = engine.start(method), ids[0].tolist()
    pieces = [
        engine.forward([(sequence, row[start:stop])], logits="all")[0]
        for start, stop in zip((0, *cuts), (*cuts, len(row)), strict=True)
    ]
    return torch.cat(pieces), sequence


def close(first: Tensor, second: Tensor, tolerance: float) -> None:
    assert first.shape == second.shape
    difference = (first.double() - second.double()).abs()
    worst = difference.amax(-1).argmax()
    assert difference.max() < tolerance, (
        f"max {difference.max():.2e} at token {worst}, mean {difference.mean():.2e}"
    )


def counted(sequence: Sequence, engine: Engine) -> None:
    """What the engine counted is what the ledger says of the Plan, token by token."""
    prices = price_tokens(sequence.plan, engine.shape, sequence.overhead)
    for name, values in prices.items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)
    assert sequence.cost == price(sequence.plan, engine.shape, sequence.overhead)


def test_dense(model: Any, ids: Tensor):
    engine = Engine.from_model(model)
    logits, sequence = executed(engine, ids, Dense())
    close(logits, model(ids).logits[0], FP64)
    assert sequence.plan.equals(Plan.rest(engine.shape, 70))
    assert sequence.cost == price_dense(engine.shape, 70)
    counted(sequence, engine)


def test_dense_fp32(family: str, ids: Tensor):
    model = tiny_model(family, dtype=torch.float32)
    close(executed(Engine.from_model(model), ids, Dense())[0], model(ids).logits[0], FP32)


def test_a_modulator_at_rest_is_dense(model: Any, ids: Tensor):
    engine = Engine.from_model(model)
    logits, sequence = executed(engine, ids, tiny_modulator(engine.shape).at(1.0))
    assert torch.equal(logits, executed(engine, ids, Dense())[0])
    assert sequence.cost == price_dense(engine.shape, 70)


@pytest.mark.parametrize("name", [*DECIDED, "all"])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_execution(model: Any, ids: Tensor, rng: np.random.Generator, name: str, summary: str):
    """One Plan, both executors: each field alone, then all."""
    shape = shape_of(model)
    varied = random_plan(shape, 70, rng)
    plan = varied
    if name != "all":
        plan = Plan.rest(shape, 70).with_fields(**{name: getattr(varied, name)})
    stand_ins = tiny_modulator(shape, summary=summary).stand_ins
    method = Replay(plan, stand_ins)
    engine = Engine.from_model(model)
    logits, sequence = executed(engine, ids, method)
    close(logits, reference(model, ids, method)[0], FP64)
    assert sequence.plan.equals(plan)
    counted(sequence, engine)
    assert (logits - model(ids).logits[0]).abs().mean() > 0.01


def test_execution_without_stand_ins(model: Any, ids: Tensor, rng: np.random.Generator):
    method = Replay(random_plan(shape_of(model), 70, rng), StandIns())
    logits, _ = executed(Engine.from_model(model), ids, method)
    close(logits, reference(model, ids, method)[0], FP64)


@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_decisions(model: Any, ids: Tensor, kind: str):
    engine = Engine.from_model(model)
    method = tiny_modulator(engine.shape, kind, ladder=True, bypass_below=0.2).at(0.6)
    logits, sequence = executed(engine, ids, method)
    expected, plan = reference(model, ids, method)
    assert sequence.plan.equals(plan)
    close(logits, expected, FP64)
    counted(sequence, engine)
    assert sequence.levels.shape == (70, 3, 5)


@pytest.mark.parametrize("kind", list(CONTROLS))
def test_decisions_of_controls(llama: Any, ids: Tensor, modulator: Modulator, kind: str):
    engine = Engine.from_model(llama)
    method = modulator.with_levels(tiny_control(kind, modulator.predictor.config)).at(0.6)
    logits, sequence = executed(engine, ids, method)
    expected, plan = reference(llama, ids, method)
    assert sequence.plan.equals(plan)
    close(logits, expected, FP64)
    counted(sequence, engine)


CUTS = {"chunks": (1, 17, 48, 64), "tokens": tuple(range(1, 70))}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_pieces_are_the_whole(model: Any, ids: Tensor, cuts: tuple[int, ...], summary: str):
    engine = Engine.from_model(model)
    modulator = tiny_modulator(engine.shape, "recurrent", ladder=True, summary=summary)
    whole, first = executed(engine, ids, modulator.at(0.6))
    pieces, second = executed(engine, ids, modulator.at(0.6), cuts)
    assert second.plan.equals(first.plan)
    close(pieces, whole, SAME)
    assert second.cost == first.cost
    counted(second, engine)


@pytest.mark.parametrize("t", [0, 16, 40])
def test_causal(llama: Any, ids: Tensor, t: int):
    engine = Engine.from_model(llama)
    method = tiny_modulator(engine.shape, "recurrent", ladder=True).at(0.6)
    other = ids.clone()
    other[:, t + 1 :] = tokens(69 - t, seed=8)
    (a, first), (b, second) = (executed(engine, x, method) for x in (ids, other))
    assert first.plan.tokens(0, t + 1).equals(second.plan.tokens(0, t + 1))
    close(a[: t + 1], b[: t + 1], SAME)


@pytest.mark.parametrize("running", [0, 1, 2])
def test_the_only_running_token_of_a_chunk_sees_no_later_one(llama: Any, ids: Tensor, running: int):
    """The others have written their keys and values into the cache before it reads."""
    engine = Engine.from_model(llama)
    rest = Plan.rest(engine.shape, 70)
    runs = rest.attention.copy()
    runs[[t for t in (50, 51, 52) if t != 50 + running], 1] = 0
    method = Replay(rest.with_fields(attention=runs), tiny_modulator(engine.shape).stand_ins)
    logits, _ = executed(engine, ids, method, (50, 53))
    close(logits, reference(llama, ids, method)[0], FP64)


def test_a_ragged_batch_is_its_sequences(model: Any, rng: np.random.Generator):
    """Different lengths, positions and methods in each pass, some sequences starting later."""
    engine = Engine.from_model(model)
    modulator = tiny_modulator(engine.shape, "recurrent", ladder=True, bypass_below=0.2)
    bounds = tiny_modulator(engine.shape, summary="bounds", seed=4)
    methods: list[Method] = [
        modulator.at(0.6),
        Dense(),
        modulator.at(0.3),
        bounds.at(0.6),
        Replay(random_plan(engine.shape, 50, rng), bounds.stand_ins),
        Replay(random_plan(engine.shape, 50, rng)),
    ]
    texts = [tokens(50, seed=i) for i in range(len(methods))]
    sequences = [engine.start(method) for method in methods]
    at, pieces = [0] * len(methods), [[] for _ in methods]
    while min(at) < 50:
        batch = []
        for i in rng.permutation(len(methods)):
            n = int(min(50 - at[i], rng.choice([0, 1, 1, 7, 30])))
            if n:
                batch.append((i, texts[i][0, at[i] : at[i] + n].tolist()))
                at[i] += n
        if batch:
            results = engine.forward([(sequences[i], row) for i, row in batch], logits="all")
            for (i, _), result in zip(batch, results, strict=True):
                pieces[i].append(result)
    for i, method in enumerate(methods):
        alone, sequence = executed(engine, texts[i], method)
        assert sequences[i].plan.equals(sequence.plan)
        close(torch.cat(pieces[i]), alone, SAME)
        assert sequences[i].cost == sequence.cost
        counted(sequences[i], engine)


def test_last_logits_are_the_last_of_all(llama: Any, modulator: Modulator, ids: Tensor):
    engine = Engine.from_model(llama)
    every, first = executed(engine, ids, modulator.at(0.6))
    second = engine.start(modulator.at(0.6))
    (last,) = engine.forward([(second, ids[0].tolist())])
    close(last, every[-1:], SAME)
    asked = np.arange(70) == 69
    assert second.cost == price(second.plan, engine.shape, second.overhead, with_logits=asked)
    assert first.cost.flops_head == 70 * second.cost.flops_head


def test_generate_is_the_references(model: Any):
    prompt = tokens(20)
    engine = Engine.from_model(model)
    method = tiny_modulator(engine.shape, "recurrent").at(0.6)
    with attach(model, method) as run:
        text = model.generate(prompt, max_new_tokens=30, do_sample=False)
    new, sequence = engine.generate(prompt[0].tolist(), method, max_new_tokens=30)
    assert new == text[0, 20:].tolist()
    assert sequence.plan.equals(run.plan)


@pytest.mark.parametrize("summary", ["mean", "bounds"])
def test_the_native_core_is_the_torch_pass(family: str, ids: Tensor, summary: str):
    model = tiny_model(family, dtype=torch.float32)
    engine = Engine.from_model(model)
    stand_ins = tiny_modulator(engine.shape, summary=summary, dtype=torch.float32).stand_ins
    plan = random_plan(engine.shape, 70, np.random.default_rng(3))
    rest = Plan.rest(engine.shape, 70)
    plan = plan.with_fields(**{name: getattr(rest, name) for name in ("bits", *OTHERS)})
    method = Replay(plan, stand_ins)
    if core.available():
        assert engine._native is not None
        assert engine._native.reach(engine.start(method)) == 70
    first, a = executed(engine, ids, method, (40,))
    engine._native = None
    second, b = executed(engine, ids, method, (40,))
    close(first, second, FP32)
    assert a.cost == b.cost
    counted(a, engine)


def test_skipped_weights_are_not_read(model: Any, ids: Tensor):
    """Weights of layers that the Plan skips may be anything."""
    engine = Engine.from_model(model)
    rest = Plan.rest(engine.shape, 70)
    ffn, runs = rest.ffn.copy(), rest.attention.copy()
    ffn[:, 1], ffn[:, 2], runs[:, 2] = 0, 1, 0
    stand_ins = tiny_modulator(engine.shape).stand_ins
    method = Replay(rest.with_fields(ffn=ffn, attention=runs), stand_ins)
    before, _ = executed(engine, ids, method)
    layers = engine._weights.layers
    for weight in (layers[1].ffn_in, layers[1].ffn_out, layers[2].ffn_in, layers[2].attention_out):
        weight.weight.fill_(torch.nan)
    layers[2].attention_in.weight[:, 2 * engine.shape.kv_width :] = torch.nan
    assert torch.equal(executed(engine, ids, method)[0], before)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_skipped_channels_are_not_read(dtype: torch.dtype, bits: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator).to(dtype)
    weight = torch.randn(30, 48, generator=generator).to(dtype)
    w = linear.ChannelMajor.stack([weight[:12], weight[12:]], [None, None])
    counts = np.array([1, 10, 47, 24, 30], np.int32)
    settings = np.full(5, bits, np.int32)
    expected, _ = linear.project(x, w, counts, settings)
    for t, count in enumerate(counts.tolist()):
        poisoned = replace(w, weight=w.weight.clone())
        skipped = x[t].abs().argsort()[: 48 - count]
        # At fewer bits the codes are read and the stored weights are not read at all.
        poisoned.weight[skipped if bits == 16 else slice(None)] = torch.nan
        out, read = linear.project(x[t : t + 1], poisoned, counts[t : t + 1], settings[t : t + 1])
        close(out, expected[t : t + 1], 1e-5)
        assert read.tolist() == [count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_skipped_blocks_are_not_read(ids: Tensor, dtype: torch.dtype):
    model = tiny_model("llama", dtype=dtype)
    engine = Engine.from_model(model)
    rest = Plan.rest(engine.shape, 70)
    blocks = rest.kv_blocks.copy()
    blocks[69] = 2
    method = Replay(rest.with_fields(kv_blocks=blocks))
    logits = []
    for poison in (False, True):
        sequence = engine.start(method)
        engine.forward([(sequence, ids[0, :69].tolist())])
        if poison:
            for layer in range(engine.shape.n_layers):
                # Summaries are read to choose, and are kept apart.
                for head in range(engine.shape.n_kv_heads):
                    sequence.cache.summaries(layer, head, "mean")
                unread = torch.from_numpy(sequence.cache.tables[layer, :, 1:4]).ravel()
                engine.pool.keys[unread] = torch.nan
                engine.pool.values[unread] = torch.nan
        logits += engine.forward([(sequence, ids[0, 69:].tolist())])
    assert torch.isfinite(logits[1]).all()
    close(*logits, 1e-5 if dtype == torch.float32 else SAME)


def test_what_is_refused(llama: Any, modulator: Modulator):
    engine = Engine.from_model(llama)
    with pytest.raises(VesicleError, match="no tokens"):
        engine.forward([(engine.start(Dense()), [])])
    for token in (-1, 97):
        with pytest.raises(VesicleError, match=rf"token id {token} is out of range; allowed: 0 to"):
            engine.forward([(engine.start(Dense()), [3, token])])
    with pytest.raises(VesicleError, match="513 tokens exceed the model's context window of 512"):
        engine.forward([(engine.start(Dense()), [1] * 513)])
    with pytest.raises(VesicleError, match="this modulator was made for tiny"):
        engine.start(tiny_modulator(replace(engine.shape, width=50)).at(0.5))
    with pytest.raises(VesicleError, match="the plan covers 3 tokens; token 3 was asked for"):
        engine.forward([(engine.start(Replay(Plan.rest(engine.shape, 3))), [1] * 4)])


def test_a_refused_pass_changes_nothing(llama: Any, modulator: Modulator, ids: Tensor):
    engine = Engine.from_model(llama)
    row = ids[0].tolist()
    a, b = engine.start(modulator.at(0.6)), engine.start(modulator.at(0.6))
    engine.forward([(a, row[:40])])
    with pytest.raises(VesicleError, match="out of range"):
        engine.forward([(a, row[40:]), (b, [1000])])
    (last,) = engine.forward([(a, row[40:])])
    close(last, executed(engine, ids, modulator.at(0.6))[0][-1:], SAME)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_saved_model_is_the_same(
    family: str, ids: Tensor, tmp_path: Path, dtype: torch.dtype | None
):
    from vesicle.engine import weights

    model = tiny_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    engine = Engine(weights.from_folder(tmp_path, dtype))
    assert torch.equal(
        executed(engine, ids, Dense())[0], executed(Engine.from_model(model), ids, Dense())[0]
    )
