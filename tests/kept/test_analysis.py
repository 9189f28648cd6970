"""What is noted of a text that was read: against the cache itself, and sums by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.evaluation.methods.memory import memory_method
from vesicle.eviction import Forgetful, HeavyHitters, SinksAndRecent
from vesicle.kept.analysis import (
    Kept,
    always_held,
    by_class,
    read,
    sees_entries,
    tenths,
    to_dict,
)
from vesicle.namm import Namm, NammMemory, NammSettings

SETTINGS = NammSettings(network="linear", interval=32, observes=32, sinks=2, recent=16)
IDS = np.random.default_rng(5).integers(1, 97, 150).tolist()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def drawn(engine: Engine) -> Namm:
    rng = np.random.default_rng(0)
    shape = (engine.shape.n_layers, engine.shape.n_kv_heads)
    return Namm(
        settings=SETTINGS,
        parameters=rng.normal(size=SETTINGS.n_parameters).astype(np.float32),
        profile=rng.normal(size=shape).astype(np.float32),
    )


METHODS = {
    "namm": lambda engine: NammMemory(drawn(engine), memory=0.4),
    "heavy-hitters": lambda engine: HeavyHitters(48, interval=32),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_what_the_cache_holds(llama: Any, name: str):
    engine = Engine.from_model(llama)
    method = METHODS[name](engine)
    told = list[int]()
    kept = read(engine, method, IDS, told.append)
    assert told == [32, 64, 96, 128, 150]
    sequence = engine.start(method)
    sequence.begin_prompt(150, scored=False)
    over_time = []
    for begin in range(150):  # token by token: the cuts of a text change nothing
        engine.forward([(sequence, IDS[begin : begin + 1])], "none")
        if (begin + 1) % 32 == 0:
            held = [len(h) for layer in range(3) for h in sequence.cache.held(layer)]
            over_time.append(np.mean(held) / (begin + 1))
    for layer in range(3):
        for head, positions in enumerate(sequence.cache.held(layer)):
            assert np.nonzero(kept.held[layer, head])[0].tolist() == positions.tolist()
            assert kept.entries[layer, head] == len(positions)
    assert kept.over_time == pytest.approx(over_time)
    assert kept.over_time[-1] < 0.6
    assert kept.asked == [32, 64, 96, 128]
    assert kept.layers == [0, 1, 2]
    assert kept.held[:, :, kept.always].all()
    assert not kept.held[:, :, ~kept.always].all()


def test_what_always_stays(llama: Any):
    namm = NammMemory(drawn(Engine.from_model(llama)), memory=0.4)
    stays = np.nonzero(always_held(namm, 150, 128))[0].tolist()
    assert stays == [0, 1, *range(112, 150)]
    protects = NammMemory(namm.namm, memory=0.4, protects=[(10, 12)])
    assert np.nonzero(always_held(protects, 150, 128))[0].tolist()[:4] == [0, 1, 10, 11]
    heavy = HeavyHitters(48, recent=16, interval=32)
    assert np.nonzero(always_held(heavy, 150, 128))[0].tolist() == [*range(112, 150)]
    other = SinksAndRecent(48, interval=32)
    assert np.nonzero(always_held(other, 150, 128))[0].tolist() == [*range(128, 150)]


def test_what_is_seen(llama: Any):
    prefers = NammMemory(drawn(Engine.from_model(llama)))
    fresh = memory_method("recency", 0.5, 100)
    assert isinstance(fresh, Forgetful)
    assert [sees_entries(m) for m in (prefers, fresh, HeavyHitters(32))] == [True, False, True]


def test_windowed_layers_are_left_out():
    engine = Engine.from_model(tiny_model("gemma3"))
    method = NammMemory(Namm.fresh(SETTINGS), memory=0.5)
    kept = read(engine, method, IDS[:128])
    assert kept.layers == [1]
    assert kept.held.shape == (1, 2, 128)
    assert kept.share == 0.5 == kept.over_time[-1]
    assert to_dict(kept, ["special"] * 128, IDS[:128], [""] * 128)["layers"][0]["layer"] == 1
    engine.shape = replace(engine.shape, windows=(24, 24, 24))
    with pytest.raises(VesicleError, match="every layer of this model has a sliding window"):
        read(engine, method, IDS)


def test_a_short_text_is_refused(llama: Any):
    engine = Engine.from_model(llama)
    method = NammMemory(Namm.fresh(SETTINGS), memory=0.5)
    line = "the text has 31 tokens, and the first are forgotten after 32: give a longer one"
    with pytest.raises(VesicleError, match=line):
        read(engine, method, IDS[:31])
    assert read(engine, method, IDS[:32]).asked == [32]


def test_the_cache_is_freed_though_reading_fails(llama: Any):
    engine = Engine.from_model(llama)
    used = engine.pool.blocks_in_use

    def fails(length: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:  # which holds on to the sequence
        read(engine, NammMemory(Namm.fresh(SETTINGS), memory=0.5), IDS, fails)
    assert caught.tb is not None
    assert engine.pool.blocks_in_use == used


def example() -> Kept:
    """One layer, 20 tokens: the first head holds all even ones, the second the newest 10."""
    held = np.zeros((1, 2, 20), bool)
    held[0, 0, ::2] = True
    held[0, 1, 10:] = True
    return Kept(
        held=held,
        layers=[3],
        always=np.arange(20) >= 16,
        asked=[16],
        over_time=[0.4375],
    )


NAMES = ["number", "other word"] * 8 + ["number", "punctuation"] * 2


def test_sums_by_hand():
    kept = example()
    assert kept.share == 0.5
    assert kept.entries.tolist() == [[10, 10]]
    assert kept.by_token.tolist() == [0.5, 0] * 5 + [1, 0.5] * 5
    assert kept.by_age == [(2 * i, 2 * i + 2, 0.25 if i < 5 else 0.75) for i in range(10)]
    words, numbers = by_class(kept, NAMES)  # in order, and without what always stays
    assert (words.name, words.tokens, numbers.name, numbers.tokens) == (
        "other word",
        8,
        "number",
        8,
    )
    assert words.share == pytest.approx(3 * 0.5 / 8)
    assert numbers.share == pytest.approx((5 * 0.5 + 3) / 8)
    mean = (words.share + numbers.share) / 2
    assert words.to_mean == pytest.approx(words.share / mean)
    assert numbers.to_age == pytest.approx(numbers.share / mean)


def test_age_is_not_taken_for_class():
    """Tokens that are kept for their place alone are kept no more than others as old."""
    kept = example()
    held = np.zeros((1, 2, 20), bool)
    held[:, :, 8:] = True
    old = replace(kept, held=held)
    names = ["number"] * 8 + ["other word"] * 12
    words, numbers = by_class(old, names)
    assert words.to_mean == pytest.approx(2)
    assert words.to_age == pytest.approx(1)
    assert (numbers.share, numbers.to_mean, numbers.to_age) == (0, 0, None)


def test_nothing_to_compare():
    kept = replace(example(), always=np.ones(20, bool))
    assert by_class(kept, NAMES) == []
    nothing = replace(example(), held=np.zeros((1, 2, 20), bool))
    assert [row.to_mean for row in by_class(nothing, NAMES)] == [None, None]


@pytest.mark.parametrize("n", [1, 3, 10, 16, 1999])
def test_tenths_cover_the_text(n: int):
    edges = tenths(n)
    assert [i for a, b in edges for i in range(a, b)] == [*range(n)]
    sizes = [b - a for a, b in edges]
    assert len(edges) == min(n, 10)
    assert max(sizes) - min(sizes) <= 1


def test_json_has_all_of_it():
    kept = example()
    made = to_dict(kept, NAMES, list(range(20)), [f"t{i}" for i in range(20)])
    assert made["share"] == 0.5
    assert (made["asked_last"], made["share_when_asked_last"]) == (16, 0.4375)
    head = {"entries": 10, "share": 0.5}
    assert made["layers"] == [{"layer": 3, "share": 0.5, "heads": [head, head]}]
    assert made["tokens"][10] == {
        "id": 10,
        "text": "t10",
        "share": 1.0,
        "class": "number",
        "always": False,
    }
    assert made["tokens"][19]["always"] is True
    assert [row["name"] for row in made["classes"]] == ["other word", "number"]
    assert made["over_time"] == [{"length": 16, "share": 0.4375}]
    assert made["by_age"][9] == {"first": 18, "stop": 20, "share": 0.75}
