import pytest
import torch

from tests.training.tiny_run import tiny_model, tiny_windows
from vesicle.duo import by_chance, importance, nested, own_ffns, reevaluate, unsure
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.plan import FFN_SMALL, Dense, Plan, Replay, StandIns


@pytest.fixture(scope="module", params=["fp32", "int8"])
def engine(request):
    return Engine.from_model(tiny_model(), weights=request.param)


@pytest.fixture(scope="module")
def ids():
    return tiny_windows(1)[0, :24].tolist()


@pytest.fixture(scope="module")
def cheap(engine, ids):
    model = tiny_model()
    own = own_ffns(model)
    small = nested(own, importance(model, own, tiny_windows(2)[None]), 8)
    rest = Plan.rest(engine.shape, len(ids))
    ffn = torch.full((len(ids), engine.shape.n_layers), FFN_SMALL).numpy()
    return Replay(rest.with_fields(ffn=ffn), StandIns(ffn=small))


def scored(engine, ids, n_prompt, method):
    """What a method alone loses, token by token, and what it costs."""
    sequence = engine.start(method)
    logits = torch.cat([engine.forward([(sequence, [i])])[0] for i in ids[:-1]])
    nats = torch.nn.functional.cross_entropy(
        logits.float(), torch.tensor(ids[1:]), reduction="none"
    )
    return nats[n_prompt - 1 :], sequence.cost.flops_total


def test_always_again_is_the_second_look_and_never_the_first(engine, ids, cheap):
    twice = reevaluate(engine, ids, 1, cheap, Dense(), lambda logits: True)
    nats, dense = scored(engine, ids, 1, Dense())
    torch.testing.assert_close(twice.nats, nats)
    assert twice.again.all()
    assert twice.dense_flops == dense
    once = reevaluate(engine, ids, 1, cheap, Dense(), lambda logits: False)
    nats, flops = scored(engine, ids, 1, cheap)
    torch.testing.assert_close(once.nats, nats)
    assert not once.again.any()
    assert once.flops == flops
    assert twice.flops == dense + flops  # both looks are paid for
    assert once.share < 1 < twice.share


def test_a_rule_reads_the_first_look(engine, ids, cheap):
    some = reevaluate(engine, ids, 4, cheap, Dense(), unsure(0.05))
    none = reevaluate(engine, ids, 4, cheap, Dense(), unsure(0.0))
    each = reevaluate(engine, ids, 4, cheap, Dense(), unsure(1.0))
    assert not none.again.any()
    assert each.again.all()
    assert len(some.nats) == len(ids) - 4
    assert none.flops <= some.flops <= each.flops
    drawn = reevaluate(engine, ids, 4, cheap, Dense(), by_chance(0.5))
    assert 0 < drawn.again.float().mean() < 1
    assert engine.pool.blocks_in_use == 0


def test_what_is_refused(engine, ids, cheap):
    with pytest.raises(VesicleError, match=r"confidence is 1\.5; allowed: 0 to 1"):
        unsure(1.5)
    with pytest.raises(VesicleError, match="n_prompt is 0; allowed: 1 to 23"):
        reevaluate(engine, ids, 0, cheap, Dense(), unsure(0.5))
