"""Retention: what is asked to be kept, rounded up to what pages can hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import SHAPE, tiny_modulator
from vesicle.errors import VesicleError
from vesicle.plan import FOREVER, Dense, Plan, Replay, resting_rows
from vesicle.retention import Retention, eviction_lengths, held_entries
from vesicle.shapes import ModelShape

ONE = replace(SHAPE, n_layers=1)


def kept_of(evict_after: np.ndarray, head: int, layer: int = 0) -> list[int]:
    return np.nonzero(evict_after[:, layer, head] == FOREVER)[0].tolist()


def test_by_hand():
    """Heads that want 3 and 17 of 40 entries hold 16 and 32 of 32, and the last block's 8."""
    first, second = [5, 0, 38], list(range(17))
    evict_after = Retention([[first, second]], 40).evict_after(ONE)
    tail = list(range(32, 40))
    assert kept_of(evict_after, 0) == [0, 5, *range(18, 32), *tail]
    assert kept_of(evict_after, 1) == [*range(32), *tail]
    evict_after = Retention([[first, [7, 9]]], 40).evict_after(ONE)
    assert kept_of(evict_after, 0) == [0, 5, *range(18, 32), *tail]  # the most recent 14
    assert kept_of(evict_after, 1) == [7, 9, *range(18, 32), *tail]
    assert set(np.unique(evict_after)) == {39, FOREVER}
    assert evict_after.shape == (40, 1, 2)
    assert evict_after.dtype == np.int32


def test_nothing_kept_leaves_the_last_block():
    evict_after = Retention([[[], []]], 40).evict_after(ONE)
    assert kept_of(evict_after, 0) == kept_of(evict_after, 1) == list(range(32, 40))
    assert (Retention([[[], []]], 32).evict_after(ONE) == 31).all()
    assert (Retention([[[], []]], 15).evict_after(ONE) == FOREVER).all()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(1, 90))
def test_what_is_asked_for_is_kept_and_pages_can_hold_it(seed: int, at: int):
    rng = np.random.default_rng(seed)
    kept = [
        [rng.permutation(at)[: rng.integers(0, at + 1)] for _ in range(SHAPE.n_kv_heads)]
        for _ in range(SHAPE.n_layers)
    ]
    evict_after = Retention(kept, at).evict_after(SHAPE)
    complete = at // 16 * 16
    for layer, heads in enumerate(kept):
        for head, wanted in enumerate(heads):
            found = kept_of(evict_after, head, layer)
            assert {*wanted.tolist(), *range(complete, at)} <= set(found)
            assert len(found) - (at - complete) == -(-(wanted < complete).sum() // 16) * 16
            extra = set(found) - set(wanted.tolist())
            spare = set(range(complete)) - set(wanted.tolist())
            filled = sorted(extra & set(range(complete)))
            assert filled == sorted(spare)[len(spare) - len(filled) :]
    plan = Plan.rest(SHAPE, at).with_fields(evict_after=evict_after)
    plan.check(SHAPE)
    assert [*eviction_lengths(evict_after)] == ([at] if plan.forgets else [])


def test_held_entries():
    evict_after = Retention([[[0, 1], [2, 3]]], 32).evict_after(ONE)
    assert [head.tolist() for head in held_entries(evict_after, 0, 31)] == [[*range(31)]] * 2
    assert [head.tolist() for head in held_entries(evict_after, 0, 32)] == [
        [0, 1, *range(18, 32)],
        [2, 3, *range(18, 32)],
    ]
    assert held_entries(evict_after, 0, 34)[1].tolist() == [2, 3, *range(18, 34)]


def test_all_else_is_the_inner_methods(shape: ModelShape):
    inner = tiny_modulator(shape).at(0.6)
    some = [[[0]] * shape.n_kv_heads] * shape.n_layers
    method = Retention(some, 40, inner)
    assert method.stand_ins == inner.stand_ins
    assert method.overhead(shape) == inner.overhead(shape)
    assert isinstance(method.author(shape), type(inner.author(shape)))
    assert inner.author(shape).evict_after is None
    dense = Retention(some, 40).author(shape)
    positions = np.arange(5, dtype=np.int32)
    assert dense.rests
    assert (dense.planned(positions) == resting_rows(shape, positions)).all()
    every = Retention([[range(40)] * shape.n_kv_heads] * shape.n_layers, 40)
    assert every.author(shape).evict_after is None


def test_only_one_may_forget(shape: ModelShape):
    inner = Retention([[[0]] * shape.n_kv_heads] * shape.n_layers, 40)
    with pytest.raises(VesicleError, match="the inner method forgets entries already"):
        Retention(inner.kept, 60, inner).author(shape)
    plan = Plan.rest(shape, 40).with_fields(evict_after=inner.evict_after(shape))
    with pytest.raises(VesicleError, match="the inner method forgets entries already"):
        Retention(inner.kept, 60, Replay(plan)).author(shape)


@pytest.mark.parametrize(
    ("kept", "at", "line"),
    [
        ([[[0]]], 0, "entries are to be forgotten after 0 tokens; allowed: from 1"),
        ([[[3, 12]]], 12, "entry 12 is to be kept; allowed: 0 to 11"),
        ([[[-1]]], 12, "entry -1 is to be kept; allowed: 0 to 11"),
        ([[[4, 1, 4]]], 12, "entry 4 is to be kept twice in one KV head"),
        ([[[0.5]]], 12, "positions of a KV head are float64 of shape"),
        ([[[[1]]]], 12, "positions of a KV head are int64 of shape"),
    ],
)
def test_what_cannot_be_kept(kept: list, at: int, line: str):
    with pytest.raises(VesicleError, match=line):
        Retention(kept, at)


def test_another_models_entries(shape: ModelShape):
    heads = [[0]] * shape.n_kv_heads
    with pytest.raises(VesicleError, match="entries of 2 layers are to be kept; this model has 3"):
        Retention([heads] * 2, 20).author(shape)
    with pytest.raises(VesicleError, match="of 1 KV heads are to be kept in layer 2; this model"):
        Retention([heads, heads, [[0]]], 20).author(shape)


def test_dense_forgets_nothing(shape: ModelShape):
    assert Dense().author(shape).evict_after is None
    assert eviction_lengths(None) == []
