"""Authors who are asked in the middle of a pass, and what they may do there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, native
from vesicle.engine import Engine, core
from vesicle.errors import VesicleError
from vesicle.plan import Author, Method, Rows

pytestmark = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


class Curious(Method):
    """Calls a function in the FFN of each layer, and may have few blocks read."""

    def __init__(self, look: Callable[[int], Any] = lambda layer: None, blocks: int = 99) -> None:
        self.look, self.blocks = look, blocks
        self.seen: list[Tensor] = []

    def author(self, shape: Any) -> Author:
        return CuriousAuthor(self)


class CuriousAuthor(Author):
    def __init__(self, method: Curious) -> None:
        self._method = method

    def attention(self, layer: int, positions: Any, rows: Rows) -> None:
        rows["kv_blocks"] = np.minimum(positions // 16 + 1, self._method.blocks)

    def ffn(self, layer: int, hidden: Tensor, positions: Any, rows: Rows) -> None:
        self._method.seen.append(hidden)
        self._method.look(layer)


@pytest.fixture
def engine() -> Engine:
    return native("int4")


def read(engine: Engine, method: Method, n: int = 40) -> Tensor:
    return engine.forward([(engine.start(method), IDS[:n])], "all")[0]


def test_one_may_read_another_text(engine: Engine):
    expected, other = read(engine, Curious()), engine.start()
    alone = engine.forward([(engine.start(), IDS[50:53])])[0]
    found: list[Tensor] = []

    def look(layer: int) -> None:
        if layer == 1:
            found.extend(engine.forward([(other, IDS[50:53])]))

    assert torch.equal(read(engine, Curious(look)), expected)
    assert torch.equal(found[0], alone)


def test_what_it_was_given_is_its_own(engine: Engine):
    method = Curious()
    read(engine, method)
    assert len(method.seen) == 4
    assert not any(torch.equal(method.seen[0], later) for later in method.seen[1:])


def test_its_own_text_cannot_be_read_once_more(engine: Engine):
    method = Curious(lambda layer: engine.forward([(sequence, [1])]))
    sequence = engine.start(method)
    with pytest.raises(VesicleError, match="being read already"):
        engine.forward([(sequence, IDS[:20])])
    method.look = lambda layer: None
    assert torch.equal(engine.forward([(sequence, IDS[:40])], "all")[0], read(engine, Curious()))


def test_a_text_that_it_closes_is_told(engine: Engine):
    method = Curious(lambda layer: sequence.close())
    sequence = engine.start(method)
    with pytest.raises(VesicleError, match="closed"):
        engine.forward([(sequence, IDS[:20])])


def test_it_may_look_at_texts_that_are_read_beside_its_own(engine: Engine):
    beside = engine.start()
    engine.forward([(beside, IDS[:5])])
    method = Curious(lambda layer: (beside.plan, beside.cost, sequence.cost))
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:20]), (beside, IDS[5:9])])
    alone = engine.start()
    engine.forward([(alone, IDS[:5])])
    engine.forward([(alone, IDS[5:9])])
    assert beside.cost == alone.cost
    assert beside.plan.equals(alone.plan)


def test_summaries_are_made_again_after_a_pass_that_was_broken_off(engine: Engine):
    def fail(layer: int) -> None:
        if layer == 2:
            raise ValueError("no")

    method = Curious(fail, blocks=2)
    sequence, expected = engine.start(method), engine.start(Curious(blocks=2))
    with pytest.raises(ValueError, match="no"):
        engine.forward([(sequence, IDS[:40])])
    method.look = lambda layer: None
    for start, stop in ((0, 32), (32, 33), (33, 60)):
        pair = [(sequence, IDS[start:stop]), (expected, IDS[start:stop])]
        first, second = (engine.forward([part])[0] for part in pair)
        assert torch.equal(first, second)


def test_what_it_says_of_itself_is_checked(engine: Engine):
    class Wrong(CuriousAuthor):
        def releases(self, positions: Any) -> Any:
            return np.zeros(3, bool)

    method, good = Curious(), engine.start()
    method.author = lambda shape: Wrong(method)  # type: ignore[method-assign]
    outcomes = engine.attempt([(engine.start(method), IDS[:20]), (good, IDS[:20])])
    assert isinstance(outcomes[0], VesicleError)
    assert torch.equal(outcomes[1], engine.forward([(engine.start(), IDS[:20])])[0])


def test_only_what_the_core_cannot_execute_runs_in_pytorch():
    """So that no token's route depends on how a text is cut."""
    from vesicle.plan import Plan, Replay

    engine = native("fp32")
    plan = Plan.rest(engine.shape, 60)
    plan.bits[30:33] = 4
    whole = engine.forward([(engine.start(Replay(plan)), IDS[:60])], "all")[0]
    for size in (1, 7, 31):
        sequence = engine.start(Replay(plan))
        pieces = [
            engine.forward([(sequence, IDS[i : min(60, i + size)])], "all")[0]
            for i in range(0, 60, size)
        ]
        assert torch.equal(torch.cat(pieces)[:30], whole[:30])
        assert sequence.plan.equals(plan)
