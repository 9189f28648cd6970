"""The two-stage LM head: a screen by the leading four bits, then exact logits of the survivors."""

import numpy as np
import pytest
import torch

from tests.default_prompts import PROMPTS
from tests.engine.decoding import IDS as LONG
from tests.engine.decoding import VOCABULARY, modulator_for, tiny
from vesicle.cost import price, price_tokens
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.sampling import Sampling
from vesicle.modulator import ModulatorMethod
from vesicle.plan import Method, Plan, Replay

IDS = LONG[:100]
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not core.available(), reason="the core is not built here")
)
BOTH = pytest.mark.parametrize("path", [NATIVE, "general"])
WEIGHTS = pytest.mark.parametrize("weights", ["int4", "int8"])


def engine_for(path: str, weights: str = "int8") -> Engine:
    engine = Engine.from_model(tiny(), weights=weights, kv="fp32")
    if path == "general":
        engine._native = None
    return engine


def screened(engine: Engine, survivors: int) -> Plan:
    """Rest, but for the head, which two tokens of three screen."""
    head = np.where(np.arange(len(IDS)) % 3 > 0, survivors, 0).astype(np.int32)
    return Plan.rest(engine.shape, len(IDS)).with_fields(head=head)


def decoded(engine: Engine, method: Method, prefill: int = 0) -> tuple[Sequence, list[int]]:
    """The likeliest token after each of `IDS` from position `prefill` on."""
    sequence = engine.start(method)
    if prefill:
        engine.forward([(sequence, IDS[:prefill])], "none")
    return sequence, [engine.likeliest([(sequence, [i])])[0] for i in IDS[prefill:]]


@BOTH
@WEIGHTS
@pytest.mark.parametrize("survivors", [VOCABULARY, VOCABULARY - 1])
def test_where_all_words_survive_it_is_the_whole_head(path: str, weights: str, survivors: int):
    engine = engine_for(path, weights)
    _, whole = decoded(engine, Replay(Plan.rest(engine.shape, len(IDS))))
    plan = screened(engine, survivors)
    sequence, tokens = decoded(engine, Replay(plan))
    assert tokens == whole
    assert sequence.plan.equals(plan)
    full = engine.start(Replay(plan))
    assert whole == [int(engine.forward([(full, [i])])[0].argmax()) for i in IDS]


@BOTH
def test_more_survivors_than_words_are_all_words(path: str):
    engine = engine_for(path)
    method = ModulatorMethod(modulator_for(engine.shape, "plain", head_survivors=1000), 0.5)
    sequence, _ = decoded(engine, method)
    sequence.plan.check(engine.shape)
    assert set(sequence.plan.head) == {VOCABULARY}


@pytest.mark.skipif(not core.available(), reason="the core is not built here")
@WEIGHTS
@pytest.mark.parametrize("kind", [1, 3, 40, "modulator"])
def test_both_paths_agree(weights: str, kind: int | str):
    """From the same cache each time; see `test_decode`, also for how many steps may differ."""
    native, general = engine_for("native", weights), engine_for("general", weights)
    general.pool = native.pool
    if isinstance(kind, int):
        method: Method = Replay(screened(native, kind))
    else:
        # Its levels lie on both sides of 0.5.
        modulator = modulator_for(native.shape, "plain", head_survivors=5, head_below=0.5)
        method = ModulatorMethod(modulator, 0.5)
    a, same, heads = native.start(method), [], []
    native.forward([(a, IDS[:40])], "none")
    for t in range(40, 100):
        b = general.start(method)
        b.cache = a.cache.fork(t)
        tokens = [e.likeliest([(s, [IDS[t]])])[0] for e, s in ((native, a), (general, b))]
        heads.append(int(a.plan.head[-1]))
        assert heads[-1] == b.plan.head[-1]
        alike = a.plan.tokens(t).equals(b.plan)
        same.append(alike and tokens[0] == tokens[1])
        if alike:
            assert {n: v[-1] for n, v in a.token_costs.items()} == {
                n: v[-1] for n, v in b.token_costs.items()
            }
    assert np.mean(same) >= 0.9
    assert len(set(heads)) == 2


@BOTH
@WEIGHTS
def test_priced_as_counted(path: str, weights: str):
    """Also in a pass over many tokens, of which the last alone has a head."""
    engine = engine_for(path, weights)
    plan = screened(engine, 7)
    sequence = engine.start(Replay(plan))
    engine.likeliest([(sequence, IDS[:50])])
    for i in IDS[50:]:
        engine.likeliest([(sequence, [i])])
    ran = np.arange(len(IDS)) >= 49
    assert sequence.plan.head.tolist() == (plan.head * ran).tolist()
    prices = price_tokens(sequence.plan, engine.shape, with_logits=ran)
    for name, values in prices.items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)
    assert sequence.cost == price(sequence.plan, engine.shape, with_logits=ran)
    d, v = engine.shape.width, VOCABULARY
    head = sequence.token_costs["flops_head"]
    assert head[49:51].tolist() == [2 * d * (v + 7 * (plan.head[t] > 0)) for t in (49, 50)]


@BOTH
def test_scoring_and_sampling_never_screen(path: str):
    engine = engine_for(path)
    method = Replay(screened(engine, 7))
    rest, scored = engine.start(), engine.start(method)
    for token in IDS[:32]:  # one by one, since many at rest share products that round otherwise
        (expected,), (logits,) = (engine.forward([(s, [token])], "all") for s in (rest, scored))
        assert torch.equal(logits, expected)
    assert scored.plan.head.tolist() == [0] * 32
    assert scored.cost == rest.cost
    sampling = Sampling(temperature=1.5, seed=3)
    tokens, sequence = engine.generate(IDS[:1], method, max_new_tokens=38, sampling=sampling)
    assert set(sequence.plan.head.tolist()) == {0}
    assert tokens == engine.generate(IDS[:1], max_new_tokens=38, sampling=sampling)[0]
    _, greedy = engine.generate(IDS[:20], method, max_new_tokens=20)
    assert greedy.plan.head.tolist() == [0] * 19 + screened(engine, 7).head[19:39].tolist()


@BOTH
def test_a_plan_replays(path: str):
    engine = engine_for(path)
    modulator = modulator_for(engine.shape, "stand-ins", head_survivors=3)
    first, a = engine.generate(IDS[:20], modulator, 0.6, max_new_tokens=40)
    assert set(a.plan.head[19:]) == {3}
    again, b = engine.generate(IDS[:20], Replay(a.plan, modulator.stand_ins), max_new_tokens=40)
    assert again == first
    assert b.plan.equals(a.plan)
    assert b.cost.flops_head == a.cost.flops_head


@BOTH
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_dense_weights_have_no_planes_to_screen_by(path: str, weights: str):
    engine = engine_for(path, weights)
    sequence, tokens = decoded(engine, Replay(screened(engine, 1)), prefill=70)
    assert sequence.plan.head.tolist() == [0] * len(IDS)
    assert tokens == decoded(engine, Replay(Plan.rest(engine.shape, len(IDS))), prefill=70)[1]


@BOTH
def test_the_screen_does_not_read_trailing_planes(path: str):
    """The one survivor is the one whatever the trailing planes hold."""
    engine = engine_for(path)
    method = Replay(screened(engine, 1))
    _, tokens = decoded(engine, method)
    engine._weights.head.trailing.fill_(255)  # untied: no embedding is read from it
    _, spoilt = decoded(engine, method)
    _, whole = decoded(engine, Replay(Plan.rest(engine.shape, len(IDS))))
    chosen = screened(engine, 1).head > 0
    assert (np.array(spoilt) == tokens)[chosen].all()
    assert (np.array(whole) != tokens).any()


@pytest.mark.model
def test_64_survivors_hold_the_default_models_token():
    """In at least 99 of 100 places of real text, by the definition and by the engine."""
    from transformers import AutoModelForCausalLM

    from vesicle.models import Text, ensure_default_model

    folder = ensure_default_model(progress=False)
    engine, text = Engine.from_pretrained(folder), Text.from_folder(folder)
    ids = text.encode("\n".join(PROMPTS))[:200]
    assert len(ids) == 200
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        [x] = model.model(torch.tensor([ids])).last_hidden_state
    head = engine._weights.head
    survivors, logits = head.survivors(x, 64)
    best = survivors.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
    assert (best == head.multiply(x).argmax(-1)).float().mean() >= 0.99

    plan = Plan.rest(engine.shape, 200)
    screen = plan.with_fields(head=np.full(200, 64, np.int32))
    first, second = engine.start(Replay(plan)), engine.start(Replay(screen))
    pairs = [engine.likeliest([(first, [i]), (second, [i])]) for i in ids]
    assert np.mean([a == b for a, b in pairs]) >= 0.99
    assert second.plan.equals(screen)
    assert second.cost == price(screen, engine.shape)
    share = second.cost.weight_bytes / first.cost.weight_bytes
    assert 0.855 < share < 0.857  # of the head, a third of the bytes, 4 of 9 bits are not read
