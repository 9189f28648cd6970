"""The kept positions are those that a press left in the cache, whatever it computed inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.integrations.kvpress.doubles import (
    DecodingPress,
    HookPress,
    MaskPress,
    ObservedAttentionPress,
    Wrapper,
    at,
)
from tests.tiny import tiny_model, tokens
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.families import cache_argument
from vesicle.integrations.kvpress import kept_by, press_method
from vesicle.integrations.kvpress.kept import _look_up
from vesicle.plan import FOREVER

IDS = tokens(40)[0].tolist()
TOLERANCE = 2e-5
"""On logits of about 2: transformers turns keys by angles in fp32. Measured: 3e-6."""


def whole(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def heads_of(model: Any) -> int:
    config = model.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def draw(n_heads: int, counts: list[int], seed: int = 0) -> list[list[list[int]]]:
    """Distinct positions in no order, `counts[layer]` for each head of a layer."""
    rng = np.random.default_rng(seed)
    return [[rng.permutation(len(IDS))[:n].tolist() for _ in range(n_heads)] for n in counts]


def lists(kept: list[list[Any]]) -> list[list[list[int]]]:
    return [[head.tolist() for head in layer] for layer in kept]


def test_positions_are_found_for_every_head_and_family(model: Any):
    drawn = draw(heads_of(model), [16, 5, 40])
    kept = kept_by(HookPress(at(drawn)), model, IDS)
    assert lists(kept) == [[sorted(h) for h in layer] for layer in drawn]
    assert {h.dtype for layer in kept for h in layer} == {np.dtype(np.int32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_formats(dtype: torch.dtype):
    model = tiny_model("llama", dtype=dtype)
    drawn = draw(2, [8, 8, 8])
    kept = kept_by(HookPress(at(drawn)), model, IDS)
    assert lists(kept) == [[sorted(h) for h in layer] for layer in drawn]


def test_equal_keys_are_told_apart_by_values_and_equal_entries_taken_in_order():
    """0 and 1 are the same entry twice; 2 has their key and another value."""
    keys, values = torch.ones(1, 3, 4), torch.tensor([[[5.0], [5.0], [6.0]]])
    order = torch.tensor([2, 1, 0])
    assert _look_up((keys, values), (keys[:, order], values[:, order]), "") == [[2, 0, 1]]


def test_marked_entries_are_not_kept(llama: Any):
    """Head 0 loses 0 to 29, head 1 loses 4 to 39."""
    marks = [(0, p) for p in range(30)] + [(1, p) for p in range(4, 40)]
    heads, places = (torch.tensor(column) for column in zip(*marks, strict=True))
    press = MaskPress(whole, marks=(torch.zeros_like(heads), heads, places))
    assert lists(kept_by(press, llama, IDS)) == [[list(range(30, 40)), list(range(4))]] * 3


def test_marks_are_places_in_what_is_left(llama: Any):
    """The press keeps 0, 2, 4, ... and marks the first of these."""
    drawn = [[list(range(0, 40, 2))] * 2] * 3
    one = torch.zeros(2, dtype=torch.long)
    kept = kept_by(MaskPress(at(drawn), marks=(one, torch.tensor([0, 1]), one)), llama, IDS)
    assert lists(kept) == [[list(range(2, 40, 2))] * 2] * 3


def test_marks_left_by_an_earlier_press_do_not_count(llama: Any):
    llama.model.layers[1].self_attn.masked_key_indices = (torch.zeros(1, dtype=torch.long),) * 3
    kept = kept_by(HookPress(whole), llama, IDS)
    assert lists(kept) == [[list(range(40))] * 2] * 3


def test_the_model_is_left_as_it_was(llama: Any):
    def state() -> list[Any]:
        return [(set(vars(m)), set(m._modules), len(m._forward_hooks)) for m in llama.modules()]

    before, logits = state(), llama(tokens(40)).logits
    kept_by(MaskPress(whole, marks=(torch.zeros(1, dtype=torch.long),) * 3), llama, IDS)
    with pytest.raises(VesicleError):
        kept_by(HookPress(lambda layer, k, v: (2 * k, v)), llama, IDS)
    assert state() == before
    assert torch.equal(llama(tokens(40)).logits, logits)


def test_attention_probabilities_are_there_for_presses_that_read_them(llama: Any):
    reader = ObservedAttentionPress(whole, needs_attention=True)
    for press in (reader, Wrapper(reader)):
        kept_by(press, llama, IDS)
        assert llama.config._attn_implementation == "sdpa"
    with pytest.raises(VesicleError, match="HookPress failed on this model: no attention prob"):
        kept_by(HookPress(whole, needs_attention=True), llama, IDS)


def test_random_presses_repeat_with_their_seed(llama: Any):
    def select(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.randperm(keys.shape[2])[:8]
        return keys[:, :, index], values[:, :, index]

    state = torch.get_rng_state()
    first, again, other = (lists(kept_by(HookPress(select), llama, IDS, seed=s)) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (lambda layer, k, v: (k * 1.5, v), "changes keys"),
        (lambda layer, k, v: (k, v * 1.5), "changes values"),
        (lambda layer, k, v: (k[:, :, [3, 3]], v[:, :, [3, 3]]), "repeats an entry"),
        (lambda layer, k, v: (k[:, :1], v[:, :1]), "1 KV heads are left of 2"),
        (lambda layer, k, v: (k[..., :4], v), "changes keys"),
        (lambda layer, k, v: 1 // 0, "failed on this model: ZeroDivisionError: "),
    ],
)
def test_what_is_not_a_selection_is_refused(llama: Any, select: Any, says: str):
    with pytest.raises(VesicleError, match=says) as caught:
        kept_by(HookPress(select), llama, IDS)
    assert str(caught.value).startswith("HookPress")


def test_presses_that_act_later_are_refused(llama: Any):
    with pytest.raises(VesicleError, match="while tokens are generated"):
        kept_by(DecodingPress(whole), llama, IDS)


def test_presses_that_change_the_tokens_are_refused(llama: Any):
    class Shortening(HookPress):
        @contextmanager
        def __call__(self, model: Any) -> Iterator[None]:
            embed = model.base_model.embed_tokens
            hook = embed.register_forward_hook(lambda module, given, rows: rows[:, 1:])
            yield
            hook.remove()

    with pytest.raises(VesicleError, match="Shortening made 39 entries of 40 tokens"):
        kept_by(Shortening(whole), llama, IDS)


def test_no_tokens_are_refused(llama: Any):
    with pytest.raises(VesicleError, match="no tokens"):
        kept_by(HookPress(whole), llama, [])


def test_the_engine_goes_on_from_what_a_press_left_and_its_memory_is_free(llama: Any):
    """Random choices: 32 of 48 in the first layer, 16 in the second, all in the third."""
    rng = np.random.default_rng(1)
    chosen = [[sorted(rng.permutation(48)[:n].tolist()) for _ in range(2)] for n in (32, 16, 48)]
    press, ids = HookPress(at(chosen)), tokens(54)[0].tolist()
    cache = DynamicCache()
    with torch.no_grad(), press(llama):
        llama(torch.tensor([ids[:48]]), **cache_argument(llama, cache))

    engine = Engine.from_model(llama)
    sequence = engine.start(press_method(press, llama, ids[:48]))
    engine.forward([(sequence, ids[:48])], "none")
    dense = 3 * 2 * 3 * engine.pool.bytes_per_block  # layers, KV heads, blocks
    assert engine.pool.bytes_in_use == sequence.cost.kv_bytes_held == dense * (32 + 16 + 48) / 144
    for position in range(48, 54):
        with torch.no_grad():
            expected = llama(
                torch.tensor([[ids[position]]]),
                position_ids=torch.tensor([[position]]),
                **cache_argument(llama, cache),
            ).logits[0]
        (found,) = engine.forward([(sequence, [ids[position]])])
        assert (found - expected).abs().max() < TOLERANCE


def test_heads_hold_what_they_keep_filled_up_to_whole_blocks(llama: Any):
    """Of 48 tokens head 0 sees the last 32; head 1 the first 10, and holds the latest 6 beside."""
    marks = [*((0, p) for p in range(16)), *((1, p) for p in range(10, 48))]
    heads, places = (torch.tensor(column) for column in zip(*marks, strict=True))
    press = MaskPress(whole, marks=(torch.zeros_like(heads), heads, places))
    ids = tokens(48)[0].tolist()
    engine = Engine.from_model(llama)
    sequence = engine.start(press_method(press, llama, ids))
    engine.forward([(sequence, ids)], "none")
    assert engine.pool.bytes_in_use == 3 * (2 + 1) * engine.pool.bytes_per_block
    held = sequence.plan.evict_after == FOREVER
    assert (held.sum(0) == [32, 16]).all()
    assert held[16:, :, 0].all()
    assert held[[*range(10), *range(42, 48)], :, 1].all()
    for layer in range(3):
        first, second = (row.tolist() for row in sequence.cache.held(layer))
        assert first == list(range(16, 48))
        assert second == [*range(10), *range(42, 48)]
