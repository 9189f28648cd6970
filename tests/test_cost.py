from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import DECIDED, SHAPE, random_plan
from vesicle.cost import (
    Cost,
    held_before,
    kv_bytes_peak,
    price,
    price_dense,
    price_tokens,
    visited_positions,
)
from vesicle.plan import FOREVER, Plan, visible_blocks
from vesicle.shapes import ModelShape, Overhead

TINY = ModelShape(
    n_layers=1,
    width=8,
    n_heads=2,
    n_kv_heads=1,
    head_size=4,
    ffn_width=12,
    gated=True,
    vocabulary=10,
    weight_bytes=2,
    kv_bytes=2,
)
OVERHEAD = Overhead(
    modulator_flops=50,
    modulator_bytes=30,
    small_ffn_weights=2 * 8 * 3,
    small_attention_weights=2 * 8 * 2,
    selection_vectors=2,
)


def one_token(*, ffn: int = 2, attention: int = 1, kv_blocks: int = 2) -> Plan:
    """Position 37 of a one-layer model: two complete blocks, then six positions of its own."""
    return Plan.of(
        channels=np.array([[[5, 6, 7, 9]]], np.int32),
        bits=np.array([[[16, 8, 16, 3]]], np.int32),
        ffn=np.array([[ffn]], np.int32),
        attention=np.array([[attention]], np.int32),
        kv_blocks=np.array([[kv_blocks]], np.int32),
    )


# Outputs per channel: queries 8 + keys and values 8 = 16; 8; gate and up 24; 8.
Q_K_V, OUT, GATE_UP, DOWN = 5 * 16, 6 * 8, 7 * 24, 9 * 8
HEAD, HEAD_BYTES = 2 * 8 * 10, 8 * 10 * 2
HELD = 38 * 2 * 4 * 2


def test_by_hand():
    assert price(one_token(), TINY, first_position=37) == Cost(
        flops_linear=2 * (Q_K_V + OUT + GATE_UP + DOWN),
        flops_attention=4 * 8 * (16 + 6),
        flops_selection=2 * 8 * 2,
        flops_head=HEAD,
        weight_bytes=Q_K_V * 2 + OUT * 9 // 8 + GATE_UP * 2 + DOWN * 4 // 8 + HEAD_BYTES,
        kv_bytes_read=4 * 2 * (2 * 22 + 2),
        kv_bytes_held=HELD,
    )


def test_by_hand_all_blocks():
    cost = price(one_token(kv_blocks=3), TINY, first_position=37)
    assert cost.flops_attention == 4 * 8 * 38
    assert cost.flops_selection == 0
    assert cost.kv_bytes_read == 4 * 2 * 2 * 38


@pytest.mark.parametrize("ffn", [0, 1])
def test_by_hand_skipped(ffn: int):
    standins = 2 + 3 * ffn
    assert price(one_token(ffn=ffn, attention=0), TINY, OVERHEAD, first_position=37) == Cost(
        flops_linear=2 * 5 * 8,  # keys and values are written all the same
        flops_standin=4 * 8 * standins,
        flops_modulator=50,
        flops_head=HEAD,
        weight_bytes=5 * 8 * 2 + 2 * 8 * standins * 2 + 30 + HEAD_BYTES,
        kv_bytes_held=HELD,
    )


def test_by_hand_two_summary_vectors():
    cost = price(one_token(), TINY, OVERHEAD, first_position=37)
    assert cost.flops_selection == 2 * 2 * 8 * 2
    assert cost.kv_bytes_read == 4 * 2 * (2 * 22 + 2 * 2)


def test_rest_is_dense(shape: ModelShape):
    dense = price_dense(shape, 40)
    assert price(Plan.rest(shape, 40), shape) == dense
    assert dense.flops_selection == dense.flops_standin == dense.flops_modulator == 0
    assert dense.kv_bytes_held == 40 * 3 * 2 * 24 * 4
    projections = sum(w * o for w, o in zip(shape.site_widths, shape.site_outputs, strict=True))
    attention = sum(2 * shape.query_width * (t + 1) for t in range(40))
    layers = 40 * shape.n_layers * projections + shape.n_layers * attention
    assert dense.flops_total == 2 * (layers + 40 * shape.width * shape.vocabulary)
    assert dense.ratio(dense) == dict.fromkeys(dense.ratio(dense), 1.0)


def test_a_plain_ffn_costs_two_thirds_of_a_gated_one(shape: ModelShape):
    plain = price_dense(replace(shape, gated=False), 1)
    assert price_dense(shape, 1).flops_linear - plain.flops_linear == 3 * 2 * 48 * 80


def test_first_position_and_tokens_add_up(shape: ModelShape, rng: np.random.Generator):
    plan = random_plan(shape, 70, rng)
    whole = price(plan, shape, OVERHEAD)
    parts = [
        price(plan.tokens(a, b), shape, OVERHEAD, first_position=a)
        for a, b in ((0, 1), (1, 18), (18, 47), (47, 70))
    ]
    assert sum(parts[1:], parts[0]) == whole
    for name, values in price_tokens(plan, shape, OVERHEAD).items():
        assert values.shape == (70,)
        assert values.sum() == getattr(whole, name)
    assert price_dense(shape, 30) + price_dense(shape, 40, first_position=30) == price_dense(
        shape, 70
    )


def test_the_head_is_paid_where_logits_are_asked_for(shape: ModelShape):
    asked = np.zeros(40, bool)
    asked[[3, 39]] = True
    every, some = price_dense(shape, 40), price_dense(shape, 40, with_logits=asked)
    assert some.flops_head == 2 * 2 * 48 * 97
    assert every.flops_head == 40 * 2 * 48 * 97
    assert every.weight_bytes - some.weight_bytes == 38 * 48 * 97 * 4
    assert every.flops_linear == some.flops_linear


@pytest.mark.parametrize(("stored", "expected"), [(4, (5, 5, 5, 5, 5)), (8, (5, 5, 5, 9, 9))])
def test_packed_weights_are_read_in_planes(stored: int, expected: tuple[int, ...]):
    shape = replace(TINY, weight_bytes=4, stored_bits=stored, head_bits=8)
    assert tuple(shape.charged_bits(np.array([2, 3, 4, 8, 16]))) == expected
    plan = one_token()
    numbers = np.array([Q_K_V, OUT, GATE_UP, DOWN])
    bits = shape.charged_bits(plan.bits[0, 0])
    cost = price(plan, shape, first_position=37)
    assert cost.weight_bytes == (int((numbers * bits).sum()) + 8 * 10 * 9) // 8
    assert cost.flops_total == price(plan, TINY, first_position=37).flops_total


def test_stand_ins_are_in_fp32_beside_packed_weights():
    shape = replace(TINY, weight_bytes=4, stored_bits=4, head_bits=8)
    with_standin, without = (
        price(one_token(ffn=f), shape, replace(OVERHEAD, modulator_bytes=0)) for f in (1, 0)
    )
    assert with_standin.weight_bytes - without.weight_bytes == 2 * 8 * 3 * 4


def test_int8_keys_and_values_carry_scales():
    shape = replace(TINY, kv_bytes=1, kv_scale_bytes=2, summary_bytes=2)
    cost = price(one_token(), shape, OVERHEAD, first_position=37)
    assert cost.kv_bytes_read == 22 * 2 * (4 + 2) + 2 * 2 * 4 * 2
    assert cost.kv_bytes_held == 38 * 2 * (4 + 2)
    assert replace(TINY, kv_bytes=4).summary_vector_bytes == 16


def test_a_screened_head():
    shape = replace(TINY, weight_bytes=4, stored_bits=4, head_bits=8)
    whole = price(one_token(), shape, first_position=37)
    plan = one_token().with_fields(head=np.array([3], np.int32))
    screened = price(plan, shape, first_position=37)
    assert screened.flops_head == 2 * 8 * (10 + 3)
    assert whole.weight_bytes - screened.weight_bytes == 8 * 10 * 9 // 8 - (
        8 * 10 * 5 // 8 + 3 * 8 // 2
    )
    assert replace(screened, flops_head=0, weight_bytes=0) == replace(
        whole, flops_head=0, weight_bytes=0
    )
    unasked = np.zeros(1, bool)
    assert price(plan, shape, with_logits=unasked) == price(one_token(), shape, with_logits=unasked)
    # A head that is not stored in planes runs whole.
    for other in (TINY, replace(shape, head_bits=4)):
        assert price(plan, other) == price(one_token(), other)


def test_an_empty_plan_costs_nothing(shape: ModelShape):
    assert price(Plan.rest(shape, 0), shape) == Cost()


def test_evidence_by_hand():
    """Two query heads of 4 numbers, against the keys alone of the 22 positions that are visited."""
    reads = Overhead(reads_attention=True)
    told, not_told = (price(one_token(), TINY, o, first_position=37) for o in (reads, None))
    assert told.flops_evidence == 2 * 8 * 22
    assert told.kv_bytes_read - not_told.kv_bytes_read == 4 * 2 * 22
    skips = price(one_token(attention=0), TINY, reads, first_position=37)
    assert skips.flops_evidence == 0


def test_observed_queries_by_hand():
    """The last 2 of 16, twice, against all that lies before them; of the last 8 nobody was told."""
    plan, observes = Plan.rest(TINY, 40), Overhead(observes=2, interval=16)
    told, dense = (price_tokens(plan, TINY, o) for o in (observes, None))
    expected = np.zeros(40, np.int64)
    expected[[14, 15, 30, 31]] = [15, 16, 31, 32]
    np.testing.assert_array_equal(told["flops_evidence"], 2 * 8 * expected)
    more = told["kv_bytes_read"] - dense["kv_bytes_read"]
    np.testing.assert_array_equal(more, 4 * 2 * expected)
    later = price_tokens(plan.tokens(15), TINY, observes, first_position=15)
    np.testing.assert_array_equal(later["flops_evidence"], told["flops_evidence"][15:])
    skips = plan.with_fields(attention=np.zeros((40, 1), np.int32))
    windowed = replace(TINY, windows=(30,))
    for where, shape in ((skips, TINY), (plan, windowed)):
        assert price(where, shape, observes).flops_evidence == 0


def test_addition():
    first = Cost(**{f.name: 10 + i for i, f in enumerate(fields(Cost))})
    second = Cost(**{f.name: 100 - i for i, f in enumerate(fields(Cost))})
    total = first + second
    assert total.kv_bytes_held == 91
    assert all(getattr(total, f.name) == 110 for f in fields(Cost) if f.name != "kv_bytes_held")
    assert total.flops_total == 7 * 110
    assert total.summary()["bytes_read"] == total.bytes_read == 220
    assert total.ratio(Cost())["flops"] == 770  # nothing to compare with: no division by zero


def test_visited_positions_are_those_attended_to():
    for position in (0, 5, 15, 16, 37, 79):
        own = position // 16
        for blocks in range(1 if own == 0 else 2, own + 2):
            # The first ones and the query's own, as any selection: complete ones are all alike.
            chosen = {*range(blocks - 1), own}
            expected = sum(s // 16 in chosen for s in range(position + 1))
            given_blocks, at = np.array([blocks], np.int32), np.array([position], np.int32)
            assert visited_positions(given_blocks, at).tolist() == [expected]
    every = np.arange(100, dtype=np.int32)
    assert (visited_positions(visible_blocks(every), every) == every + 1).all()


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(list(DECIDED)),
    vectors=st.sampled_from([1, 2]),
)
def test_raising_any_field_never_lowers_the_cost(seed: int, name: str, vectors: int):
    """Up to 16 complete blocks; beyond, choosing nearly all costs more than reading all."""
    rng = np.random.default_rng(seed)
    plan, other = random_plan(SHAPE, 60, rng), random_plan(SHAPE, 60, rng)
    more = plan.with_fields(**{name: np.maximum(getattr(plan, name), getattr(other, name))})
    overhead = replace(OVERHEAD, selection_vectors=vectors)
    low, high = price(plan, SHAPE, overhead), price(more, SHAPE, overhead)
    assert low.flops_total <= high.flops_total
    assert low.bytes_read <= high.bytes_read
    assert high.flops_total <= price_dense(SHAPE, 60).flops_total + high.flops_selection + (
        high.flops_standin + high.flops_modulator
    )


def test_choosing_nearly_all_blocks_costs_more_than_reading_all(shape: ModelShape):
    """The one exception, so that no one is surprised: the estimate is paid whatever is read."""
    rest = Plan.rest(shape, 1024).tokens(1000)
    fewer = rest.with_fields(kv_blocks=rest.kv_blocks - 1)
    assert (
        price(fewer, shape, first_position=1000).flops_total
        > price(rest, shape, first_position=1000).flops_total
    )


# Entries that are forgotten ----------------------------------------------------------------------


def test_by_hand_forgotten_entries():
    """One layer, 40 tokens; 16 of 32 complete entries go after 35, 16 more after 40."""
    shape = replace(SHAPE, n_layers=1)
    evict_after = np.full((40, 1, 2), FOREVER, np.int32)
    evict_after[:16, 0, 0], evict_after[8:24, 0, 1] = 34, 34
    evict_after[16:32, 0, 0] = 39
    evict_after[[*range(8), *range(24, 32)], 0, 1] = 39
    plan = Plan.rest(shape, 40).with_fields(evict_after=evict_after)
    plan.check(shape)
    visited = np.array([*range(1, 36), *range(20, 25)])
    costs = price_tokens(plan, shape)
    assert (costs["flops_attention"] == 4 * shape.query_width * visited).all()
    assert (costs["kv_bytes_read"] == shape.position_bytes * visited).all()
    for head in range(2):
        assert held_before(plan, shape)[:, 0, head].tolist() == (visited - 1).tolist()
    assert price(plan, shape).kv_bytes_held == 8 * shape.position_bytes
    assert price(plan.tokens(0, 39), shape).kv_bytes_held == 23 * shape.position_bytes
    assert kv_bytes_peak(plan, shape) == 35 * shape.position_bytes
    assert kv_bytes_peak(Plan.rest(shape, 40), shape) == 40 * shape.position_bytes
    assert kv_bytes_peak(Plan.rest(shape, 0), shape) == 0


def test_blocks_are_chosen_among_what_is_left():
    """A Plan that asks for more blocks than are held reads them all, and chooses nothing."""
    shape = replace(SHAPE, n_layers=1)
    evict_after = np.full((70, 1, 1), FOREVER, np.int32)
    evict_after[:32, 0] = 63
    rest = Plan.rest(shape, 70).with_fields(evict_after=evict_after)
    for asked, blocks, summaries in ((2, 2, 2), (3, 3, 0), (5, 3, 0)):
        blocks_read = np.where(np.arange(70) == 69, asked, rest.kv_blocks[:, 0])
        plan = rest.with_fields(kv_blocks=blocks_read[:, None])
        read = price_tokens(plan, shape)["kv_bytes_read"][69]
        visited = 16 * (blocks - 1) + 6
        assert read == 2 * (shape.entry_bytes * visited + shape.summary_vector_bytes * summaries)


def test_heads_that_hold_less_read_less():
    """By hand: one of two heads forgets 32 of 64 entries, and three blocks are asked for."""
    shape = replace(SHAPE, n_layers=1)
    evict_after = np.full((70, 1, 2), FOREVER, np.int32)
    evict_after[:32, 0, 1] = 63
    rest = Plan.rest(shape, 70).with_fields(evict_after=evict_after)
    rest.check(shape)
    blocks = np.where(np.arange(70) == 69, 3, rest.kv_blocks[:, 0])
    plan = rest.with_fields(kv_blocks=blocks[:, None])
    costs = price_tokens(plan, shape)
    # Both read three blocks, the last one 6 entries; the first has chosen them among 4.
    assert costs["flops_attention"][69] == 2 * 4 * (shape.query_width // 2) * 38
    assert costs["flops_selection"][69] == 2 * (shape.query_width // 2) * 4
    assert price(plan, shape).kv_bytes_held == (70 + 38) * shape.entry_bytes
    # A Plan that names one head alone says nothing of the others.
    wide = replace(shape, n_heads=6, n_kv_heads=3)
    assert price(plan, wide).kv_bytes_held == (70 + 38 + 70) * wide.entry_bytes


def test_entries_of_before_the_first_position_are_taken_to_be_held():
    evict_after = np.full((70, 3, 2), FOREVER, np.int32)
    evict_after[:16] = 31
    plan = Plan.rest(SHAPE, 70).with_fields(evict_after=evict_after)
    later = price(plan.tokens(40), SHAPE, first_position=40)
    assert later == price_dense(SHAPE, 30, first_position=40)
    early = price(plan.tokens(8), SHAPE, first_position=8)
    assert early.kv_bytes_held == (70 - 8) * 3 * SHAPE.position_bytes
