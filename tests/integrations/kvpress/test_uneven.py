"""Several tokens read at once see what they see one by one, whatever each layer holds."""

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.integrations.kvpress.doubles import HookPress, at
from tests.tiny import tiny_model, tokens
from vesicle.families import cache_argument, find_family
from vesicle.integrations.kvpress.uneven import _seen, fit_masks, hide

IDS, N_CONTEXT = tokens(56), 48
TOLERANCE = 5e-6
"""On logits of about 2: eager attention takes its softmax in fp32. Measured: 3e-7."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def uneven_cache(model: Any, counts: list[int]) -> DynamicCache:
    """Layers hold random `counts` of the context's entries."""
    rng = np.random.default_rng(3)
    n_heads = model.config.num_key_value_heads
    drawn = [
        [sorted(rng.permutation(N_CONTEXT)[:n].tolist()) for _ in range(n_heads)] for n in counts
    ]
    cache = DynamicCache()
    with HookPress(at(drawn))(model):
        model(IDS[:, :N_CONTEXT], **cache_argument(model, cache))
    return cache


def attention_of(model: Any) -> list[Any]:
    family = find_family(model.config)
    return [family.modules(layer).attention for layer in family.layers(model)]


def fit(model: Any, cache: DynamicCache) -> None:
    for layer, module in enumerate(attention_of(model)):
        fit_masks(cache, module, layer, 0)


def go_on(model: Any, cache: DynamicCache, step: int) -> Tensor:
    """Logits of the tokens after the context, some at a time."""
    found = []
    for i in range(N_CONTEXT, IDS.shape[1], step):
        where = torch.arange(i, i + step)[None]
        found.append(
            model(IDS[:, i : i + step], position_ids=where, **cache_argument(model, cache)).logits
        )
    return torch.cat(found, 1)


def n_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("counts", [[5, 20, 48], [48, 20, 5], [20, 48, 1], [7, 7, 7]])
def test_a_question_is_read_as_its_tokens_are(attention: str, counts: list[int]):
    model = tiny_model("llama", attention=attention)
    expected = go_on(model, uneven_cache(model, [48, 48, 48]), 8)
    cache = uneven_cache(model, counts)
    if attention == "sdpa":  # which needs no masks for one token
        alone = go_on(model, copy.deepcopy(cache), 1)
    fit(model, cache)
    one_by_one = go_on(model, copy.deepcopy(cache), 1)
    if attention == "sdpa":
        assert (one_by_one - alone).abs().max() < TOLERANCE
    for step in (8, 4):
        found = go_on(model, copy.deepcopy(cache), step)
        assert (found - one_by_one).abs().max() < TOLERANCE
    assert (one_by_one - expected).abs().max() > 1e-3  # forgetting is seen


def test_transformers_alone_cannot_read_it():
    """The reason for all this; where it can, this file is not needed any more."""
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="must match"):
        go_on(model, uneven_cache(model, [5, 20, 48]), 8)


def test_hooks_go_with_the_last_copy_of_the_cache(llama: Any):
    cache = uneven_cache(llama, [5, 20, 48])
    assert n_hooks(llama) == 0
    fit(llama, cache)
    fit(llama, cache)
    assert n_hooks(llama) == 3
    other = copy.deepcopy(cache)
    expected = go_on(llama, copy.copy(cache), 8)
    del cache
    gc.collect()
    assert n_hooks(llama) == 3
    assert torch.equal(go_on(llama, other, 8), expected)
    del other
    gc.collect()
    assert n_hooks(llama) == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("step", [8, 4, 1])
def test_hidden_entries_may_hold_anything(attention: str, step: int):
    """Two KV heads hide unlike many, or none; each has two query heads."""
    model = tiny_model("llama", attention=attention)
    whole = uneven_cache(model, [48, 20, 5])
    fit(model, whole)
    dense = go_on(model, copy.deepcopy(whole), step)
    hidden = [torch.zeros(1, 2, n, dtype=torch.bool) for n in (48, 20, 5)]
    hidden[0][0, 0, [0, 3, 47]] = hidden[0][0, 1, 10:30] = hidden[2][0, 1, :4] = True
    for layer, module in enumerate(attention_of(model)):
        hide(whole, module, layer, hidden[layer])
    marks = [module.masked_key_indices for module in attention_of(model)]
    assert [None if own is None else len(own[0]) for own in marks] == [23, None, 4]
    expected = go_on(model, copy.deepcopy(whole), step)
    assert all(module.masked_key_indices is None for module in attention_of(model))
    assert (expected - dense).abs().max() > 1e-3
    for layer, own in zip(whole.layers, hidden, strict=True):
        layer.keys[own], layer.values[own] = 1e3, -1e3
    assert torch.equal(go_on(model, whole, step), expected)


def test_hiding_is_leaving_out():
    """As many entries of each KV head: once left out, once hidden among others."""
    model = tiny_model("llama")
    whole = uneven_cache(model, [48, 48, 48])
    hidden = torch.ones(1, 2, 48, dtype=torch.bool)
    hidden[0, 0, 5:25] = hidden[0, 1, ::5][:10] = hidden[0, 1, 1::5] = False
    assert hidden.sum((0, 2)).tolist() == [28, 28]
    short = copy.deepcopy(whole)
    for layer in short.layers:
        layer.keys = layer.keys[~hidden].view(1, 2, 20, -1)
        layer.values = layer.values[~hidden].view(1, 2, 20, -1)
    fit(model, whole)
    fit(model, short)
    for layer, module in enumerate(attention_of(model)):
        hide(whole, module, layer, hidden)
    expected = go_on(model, short, 4)
    assert (go_on(model, whole, 4) - expected).abs().max() < TOLERANCE


def test_marks_of_somebody_else_stay(llama: Any):
    """Of a press that marks, and that read a text after ours."""
    cache, other = (uneven_cache(llama, [20, 20, 20]) for _ in range(2))
    fit(llama, cache)
    module = attention_of(llama)[0]
    hide(cache, module, 0, torch.ones(1, 2, 3, dtype=torch.bool))
    ours = module.masked_key_indices
    go_on(llama, copy.deepcopy(other), 1)
    assert module.masked_key_indices is None
    theirs = module.masked_key_indices = tuple(one.clone() for one in ours)
    go_on(llama, other, 1)
    assert module.masked_key_indices is theirs
    del cache
    gc.collect()
    assert module.masked_key_indices is theirs
    module.masked_key_indices = None


def test_other_caches_are_left_alone(llama: Any):
    expected = go_on(llama, uneven_cache(llama, [48, 48, 48]), 8)
    short = uneven_cache(llama, [5, 20, 48])
    fit(llama, short)
    assert torch.equal(go_on(llama, uneven_cache(llama, [48, 48, 48]), 8), expected)
    with pytest.raises(RuntimeError, match="must match"):
        go_on(llama, uneven_cache(llama, [5, 20, 48]), 8)


def test_a_window_is_counted_from_each_query():
    seen = _seen(3, 4, 3, torch.device("cpu"))[0, 0].int().tolist()
    assert seen == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]
