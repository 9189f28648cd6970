"""The reference decides causally, and alike whole, in chunks, token by token and in a batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.tiny import (
    DECIDED,
    random_plan,
    shape_of,
    tiny_control,
    tiny_model,
    tiny_modulator,
    tokens,
)
from vesicle.families import cache_argument
from vesicle.modulator import Modulator
from vesicle.plan import Method, Plan, Replay
from vesicle.predictors import CONTROLS, PREDICTORS
from vesicle.reference.attach import Run, attach

SDPA, EAGER = 1e-9, 1e-4
"""Largest difference of fp64 logits, whose size is about 2. sdpa works in fp64 throughout, but for
norms and rotary phases, which see the same numbers in every pass; eager takes its softmax in fp32,
whose sums depend on how many masked positions they run over."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_pieces(model: Any, ids: Tensor, method: Method, cuts: tuple[int, ...]) -> tuple[Tensor, Run]:
    cache = DynamicCache()
    with attach(model, method) as run:
        pieces = [
            model(ids[:, start:stop], use_cache=True, **cache_argument(model, cache)).logits
            for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True)
        ]
    return torch.cat(pieces, dim=1), run


def agree(first: tuple[Tensor, Run], second: tuple[Tensor, Run], tolerance: float) -> None:
    assert first[1].plans[0].equals(second[1].plans[0])
    difference = (first[0] - second[0]).abs()
    assert difference.max() < tolerance, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


CUTS = {"chunks": (1, 17, 48, 64), "tokens": tuple(range(1, 70))}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_pieces_are_the_whole(variant: tuple[str, str], ids: Tensor, cuts: tuple[int, ...]):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    modulator = tiny_modulator(shape_of(model), "recurrent", ladder=True, bypass_below=0.2)
    method = modulator.at(0.6)
    whole, pieces = in_pieces(model, ids, method, ()), in_pieces(model, ids, method, cuts)
    agree(whole, pieces, SDPA if attention == "sdpa" else EAGER)
    np.testing.assert_allclose(whole[1].levels[0], pieces[1].levels[0], rtol=0, atol=1e-5)
    ruled = {rule.field for rule in modulator.rules(shape_of(model))}
    for name in ruled.intersection(DECIDED):
        assert len(np.unique(getattr(whole[1].plan, name))) > 1, f"{name} never varies"


@pytest.mark.parametrize("summary", ["mean", "bounds"])
@pytest.mark.parametrize("kind", [*PREDICTORS, *CONTROLS])
def test_pieces_are_the_whole_for_every_kind_of_levels(
    llama: Any, ids: Tensor, kind: str, summary: str
):
    modulator = tiny_modulator(shape_of(llama), summary=summary)
    if kind in CONTROLS:
        modulator = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    else:
        modulator = tiny_modulator(shape_of(llama), kind, summary=summary)
    method = modulator.at(0.6)
    agree(in_pieces(llama, ids, method, ()), in_pieces(llama, ids, method, (5, 40, 41)), SDPA)


@pytest.mark.parametrize(
    ("kind", "budget"),
    [*((kind, 0.5) for kind in PREDICTORS), *(("linear", dial) for dial in (0.25, 0.6, 0.75))],
)
def test_levels_on_a_threshold_do_not_flip(llama: Any, ids: Tensor, kind: str, budget: float):
    """An untrained modulator releases the dial itself, which lands on steps and whole channels."""
    method = Modulator.new(shape_of(llama), predictor=kind).at(budget)
    agree(in_pieces(llama, ids, method, ()), in_pieces(llama, ids, method, CUTS["tokens"]), SDPA)


@pytest.mark.parametrize("t", [0, 15, 16, 40, 68])
def test_causal(model: Any, ids: Tensor, t: int):
    """Other tokens after t change neither Plan, levels nor logits up to t."""
    method = tiny_modulator(shape_of(model), "recurrent", ladder=True).at(0.6)
    other = ids.clone()
    other[:, t + 1 :] = tokens(69 - t, seed=8)
    a, b = in_pieces(model, ids, method, ()), in_pieces(model, other, method, ())
    assert a[1].plan.tokens(0, t + 1).equals(b[1].plan.tokens(0, t + 1))
    assert not a[1].plan.equals(b[1].plan)
    np.testing.assert_array_equal(a[1].levels[0][: t + 1], b[1].levels[0][: t + 1])
    assert torch.equal(a[0][:, : t + 1], b[0][:, : t + 1])


@pytest.mark.parametrize("cuts", [(), (30,)], ids=["whole", "chunks"])
def test_a_replayed_plan_is_the_run(variant: tuple[str, str], ids: Tensor, cuts: tuple[int, ...]):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    method = tiny_modulator(shape_of(model), ladder=True, bypass_below=0.2, summary="bounds").at(
        0.6
    )
    first = in_pieces(model, ids, method, cuts)
    again = in_pieces(model, ids, Replay(first[1].plan, method.stand_ins), cuts)
    assert again[1].plan.equals(first[1].plan)
    assert torch.equal(again[0], first[0])


def test_equipment_matters(llama: Any, ids: Tensor, modulator: Modulator):
    """A Plan without its stand-ins, or with another summary, is another run."""
    method = modulator.at(0.6)
    first = in_pieces(llama, ids, method, ())
    bare = in_pieces(llama, ids, Replay(first[1].plan), ())
    assert bare[1].plan.equals(first[1].plan)
    assert (bare[0] - first[0]).abs().max() > 0.1


def test_random_plans_run_in_pieces(model: Any, ids: Tensor, rng: np.random.Generator):
    shape = shape_of(model)
    method = Replay(random_plan(shape, 70, rng), tiny_modulator(shape).stand_ins)
    whole = in_pieces(model, ids, method, ())
    assert whole[1].plan.equals(method.plan)
    agree(whole, in_pieces(model, ids, method, (3, 50)), SDPA)


LENGTHS = (70, 41, 16, 1)


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids of a batch, padded on the left."""
    batch = torch.zeros(len(LENGTHS), 70, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, n in enumerate(LENGTHS):
        batch[row, 70 - n :], mask[row, 70 - n :] = tokens(n, seed=row)[0], 1
    return batch, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def test_a_padded_batch_is_its_sequences(variant: tuple[str, str]):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    method = tiny_modulator(shape_of(model), "recurrent", ladder=True).at(0.6)
    batch, mask, positions = padded()
    with attach(model, method) as run:
        logits = model(batch, attention_mask=mask, position_ids=positions).logits
    assert [p.n_tokens for p in run.plans] == list(LENGTHS)
    for row, n in enumerate(LENGTHS):
        alone = in_pieces(model, batch[row : row + 1, 70 - n :], method, ())
        assert run.plans[row].equals(alone[1].plan)
        np.testing.assert_allclose(run.levels[row], alone[1].levels[0], rtol=0, atol=1e-5)
        difference = (logits[row, 70 - n :] - alone[0][0]).abs().max()
        assert difference < (SDPA if attention == "sdpa" else EAGER), f"row {row}: {difference:.2e}"


def test_a_padded_batch_generates_its_sequences(family: str):
    model = tiny_model(family)
    method = tiny_modulator(shape_of(model), "recurrent").at(0.6)
    batch, mask, _ = padded()
    with attach(model, method) as run:
        both = model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False)
    plans = run.plans
    assert [p.n_tokens for p in plans] == [n + 7 for n in LENGTHS]
    for row, n in enumerate(LENGTHS):
        with attach(model, method) as run:
            alone = model.generate(
                batch[row : row + 1, 70 - n :], max_new_tokens=8, do_sample=False
            )
        assert torch.equal(both[row, 70:], alone[0, n:])
        assert plans[row].equals(run.plan)


def test_a_batch_of_equals(llama: Any, modulator: Modulator):
    batch = tokens(70, batch=3)
    with attach(llama, modulator, 0.6) as run:
        logits = llama(batch).logits
    for row in range(3):
        alone = in_pieces(llama, batch[row : row + 1], modulator.at(0.6), ())
        assert run.plans[row].equals(alone[1].plan)
        assert (logits[row] - alone[0][0]).abs().max() < SDPA
    assert run.cost.flops_total == sum(
        in_pieces(llama, batch[row : row + 1], modulator.at(0.6), ())[1].cost.flops_total
        for row in range(3)
    )


def test_a_static_cache_is_a_dynamic_one(llama: Any, modulator: Modulator):
    prompt = tokens(40)
    texts, plans = [], []
    for kind in ("dynamic", "static"):
        with attach(llama, modulator, 0.6) as run:
            texts.append(
                llama.generate(
                    prompt,
                    max_new_tokens=12,
                    do_sample=False,
                    cache_implementation=kind,
                    disable_compile=True,
                )
            )
        plans.append(run.plan)
    assert torch.equal(*texts)
    assert plans[0].equals(plans[1])


def test_no_sequence_is_continued_with_another_batch(llama: Any, modulator: Modulator):
    from vesicle.errors import VesicleError

    cache = DynamicCache()
    llama(tokens(9, batch=2), **cache_argument(llama, cache))
    with (
        attach(llama, modulator, 0.6),
        pytest.raises(VesicleError, match="had 0 sequences and now has 2"),
    ):
        llama(tokens(1, batch=2), **cache_argument(llama, cache))


def test_plans_of_pieces_join(llama: Any, modulator: Modulator, ids: Tensor):
    """A Plan read between passes is the Plan so far."""
    cache = DynamicCache()
    so_far: list[Plan] = []
    with attach(llama, modulator, 0.6) as run:
        for start, stop in ((0, 30), (30, 70)):
            llama(ids[:, start:stop], **cache_argument(llama, cache))
            so_far.append(run.plan)
    assert so_far[1].tokens(0, 30).equals(so_far[0])
    assert so_far[1].n_tokens == 70
