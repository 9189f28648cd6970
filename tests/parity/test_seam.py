"""Whoever writes rows, no executor sees a row that it could not execute."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.decoding import IDS, modulator_for, tiny
from tests.tiny import SHAPE, random_plan, shape_of
from vesicle.engine import Engine, Sequence
from vesicle.errors import VesicleError
from vesicle.modulator import Modulator
from vesicle.phases import EVERYWHERE
from vesicle.plan import (
    FFN_SKIP,
    FOREVER,
    Author,
    IntArray,
    Method,
    Plan,
    Replay,
    Rows,
    resting_rows,
)
from vesicle.plan.rows import OF_HEAD
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape

BAD = {
    "channels": ((0, "1 to 64"), (-1, "1 to 64"), (1_000_000, "1 to 64")),
    "bits": ((0, "2, 3, 4, 8, 16"), (5, "2, 3, 4, 8, 16"), (-7, "2, 3, 4, 8, 16")),
    "ffn": ((3, "0 to 2"), (-1, "0 to 2")),
    "attention": ((2, "0 to 1"), (-1, "0 to 1")),
    "kv_blocks": ((0, "2 to 2"), (-5, "2 to 2"), (3, "2 to 2")),
    "head": ((-1, "0 to 97"), (98, "0 to 97")),
    "likeliest": ((-1, "0 to 97"), (98, "0 to 97")),
    "logits": ((-1, "0 to 97"), (98, "0 to 97")),
}
CASES = [(name, value, allowed) for name, each in BAD.items() for value, allowed in each]
TOKEN = 20
"""Of the two blocks that it sees, both must be read."""


class Careless(Method):
    """Writes one value that is out of bounds, for one token in the last layer."""

    def __init__(self, name: str, value: int, *, ahead: bool) -> None:
        self.name, self.value, self.ahead = name, value, ahead

    def author(self, shape: ModelShape) -> Author:
        return CarelessAuthor(self, shape)


class CarelessAuthor(Author):
    def __init__(self, method: Careless, shape: ModelShape) -> None:
        self._method, self._shape = method, shape

    def planned(self, positions: IntArray) -> Rows | None:
        if not self._method.ahead:
            return None
        rows = resting_rows(self._shape, positions)
        self._write(positions, rows[:, -1])
        return rows

    def _write(self, positions: IntArray, rows: Rows) -> None:
        values = rows[self._method.name][positions == TOKEN]
        values[..., :1] = self._method.value
        rows[self._method.name][positions == TOKEN] = values

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        if layer == self._shape.n_layers - 1 and self._method.name not in OF_HEAD:
            self._write(positions, rows)

    def ffn(self, layer: int, hidden: Any, positions: IntArray, rows: Rows) -> None:
        if layer == self._shape.n_layers - 1:
            self._write(positions, rows)


def message(name: str, value: int, allowed: str, layer: int) -> str:
    where = (TOKEN, layer, 0) if name in ("channels", "bits") else (TOKEN, layer)
    return f"plan field {name!r} is {value} at {where}; allowed: {allowed}"


def read(engine: Engine, sequence: Sequence, prefill: int) -> None:
    engine.forward([(sequence, IDS[:prefill])])
    engine.forward([(sequence, IDS[prefill : prefill + 1])])


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("name", "value", "allowed"), CASES)
def test_the_engine_refuses(weights: str, ahead: bool, name: str, value: int, allowed: str):
    """In prefill, and in a native step whose decisions are known beforehand."""
    engine = Engine.from_model(tiny(), weights=weights)
    method = Careless(name, value, ahead=ahead)
    for prefill in (TOKEN + 5, TOKEN):
        sequence = engine.start(method)
        with pytest.raises(VesicleError) as caught:
            read(engine, sequence, prefill)
        assert str(caught.value) == message(name, value, allowed, engine.shape.n_layers - 1)
        sequence.close()
    engine.generate(IDS[:5], max_new_tokens=3, stop=())  # goes on as if nothing had happened


@pytest.mark.parametrize(("name", "value", "allowed"), CASES)
def test_the_reference_refuses(name: str, value: int, allowed: str):
    model = tiny()
    with (
        attach(model, Careless(name, value, ahead=False)),
        pytest.raises(VesicleError) as caught,
        torch.no_grad(),
    ):
        model(torch.tensor([IDS[: TOKEN + 5]]))
    layer = shape_of(model).n_layers - 1
    assert str(caught.value) == message(name, value, allowed, layer)


def test_a_good_row_passes(rng: np.random.Generator):
    engine = Engine.from_model(tiny(), weights="int4")
    method = Careless("channels", 1, ahead=True)
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[: TOKEN + 5])])
    assert sequence.plan.channels[TOKEN, -1, 0] == 1
    sequence.plan.check(engine.shape)


class Late(Method):
    """Changes a layer's attention after it has run."""

    def author(self, shape: ModelShape) -> Author:
        return LateAuthor()


class LateAuthor(Author):
    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        return None

    def ffn(self, layer: int, hidden: Any, positions: IntArray, rows: Rows) -> None:
        if layer == 1:
            rows["attention"] = 0


def test_what_has_run_is_not_decided_again():
    model = tiny()
    engine = Engine.from_model(model)
    sequence = engine.start(Late())
    with pytest.raises(VesicleError, match="the attention of layer 1 is changed after it has run"):
        engine.forward([(sequence, IDS[:5])])
    assert sequence.length == sequence.plan.n_tokens == 0
    with (
        attach(model, Late()),
        pytest.raises(VesicleError, match="attention of layer 1"),
        torch.no_grad(),
    ):
        model(torch.tensor([IDS[:5]]))


class Shortly(Method):
    """Knows beforehand what the first tokens do, and skips FFNs of the others."""

    def author(self, shape: ModelShape) -> Author:
        return ShortlyAuthor(shape)


class ShortlyAuthor(LateAuthor):
    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    def planned(self, positions: IntArray) -> Rows | None:
        return resting_rows(self._shape, positions[positions < 5])

    def ffn(self, layer: int, hidden: Any, positions: IntArray, rows: Rows) -> None:
        rows["ffn"] = FFN_SKIP


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [3, 6]])
def test_an_author_is_asked_for_what_it_did_not_plan(sizes: list[int]):
    engine = Engine.from_model(tiny(), weights="int4")
    sequence, at = engine.start(Shortly()), 0
    for size in sizes:
        engine.forward([(sequence, IDS[at : at + size])])
        at += size
    assert (sequence.plan.ffn[:5] == 2).all()
    assert (sequence.plan.ffn[5:] == FFN_SKIP).all()


@pytest.mark.parametrize("below", [True, False])
def test_a_replay_that_is_too_short_reads_nothing(below: bool, rng: np.random.Generator):
    engine = Engine.from_model(tiny(), weights="int4")
    plan = random_plan(engine.shape, 16, rng) if below else Plan.rest(engine.shape, 16)
    sequence = engine.start(Replay(plan))
    with pytest.raises(VesicleError, match="the plan covers 16 tokens; token 16 was asked for"):
        engine.forward([(sequence, IDS[:20])])
    assert sequence.length == 0
    engine.forward([(sequence, IDS[:16])])
    assert sequence.plan.equals(plan)


@pytest.mark.parametrize("logits", ["none", "last", "all"])
def test_levels_that_are_no_numbers_are_told_within_a_prompt(logits: Any):
    """In the last layer of an inner token, whose result nobody would see."""
    engine = Engine.from_model(tiny(), weights="int4")
    modulator = modulator_for(engine.shape, "stand-ins")
    modulator.predictor.position_weight.data[-1] = torch.nan
    sequence = engine.start(modulator, 0.5, EVERYWHERE)
    with pytest.raises(VesicleError, match="not finite"):
        engine.forward([(sequence, IDS[:8])], logits)


def test_dense_weights_refuse_every_step_of_a_ladder():
    """Of two steps at one level the first counts."""
    engine = Engine.from_model(tiny())
    modulator = modulator_for(engine.shape, "plain")
    ladder = ((0.5, 4), (0.5, 16), (0.0, 16))
    dopamine = replace(modulator.dopamine, bits_ladder=ladder)
    method = Modulator(
        modulator.predictor, {**modulator.effectors, "dopamine": dopamine}, modulator.info
    ).at(0.5)
    assert not engine._native.reach(engine.start(method))


def test_what_is_forgotten_after_the_end_can_be_replayed():
    """Of four KV heads two forget, but only after the Plan's last token."""
    shape = replace(SHAPE, n_heads=8, n_kv_heads=4)
    evict_after = np.full((40, shape.n_layers, 4), FOREVER, np.int32)
    evict_after[:16, 1, :2] = 60
    plan = Plan.rest(shape, 40).with_fields(evict_after=evict_after)
    plan.check(shape)
    author = Replay(plan).author(shape)
    assert np.array_equal(author.evict_after, evict_after)
    assert plan.equals(Plan.rest(shape, 40).with_fields(evict_after=evict_after[..., :2]))
