"""What the reference cannot follow is refused with one line; what it can follow is not."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.tiny import shape_of, tiny_model, tiny_modulator, tokens
from vesicle.errors import VesicleError
from vesicle.families import cache_argument
from vesicle.modulator import Modulator
from vesicle.plan import Dense, Replay
from vesicle.reference.attach import attach


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def batch(*lengths: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, padded on one side."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, slice(-n, None) if left else slice(n)] = tokens(n, seed=row)[0]
    return ids, (ids != 0).long()


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def four(mask: Tensor) -> Tensor:
    """A mask (B, S) as transformers would spell it out, (B, 1, S, S) of booleans."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    return causal & mask.bool()[:, None, None, :]


# Masks ------------------------------------------------------------------------------------------

RIGHT = r"row 1 of the attention mask hides slot 6 after showing slot 0; pad batches on the left"


@pytest.mark.parametrize("method", ["resting", "below rest"])
def test_padding_on_the_right_is_refused(variant: tuple[str, str], method: str):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    ids, mask = batch(9, 6, left=False)
    budget = 1.0 if method == "resting" else 0.6
    with attach(model, tiny_modulator(shape_of(model)), budget):
        with pytest.raises(VesicleError, match=RIGHT):
            model(ids, attention_mask=mask)
        with pytest.raises(VesicleError, match=RIGHT):
            model(ids, mask)
        with pytest.raises(VesicleError, match=RIGHT):
            model.base_model(ids, mask)
        with pytest.raises(VesicleError, match=RIGHT):
            model(ids, attention_mask=mask, position_ids=places(mask))
        with pytest.raises(VesicleError, match=RIGHT):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def holes(mask: Tensor) -> None:
    mask[0, 4] = 0


def trailing(mask: Tensor) -> None:
    mask[0, -1] = 0


def empty(mask: Tensor) -> None:
    mask[1] = 0


def shown(mask: Tensor) -> None:
    mask[1] = 1


MASKS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "hole": (holes, "row 0 of the attention mask hides slot 4 after showing slot 0"),
    "trailing": (trailing, "row 0 of the attention mask hides slot 8 after showing slot 0"),
    "empty": (empty, "row 1 of the attention mask hides all 9 slots; each row needs a token"),
    "shown": (shown, "hides 0 slots on the left, but its positions begin after 3; pass position_"),
}


@pytest.mark.parametrize(("change", "message"), MASKS.values(), ids=MASKS)
def test_masks_of_two_dimensions(llama: Any, modulator: Modulator, change: Any, message: str):
    ids, mask = batch(9, 6, left=True)
    positions = places(mask)
    with attach(llama, modulator, 0.6) as run:
        llama(ids, attention_mask=mask, position_ids=positions)
        change(mask)
        with pytest.raises(VesicleError, match=message):
            llama(ids, attention_mask=mask, position_ids=positions)
    assert [plan.n_tokens for plan in run.plans] == [9, 6]  # of the pass that was followed


def test_padding_that_positions_do_not_mention(llama: Any, modulator: Modulator):
    ids, mask = batch(9, 6, left=True)
    with (
        attach(llama, modulator, 0.6),
        pytest.raises(VesicleError, match="hides 3 slots on the left, but its positions begin aft"),
    ):
        llama(ids, attention_mask=mask)


def test_a_short_mask(llama: Any, modulator: Modulator):
    cache = DynamicCache()
    with attach(llama, modulator, 0.6):
        llama(tokens(9), **cache_argument(llama, cache))
        with pytest.raises(VesicleError, match="has 1 slots; cache and tokens have 10"):
            llama(
                tokens(1),
                attention_mask=torch.ones(1, 1, dtype=torch.long),
                **cache_argument(llama, cache),
            )


@pytest.mark.parametrize("additive", [False, True], ids=["booleans", "numbers"])
def test_masks_of_four_dimensions(llama: Any, modulator: Modulator, additive: bool):
    """Followed where they say what padding on the left says, refused where they say more."""
    ids, mask = batch(9, 6, left=True)

    def spelt(seen: Tensor) -> Tensor:
        numbers = torch.zeros(seen.shape, dtype=torch.float64)
        return numbers.masked_fill(~seen, torch.finfo(torch.float64).min) if additive else seen

    whole, prefix = four(mask), four(mask)
    prefix[..., :5] = True
    with attach(llama, modulator, 0.6) as run:
        expected = llama(ids, attention_mask=mask, position_ids=places(mask)).logits
        plans = run.plans
        found = llama(ids, attention_mask=spelt(whole), position_ids=places(mask)).logits
        assert torch.equal(found[mask.bool()], expected[mask.bool()])
        assert all(a.equals(b) for a, b in zip(run.plans, plans, strict=True))
        with pytest.raises(VesicleError, match="is not causal with padding on the left"):
            llama(ids, attention_mask=spelt(prefix), position_ids=places(mask))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_batch_padded_on_the_left_still_generates(model: Any, kind: str):
    """A static cache makes transformers spell the mask out, by kind of layer in some families."""
    ids, mask = batch(9, 6, left=True)
    with attach(model, tiny_modulator(shape_of(model)), 0.6) as run:
        text = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation=kind,
            disable_compile=True,
        )
        alone = model.generate(ids[1:, 3:], max_new_tokens=5, do_sample=False)
    assert torch.equal(text[1, 9:], alone[0, 6:])
    assert run.plan.n_tokens == 10


@pytest.mark.parametrize("number", [0, 1, 7])
def test_what_padding_is_numbered_changes_nothing(model: Any, number: int):
    """0 as of transformers 5.24, 1 in 5.0: one token after padding has fewer entries than that."""
    ids, mask = batch(9, 1, left=True)
    positions = places(mask).masked_fill(mask == 0, number)
    with attach(model, tiny_modulator(shape_of(model)), 0.6) as run:
        found = model(ids, attention_mask=mask, position_ids=positions).logits[1, -1]
        plan = run.plans[1]
        expected = model(ids[1:, 8:]).logits[0, -1]
    assert (found - expected).abs().max() < 1e-9
    assert plan.equals(run.plan)


# Caches -----------------------------------------------------------------------------------------

CUT = r"the cache holds 14 entries a row, after 20 of which the method knows; a cache cut back"
MOVED = r"row \d of the cache now holds another sequence; beam search, and other decoding that re"


def test_a_cache_cut_back_is_refused(model: Any):
    method = tiny_modulator(shape_of(model), "recurrent").at(0.6)
    for attached in (method, Dense()):
        cache = DynamicCache()
        with attach(model, attached) as run:
            model(tokens(20), **cache_argument(model, cache))
            cache.crop(-6)
            with pytest.raises(VesicleError, match=CUT):
                model(tokens(3), **cache_argument(model, cache))
            assert run.plan.n_tokens == 20
            cache.crop(-14)
            model(tokens(7), **cache_argument(model, cache))  # begins anew
            assert run.plan.n_tokens == 7


def test_assisted_decoding_is_refused_where_it_cuts_back(llama: Any, modulator: Modulator):
    prompt = tokens(6).repeat(1, 4)  # its own continuation is looked up in it, and is wrong
    with (
        attach(llama, modulator, 0.6),
        pytest.raises(VesicleError, match="a cache cut back"),
    ):
        llama.generate(
            prompt,
            prompt_lookup_num_tokens=4,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=0,  # 5.0 looks for one in what it found
            pad_token_id=0,
        )


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_is_refused(variant: tuple[str, str], beams: int):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    own = model.generate(tokens(20), num_beams=beams, max_new_tokens=12, do_sample=False)
    with (
        attach(model, tiny_modulator(shape_of(model)), 0.6),
        pytest.raises(VesicleError, match=MOVED),
    ):
        model.generate(tokens(20), num_beams=beams, max_new_tokens=12, do_sample=False)
    again = model.generate(tokens(20), num_beams=beams, max_new_tokens=12, do_sample=False)
    assert torch.equal(again, own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reordered_rows_are_refused(dtype: torch.dtype):
    llama = tiny_model("llama", dtype=dtype)
    cache = DynamicCache()
    with attach(llama, tiny_modulator(shape_of(llama)), 0.6) as run:
        llama(tokens(9, batch=3), **cache_argument(llama, cache))
        kept = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([0, 2, 1]))
        with pytest.raises(VesicleError, match="row 1 of the cache now holds another sequence"):
            llama(tokens(1, batch=3), **cache_argument(llama, cache))
        # Rows that stay where they are, in another object, are the same sequences.
        kept.reorder_cache(torch.tensor([0, 1, 2]))
        llama(tokens(1, batch=3), **cache_argument(llama, kept))
        assert [plan.n_tokens for plan in run.plans] == [10, 10, 10]


def test_the_cache_of_another_prompt_is_refused(llama: Any, modulator: Modulator):
    first, second = DynamicCache(), DynamicCache()
    with attach(llama, modulator, 0.6):
        llama(tokens(9, seed=1), **cache_argument(llama, first))
        llama(tokens(9, seed=2), **cache_argument(llama, second))
        with pytest.raises(VesicleError, match="row 0 of the cache now holds another sequence"):
            llama(tokens(1), **cache_argument(llama, first))
        llama(tokens(1), **cache_argument(llama, second))


def test_a_cache_filled_elsewhere_is_refused(llama: Any, modulator: Modulator):
    cache = DynamicCache()
    run = attach(llama, modulator, 0.6)
    with run:
        llama(tokens(9), **cache_argument(llama, cache))
    llama(tokens(2), **cache_argument(llama, cache))
    with run, pytest.raises(VesicleError, match="holds 11 entries a row, after 9 of which"):
        llama(tokens(1), **cache_argument(llama, cache))


def test_a_sequence_goes_on_after_attaching_again(llama: Any, modulator: Modulator):
    cache = DynamicCache()
    run = attach(llama, modulator, 0.6)
    for _ in range(2):
        with run:
            llama(tokens(9), **cache_argument(llama, cache))
    assert run.plan.n_tokens == 18


def test_a_pass_that_failed_is_not_continued(llama: Any, modulator: Modulator):
    """It may have filled some layers' caches and not others'."""
    cache = DynamicCache()
    plan_of_nine = Replay(attached_plan(llama, modulator))
    with attach(llama, plan_of_nine):
        llama(tokens(9), **cache_argument(llama, cache))
        with pytest.raises(VesicleError, match="the plan covers 9 tokens"):
            llama(tokens(1), **cache_argument(llama, cache))
        with pytest.raises(VesicleError, match="the pass before this one failed; start a new seq"):
            llama(tokens(1), **cache_argument(llama, cache))
        llama(tokens(9))


def attached_plan(llama: Any, modulator: Modulator) -> Any:
    with attach(llama, modulator, 0.6) as run:
        llama(tokens(9))
    return run.plan
