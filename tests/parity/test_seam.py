"""Whoever writes rows, no executor sees a row that it could not execute."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.decoding import IDS, tiny
from tests.tiny import shape_of
from vesicle.engine import Engine, Sequence
from vesicle.errors import VesicleError
from vesicle.plan import Author, IntArray, Method, Rows, resting_rows
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape

BAD = {
    "channels": ((0, "1 to 64"), (-1, "1 to 64"), (1_000_000, "1 to 64")),
    "bits": ((0, "2, 3, 4, 8, 16"), (5, "2, 3, 4, 8, 16"), (-7, "2, 3, 4, 8, 16")),
    "ffn": ((3, "0 to 2"), (-1, "0 to 2")),
    "attention": ((2, "0 to 1"), (-1, "0 to 1")),
    "kv_blocks": ((0, "2 to 2"), (-5, "2 to 2"), (3, "2 to 2")),
    "head": ((-1, "0 to 97"), (98, "0 to 97")),
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
        if layer == self._shape.n_layers - 1 and self._method.name != "head":
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
