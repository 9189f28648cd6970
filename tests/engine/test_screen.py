"""The likeliest token without reading all of the head: always that of the whole head."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.default_prompts import PROMPTS
from tests.tiny import randomise
from vesicle.engine import Engine, core, screen
from vesicle.engine.packed import HEAD_TILE, PackedHead
from vesicle.engine.screen import HeadScreen, Screening
from vesicle.errors import VesicleError
from vesicle.plan import Method, Plan, Replay

pytestmark = pytest.mark.skipif(not core.available(), reason="the core is not built here")

VOCABULARY = 1003
WIDTH = 96
IDS = np.random.default_rng(1).integers(0, VOCABULARY, 400).tolist()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch):
    """Small heads get screens too."""
    monkeypatch.setattr(screen, "LEAST_ROWS", 512)


def engine_for(weights: str = "int8") -> Engine:
    """Of a model with a head of some tiles, the last not whole; inputs lie in few directions."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    randomise(model, 0)
    # As real models have it: a few numbers of the final norm are far larger than the others.
    model.model.norm.weight.data[5:] *= 0.05
    return Engine.from_model(model.eval(), weights=weights, kv="fp32")


def screening(engine: Engine) -> Screening:
    assert engine._native is not None
    return engine._native.screening


def whole(engine: Engine, ids: list[int], method: Method | None = None) -> list[int]:
    sequence = engine.start(method)
    return [int(engine.forward([(sequence, [i])])[0].argmax()) for i in ids]


def test_it_is_the_whole_heads_token_and_reads_less():
    engine = engine_for()
    assert engine.head_share is None
    sequence = engine.start()
    found = [engine.likeliest([(sequence, [i])])[0] for i in IDS]
    assert found == whole(engine, IDS)
    assert screening(engine).screen is not None
    assert engine.head_share < 0.5  # 63 tokens of it without a screen
    assert set(sequence.plan.head) == {0}  # the Plan has nothing of it, and so has the price


@pytest.mark.parametrize("n", [2, 4, 20])
def test_several_sequences_at_once(n: int):
    """Few are screened, of many the whole head is read."""
    engine = engine_for()
    sequences = [engine.start() for _ in range(n)]
    steps = max(20, 200 // n)
    parts = [IDS[10 * i : 10 * i + steps] for i in range(n)]
    found = [
        engine.likeliest([(s, [p[i]]) for s, p in zip(sequences, parts, strict=True)])
        for i in range(steps)
    ]
    assert (engine.head_share == 1) == (n == 20)
    assert screening(engine).screen is not None
    assert [list(tokens) for tokens in zip(*found, strict=True)] == [
        whole(engine, p) for p in parts
    ]


def test_a_plan_that_screens_goes_before():
    """Its survivors are what the Plan says, and are priced; other tokens of the pass are exact."""
    engine = engine_for()
    [engine.likeliest([(s, [i])]) for s in [engine.start()] for i in IDS[:100]]
    rows = np.where(np.arange(60) % 2, 3, 0).astype(np.int32)
    plan = Plan.rest(engine.shape, 60).with_fields(head=rows)
    before = engine_for()
    planned, alone, rest = engine.start(Replay(plan)), before.start(Replay(plan)), engine.start()
    for i in IDS[:60]:
        pair = engine.likeliest([(planned, [i]), (rest, [i])])
        [token] = before.likeliest([(alone, [i])])
        assert pair[0] == token
    assert planned.plan.equals(plan)
    assert planned.cost == alone.cost


def test_ties_go_to_the_first():
    """Also between a row that is read whole for its score and one of another tile or thread."""
    engine = engine_for()
    head = engine._weights.head
    assert isinstance(head, PackedHead)
    for plane, width in ((head.high, 320), (head.trailing, 256)):
        tiles = plane.view(-1, head.groups, width)
        tiles[1:-1] = tiles[:1]  # every row 16 times and more
    sequence = engine.start()
    found = [engine.likeliest([(sequence, [i])])[0] for i in IDS]
    assert screening(engine).screen is not None
    assert found == whole(engine, IDS)
    assert max(found) < HEAD_TILE or max(found) >= VOCABULARY - VOCABULARY % HEAD_TILE


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(number: float):
    engine = engine_for()
    sequence = engine.start()
    for i in IDS[:100]:
        engine.likeliest([(sequence, [i])])
    assert screening(engine).screen is not None
    head = engine._weights.head
    head.high.view(-1, head.groups, 320)[3, 0, 256:258] = torch.tensor(
        [number], dtype=torch.float16
    ).view(torch.uint8)
    with pytest.raises(VesicleError, match="finite"):
        engine.likeliest([(sequence, [IDS[100]])])


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_heads_without_a_trailing_plane_have_none(weights: str):
    engine = engine_for(weights)
    sequence = engine.start()
    for i in IDS[:80]:
        engine.likeliest([(sequence, [i])])
    assert screening(engine).screen is None
    assert engine.head_share == 1


def test_it_is_built_from_a_few_states_and_again_from_many():
    engine = engine_for()
    sequence = engine.start()
    for i in IDS[:70]:
        engine.likeliest([(sequence, [i])])
    first = screening(engine).screen
    assert first is not None
    assert screening(engine).learns
    for place in range(9):
        other = engine.start()
        engine.likeliest([(other, IDS[30 * place :][:128])])
    assert screening(engine).screen is not first
    assert not screening(engine).learns


@pytest.mark.parametrize("k", [1, 7, 16])
def test_the_bound_holds_for_any_states(k: int, monkeypatch: pytest.MonkeyPatch):
    """Also for states that have nothing in common with those it was built from."""
    monkeypatch.setattr(screen, "DIRECTIONS", k)
    head = engine_for()._weights.head
    assert isinstance(head, PackedHead)
    generator = torch.Generator().manual_seed(2)
    built = HeadScreen(head, torch.randn(40, WIDTH, generator=generator))
    rows = torch.arange(VOCABULARY)
    left = (head.rows(rows) - head.rows(rows, 4)).double()
    products, norms, directions = built.products, built.norms, built.directions.double()
    torch.testing.assert_close(directions @ directions.T, torch.eye(k).double(), atol=1e-5, rtol=0)
    assert (norms >= left.norm(dim=1) * (1 - 1e-6)).all()
    torch.testing.assert_close(products.double(), left @ directions.T, atol=2e-3, rtol=1e-3)
    for x in torch.randn(50, WIDTH, generator=generator).double() * 10:
        along = directions @ x
        rest = (x - along @ directions).norm()
        error = (left @ x - products.double() @ along).abs()
        assert (error <= norms * (rest + x.norm() / 1024)).all()


def test_an_engine_made_in_inference_mode_works_outside_of_it():
    with torch.inference_mode():
        engine = engine_for()
    sequence = engine.start()
    assert [engine.likeliest([(sequence, [i])])[0] for i in IDS[:80]] == whole(engine, IDS[:80])
    assert screening(engine).screen is not None


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_a_screen_that_cannot_be_built_harms_nobody(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise error

    engine = engine_for()
    monkeypatch.setattr(screen, "HeadScreen", fail)
    sequence, found, interrupted = engine.start(), [], 0
    for i in IDS[:100]:
        n = sequence.length
        try:
            found += engine.likeliest([(sequence, [i])])
        except KeyboardInterrupt:
            interrupted += 1
            found.append(-1)
        assert sequence.length == n + 1
    expected = whole(engine, IDS[:100])
    assert sum(a != b for a, b in zip(found, expected, strict=True)) == interrupted
    # An error is not tried again; who interrupts wants the pass to end, not the screen.
    assert screening(engine).learns == (interrupted > 0)


@pytest.mark.slow
@pytest.mark.model
def test_10000_states_of_the_default_model():
    """From its own answers: every token is the whole head's."""
    from vesicle.models import ensure_default_model

    engine = Engine.from_pretrained(ensure_default_model(progress=False))
    differ = 0
    for prompt in PROMPTS:
        first, same = engine.start(), engine.start()
        ids = engine.text.chat(prompt)
        for _ in range(512):
            [token] = engine.likeliest([(first, ids)])
            differ += token != int(engine.forward([(same, ids)])[0].argmax())
            ids = [token]
    assert differ == 0
    assert engine.head_share < 0.5
