"""What a text's repetition says of its entries, and what gates make of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from vesicle.engine import Engine
from vesicle.errors import DataError
from vesicle.evolution.repetition import _needed, by_repetition
from vesicle.namm import Namm, NammSettings
from vesicle.namm.gates import gate_inputs, gate_scores

SETTINGS = NammSettings(network="mlp", hidden=4, interval=32, observes=32, sinks=2, recent=16)
REQUEST = [3, 4, 5]


def texts(n: int, length: int = 240) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(1, 97, length + 3 * i).tolist() for i in range(n)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("n_later", [0, 100])
def test_it_is_the_most_that_later_queries_pay_by_the_models_own_attention(n_later: int):
    model = tiny_model("llama", dtype=torch.float32, attention="eager")
    engine, ids = Engine.from_model(model), texts(1)[0][:160]
    later = texts(2)[1][:n_later]
    most, entries = _needed(engine, ids, REQUEST, later, [0, 1, 2])
    expected = np.zeros((3, 2, len(ids)))
    for coming, first in (([*REQUEST, *ids], len(ids) + 3), (later, len(ids))):
        whole = [*ids, *coming]
        last = len(whole) // 64 * 64  # later queries are not asked for any more
        attentions = model(torch.tensor([whole]), output_attentions=True).attentions
        for layer, paid in enumerate(attentions):
            mean = paid[0].unflatten(0, (2, 2)).mean(1)[:, first:last, : len(ids)]
            if mean.shape[1]:
                expected[layer] = np.maximum(expected[layer], mean.amax(1).numpy())
    np.testing.assert_allclose(most, expected, atol=1e-5)
    for rows in entries:
        assert rows.shape == (2, len(ids), 26)
        np.testing.assert_allclose(rows[..., 0], np.log(np.arange(160, 0, -1))[None].repeat(2, 0))
    assert engine.pool.bytes_in_use == 0


def test_gates_are_the_ridge_regression_of_its_logarithm(llama: Any):
    engine, contexts = Engine.from_model(llama), [ids[:240] for ids in texts(3)]
    begin = Namm.fresh(SETTINGS, engine.shape)
    found = by_repetition(engine, begin, contexts, REQUEST, [0.25])
    inputs, told = [], []
    for ids in contexts:
        most, entries = _needed(engine, ids[:160], REQUEST, ids[160:], [0, 1, 2])
        inputs.append(entries[1][1, :96].astype(np.float64))
        told.append(np.log(most[1, 1, :96] + 1e-6))
    x, y = np.concatenate(inputs), np.concatenate(told)
    expected, *_ = np.linalg.lstsq(x, y, rcond=None)
    row = np.concatenate([found.ages[1, 1:], found.gates[1, 1]])
    error = np.square(x @ row - y).mean()
    assert error == pytest.approx(np.square(x @ expected - y).mean(), rel=1e-3)
    assert error < 0.95 * y.var()
    assert engine.pool.bytes_in_use == 0


def test_the_profile_is_each_heads_part_of_what_receives_most(llama: Any):
    engine, ids = Engine.from_model(llama), texts(1)[0]
    found = by_repetition(engine, Namm.fresh(SETTINGS, engine.shape), [ids], REQUEST, [0.25, 0.5])
    most, _ = _needed(engine, ids[:160], REQUEST, ids[160:], [0, 1, 2])
    most, expected = most[..., :96], np.zeros((3, 2))
    for share in (0.25, 0.5):
        ranked = np.sort(most.ravel())[::-1]
        kept = most >= ranked[round(share * most.size) - 1]
        assert kept.mean() == pytest.approx(share, abs=0.01)
        expected += np.log(np.maximum(kept.mean(-1), 1e-3)) / 2
    np.testing.assert_allclose(found.profile, expected, atol=0.05)


def test_layers_with_windows_and_short_contexts_are_left_out():
    engine = Engine.from_model(tiny_model("gemma3", dtype=torch.float32))
    begin = Namm.fresh(SETTINGS, engine.shape)
    ids = texts(2)
    found = by_repetition(engine, begin, [ids[0][:100], ids[1]], REQUEST, [0.5])
    same = by_repetition(engine, begin, [ids[1]], REQUEST, [0.5])
    windowed = engine.shape.layer_windows > 0
    assert windowed.any()
    assert not found.gates[windowed].any()
    assert found.gates[~windowed].any()
    assert (found.gates == same.gates).all()
    assert not found.ages[windowed].any()
    assert found.ages[~windowed].all()
    replace(found, info={}).check_fits(engine.shape)


def test_contexts_that_are_all_too_short_are_told(llama: Any):
    engine = Engine.from_model(llama)
    with pytest.raises(DataError, match=r"contexts have 191 tokens at most; .* need 192"):
        by_repetition(engine, Namm.fresh(), [texts(1)[0][:191]], REQUEST, [0.5])


def test_scores_are_products_with_key_value_and_one():
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)
    gates = rng.normal(size=(2, 7)).astype(np.float32)
    rows = gate_inputs(keys, values)
    for head in range(2):
        for entry in range(5):
            row = [*keys[head, entry], *values[head, entry], 1]
            assert rows[head, entry].tolist() == pytest.approx(row)
            expected = float(np.dot(row, gates[head]))
            assert gate_scores(gates, keys, values)[head][entry] == pytest.approx(
                expected, abs=6e-4
            )
