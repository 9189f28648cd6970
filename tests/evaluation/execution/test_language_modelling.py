"""Losses against a plain computation, executed costs against the run's own, windows and bytes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.helpers import Bytes, some_windows, write_text
from tests.tiny import shape_of, tiny_modulator
from vesicle.cost import price_dense
from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.evaluation.execution import language_modelling
from vesicle.evaluation.execution.language_modelling import (
    Together,
    Windows,
    load_windows,
    model_shape,
    score,
    scored_bytes,
)
from vesicle.plan import Dense
from vesicle.reference.attach import attach


def test_losses_are_the_models_own(model: Any):
    """Every family, as its logits are taken apart into hidden states and the LM head."""
    ids = some_windows()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    found = score(model, ids, batch=3)
    np.testing.assert_allclose(found.nats, loss.view(4, -1).sum(1).numpy(), rtol=1e-12)
    assert found.cost_share == 1.0
    behind = score(model, ids, batch=3, context=40)
    np.testing.assert_allclose(behind.nats, loss.view(4, -1)[:, 39:].sum(1).numpy(), rtol=1e-12)


def test_few_logits_at_once(llama: Any, monkeypatch: pytest.MonkeyPatch):
    ids = some_windows()
    whole = score(llama, ids, batch=2).nats
    monkeypatch.setattr(language_modelling, "HEAD_POSITIONS", 10)
    sizes: list[int] = []
    hook = llama.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output.shape[0] * output.shape[1])
    )
    np.testing.assert_allclose(score(llama, ids, batch=2).nats, whole, rtol=1e-12)
    hook.remove()
    assert max(sizes) <= 10


def test_rest_changes_nothing(model: Any):
    ids = some_windows()
    modulator = tiny_modulator(shape_of(model))
    assert np.array_equal(score(model, ids, modulator.at(1.0)).nats, score(model, ids).nats)
    assert score(model, ids, modulator.at(1.0)).cost_share == 1.0


def test_costs_are_those_of_the_run(llama: Any):
    ids, method = some_windows(), tiny_modulator(shape_of(llama)).at(0.6)
    found = score(llama, ids, method, batch=3, keep_levels=True)
    for i in range(len(ids)):
        with attach(llama, method) as run, torch.no_grad():
            llama(input_ids=ids[i : i + 1])
        assert found.costs[i] == run.cost
        np.testing.assert_allclose(found.levels[i], run.levels[0], atol=1e-9)
    assert found.dense == price_dense(model_shape(llama), 64)
    assert found.cost_share < 1


def test_one_method_for_each_window(llama: Any):
    ids, modulator = some_windows(), tiny_modulator(shape_of(llama))
    methods = [modulator.at(b) for b in (0.5, 0.7, 0.9, 1.0)]
    found = score(llama, ids, methods, batch=2)
    for i, method in enumerate(methods):
        alone = score(llama, ids[i : i + 1], method)
        # All of a batch pay the overhead of its first method, which at rest would be nothing.
        assert i == 3 or found.costs[i] == alone.costs[0]
        np.testing.assert_allclose(found.nats[i], alone.nats[0], rtol=1e-9)


def test_together_needs_methods():
    with pytest.raises(ValueError, match="methods is empty"):
        Together([])


def test_model_is_left_as_it_was(llama: Any):
    llama.train()
    score(llama, some_windows(1), Dense())
    assert llama.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_loss_must_be_finite(llama: Any):
    with torch.no_grad():
        llama.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(VesicleError, match="the loss of window 0 is nan"):
        score(llama, some_windows(1))


def test_not_a_causal_lm(llama: Any):
    with pytest.raises(ModelError, match="is not a causal LM"):
        score(llama.model, some_windows(1))


def test_windows_and_bytes(tmp_path: Path):
    path = write_text(tmp_path / "a.txt", 1000)
    windows = load_windows(path, Bytes(), length=100, limit=4)
    text = Bytes().encode(path.read_text(encoding="utf-8"))
    starts = [0, 200, 500, 700]  # four of ten, evenly spread
    assert windows.ids.tolist() == [text[s : s + 100] for s in starts]
    assert [scored_bytes(ids, Bytes()) for ids in windows.ids.tolist()] == [99] * 4
    assert "a.txt" in windows.description
    assert str(tmp_path) not in windows.description


def test_bytes_are_not_characters():
    assert scored_bytes([1, 200, 201], Bytes()) == 4


def test_hash_tells_texts_apart():
    ids = some_windows(2, 8)
    hashes = {Windows(ids=x, description="").sha256 for x in (ids, ids + 1, ids.view(4, 4))}
    assert len(hashes) == 3


@pytest.mark.parametrize(("text", "fault"), [("", "no text"), ("abc", "one window needs 100")])
def test_too_little_text(tmp_path: Path, text: str, fault: str):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=fault):
        load_windows(tmp_path / "a.txt", Bytes(), length=100)
