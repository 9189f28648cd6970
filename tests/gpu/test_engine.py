"""The GPU engine against the CPU engine: one Plan, the same logits; one method, the same Plan."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import tiny_llama
from tests.tiny import random_plan, tiny_modulator
from vesicle.cost import price_tokens
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.gpu import GpuEngine, GpuSequence
from vesicle.modulator import ModulatorMethod
from vesicle.plan import FULL_BITS, Dense, Method, Plan, Replay
from vesicle.predictors import CONTROLS
from vesicle.retention import Retention

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
TOLERANCE = 1e-3
"""fp32, logits of order 10, sums in another order."""
PREFIX, NEW = 50, 3
"""Three complete blocks and a part of the fourth, then decode steps."""
IDS = np.random.default_rng(0).integers(0, 97, PREFIX + NEW).tolist()


@pytest.fixture(scope="module")
def cpu(llama: Any) -> Engine:
    return Engine.from_model(llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def prefix(engine: GpuEngine) -> GpuSequence:
    """A sequence that read the prefix at rest."""
    sequence = engine.start()
    engine.forward([(sequence, IDS[:PREFIX])], "none")
    return sequence


def fork(engine: GpuEngine, prefix: GpuSequence, method: Method) -> GpuSequence:
    """A sequence under `method` that has the prefix behind it; the interpreter is slow."""
    new = engine.start(method)
    engine.pool.grow(new.pages, PREFIX)
    for store in (engine.pool.keys, engine.pool.values, engine.pool.summaries):
        store[:, new.pages] = store[:, prefix.pages]
    new.length, new.token_ids = PREFIX, list(prefix.token_ids)
    rest = new.given_rows(0, PREFIX) if isinstance(method, Replay) else prefix.given_rows(0, PREFIX)
    counts = np.zeros((*rest.shape[:2], 6), np.int32)
    new.record(rest, counts, None, np.zeros(PREFIX, np.bool_))
    return new


def mixed_plan(engine: GpuEngine, seed: int, fields: tuple[str, ...]) -> Plan:
    """At rest in the prefix; after it `fields` of a random Plan."""
    rest = Plan.rest(engine.shape, PREFIX + NEW)
    varied = random_plan(engine.shape, PREFIX + NEW, np.random.default_rng(seed))
    plan = replace(rest, **{name: getattr(varied, name) for name in fields})
    return rest.tokens(0, PREFIX).joined(plan.tokens(PREFIX))


FIELDS = {
    "channels": ("channels",),
    "ffn": ("ffn",),
    "attention": ("attention",),
    "kv_blocks": ("kv_blocks",),
    "all": ("channels", "ffn", "attention", "kv_blocks"),
}


def steps(engine: GpuEngine, sequence: GpuSequence) -> Tensor:
    return torch.cat([engine.forward([(sequence, [token])])[0] for token in IDS[PREFIX:]]).cpu()


def expected(cpu: Engine, method: Method) -> tuple[Tensor, Any]:
    """The CPU engine's logits of the decode steps, token by token, and its sequence."""
    sequence = cpu.start(method)
    cpu.forward([(sequence, IDS[:PREFIX])], "none")
    return torch.cat([cpu.forward([(sequence, [t])])[0] for t in IDS[PREFIX:]]), sequence


def close(first: Tensor, second: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (first - second).abs()
    assert difference.max() < tolerance, f"{difference.amax(-1)}, mean {difference.mean():.2e}"


def test_prefill_and_decode_are_the_model(engine: GpuEngine, llama: Any, device: torch.device):
    """Prefill of every position, then a second chunk, then decode; Plan and cost at rest."""
    sequence = engine.start()
    out = [engine.forward([(sequence, IDS[:20])], "all")[0]]
    out.append(engine.forward([(sequence, IDS[20:25])], "all")[0])
    out += [engine.forward([(sequence, [token])])[0] for token in IDS[25:27]]
    close(torch.cat(out).cpu(), llama(torch.tensor([IDS[:27]])).logits[0])
    assert sequence.plan.equals(Plan.rest(engine.shape, 27))
    assert sequence.token_ids == IDS[:27]
    counted(engine, sequence, np.ones(27, np.bool_))


def counted(engine: GpuEngine, sequence: GpuSequence, heads: np.ndarray) -> None:
    """What the device counted is what the ledger says of the Plan, token by token."""
    prices = price_tokens(sequence.plan, engine.shape, sequence.overhead, with_logits=heads)
    for name, values in prices.items():
        np.testing.assert_array_equal(sequence.token_costs[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("name", "summary"),
    [*((name, "mean") for name in FIELDS), ("kv_blocks", "bounds"), ("all", "bounds")],
)
def test_one_plan(engine: GpuEngine, cpu: Engine, prefix: GpuSequence, name: str, summary: str):
    if name in ("kv_blocks", "all"):
        prefix = engine.start(Replay(Plan.rest(engine.shape, PREFIX), equipment(engine, summary)))
        engine.forward([(prefix, IDS[:PREFIX])], "none")
    plan = mixed_plan(engine, 5, FIELDS[name])
    method = Replay(plan, equipment(engine, summary))
    sequence = fork(engine, prefix, method)
    logits = steps(engine, sequence)
    close(logits, expected(cpu, method)[0])
    assert sequence.plan.equals(plan)
    for field, values in price_tokens(plan, engine.shape, sequence.overhead).items():
        got = sequence.token_costs[field][PREFIX:]
        np.testing.assert_array_equal(got, values[PREFIX:], err_msg=field)
    assert (logits - expected(cpu, Dense())[0]).abs().mean() > 0.01


def equipment(engine: GpuEngine, summary: str = "mean") -> Any:
    key = (engine.shape, summary)
    if key not in _EQUIPMENT:
        _EQUIPMENT[key] = tiny_modulator(engine.shape, summary=summary, dtype=torch.float32)
    return _EQUIPMENT[key].equipment


_EQUIPMENT: dict[Any, Any] = {}


def test_a_modulator_decides_the_same(engine: GpuEngine, cpu: Engine):
    """Prefill and decode: levels, Plan, cost and logits, all decided on the device."""
    modulator = tiny_modulator(engine.shape, bypass_below=0.3, dtype=torch.float32)
    method = ModulatorMethod(modulator, 0.5)
    ids = IDS[:39]
    sequence, other = engine.start(method), cpu.start(method)
    out = [engine.forward([(sequence, ids[:36])], "all")[0]]
    out += [engine.forward([(sequence, [token])])[0] for token in ids[36:]]
    reference = [cpu.forward([(other, ids[:36])], "all")[0]]
    reference += [cpu.forward([(other, [token])])[0] for token in ids[36:]]
    close(torch.cat(out).cpu(), torch.cat(reference))
    assert sequence.plan.equals(other.plan)
    assert np.abs(sequence.levels - other.levels).max() < 2.1e-6
    assert (sequence.plan.ffn < 2).any()
    assert (sequence.plan.attention == 0).any()
    counted(engine, sequence, np.ones(39, np.bool_))


def test_a_batch_of_different_plans(engine: GpuEngine, cpu: Engine, prefix: GpuSequence):
    """Rest, a saved Plan and a modulator in one step give what each gives alone."""
    gear = equipment(engine)
    modulator = _EQUIPMENT[engine.shape, "mean"]
    methods: list[Method] = [
        Dense(),
        Replay(mixed_plan(engine, 6, FIELDS["all"]), gear),
        ModulatorMethod(modulator, 0.5),
    ]
    sequences = [fork(engine, prefix, method) for method in methods]
    tokens = IDS[PREFIX:]
    together = [engine.forward([(s, [t]) for s in sequences]) for t in tokens]
    for i, method in enumerate(methods):
        alone = fork(engine, prefix, method)
        close(torch.cat([out[i] for out in together]).cpu(), steps(engine, alone))
        assert sequences[i].plan.equals(alone.plan)
        for name, values in alone.token_costs.items():
            np.testing.assert_array_equal(sequences[i].token_costs[name], values, err_msg=name)
    close(torch.cat([out[0] for out in together]).cpu(), expected(cpu, Dense())[0])


def test_poison(llama: Any, device: torch.device):
    """A skipped FFN, skipped queries and unread pages hold NaN, and none is read in decoding."""
    engine = GpuEngine.from_model(llama, weight_format="fp32", device=device, max_tokens=256)
    rest = Plan.rest(engine.shape, 42)
    plan = replace(rest, ffn=rest.ffn.copy(), attention=rest.attention.copy())
    plan.ffn[40:, 0], plan.attention[40:, 1] = 0, 0
    sequence = engine.start(Replay(plan))
    engine.forward([(sequence, IDS[:40])], "none")
    clean = engine.forward([(sequence, [1])])[0].clone()
    first, second = engine.weights.layers
    engine.flush()
    first.ffn_in.data.fill_(torch.nan)
    first.ffn_out.data.fill_(torch.nan)
    second.attention_in.data[:, 2 * engine.shape.kv_width :] = torch.nan
    second.attention_out.data.fill_(torch.nan)
    free = [p for p in range(engine.pool.n_pages) if p not in sequence.pages]
    engine.pool.keys[:, free], engine.pool.values[:, free] = torch.nan, torch.nan
    engine.pool.keys[1], engine.pool.values[1] = torch.nan, torch.nan  # nothing attends there
    logits = engine.forward([(sequence, [1])])[0]
    assert clean.isfinite().all()
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_formats(llama: Any, device: torch.device, name: str):
    """Decode with packed weights is decode with what they stand for."""
    packed = GpuEngine.from_model(llama, weight_format=name, device=device, max_tokens=64)
    plain = GpuEngine.from_model(llama, weight_format="fp32", device=device, max_tokens=64)
    for w, v in zip(packed.weights.layers, plain.weights.layers, strict=True):
        for site in ("attention_in", "attention_out", "ffn_in", "ffn_out"):
            getattr(v, site).data.copy_(getattr(w, site).dense(torch.float32))
    plain.weights.head.data.copy_(packed.weights.head.dense(torch.float32))
    plain.weights.embedding.copy_(packed.weights.embedding)
    plan = random_plan(packed.shape, 3, np.random.default_rng(1))
    method = Replay(replace(plan, bits=np.full_like(plan.bits, FULL_BITS)))
    outs = []
    for engine in (packed, plain):
        sequences = [engine.start(method), engine.start(method)]
        engine.forward([(sequences[0], [5])])
        engine.forward([(sequences[1], [5])])
        outs.append(torch.cat(engine.forward([(s, [7]) for s in sequences])))
        counted(engine, sequences[0], np.ones(2, np.bool_))
    close(*outs, 0.15)  # keys and values are bfloat16; logits are of order 10


def test_generate_stops_and_goes_on(engine: GpuEngine, cpu: Engine):
    """Tokens drawn ahead on the device are undone after a stop; without it they are the CPU's."""
    tokens, sequence = engine.generate(IDS[:5], max_new_tokens=6)
    assert tokens == cpu.generate(IDS[:5], max_new_tokens=6)[0]
    assert sequence.length == 5 + 5
    assert sequence.token_ids == IDS[:5] + tokens[:-1]
    assert sequence.plan.equals(Plan.rest(engine.shape, 10))
    stop = frozenset([next(t for t in tokens[1:] if t != tokens[0])])
    cut = tokens[: tokens.index(next(iter(stop)))]
    again, stopped = engine.generate(IDS[:5], max_new_tokens=6, stop=stop)
    assert again == cut
    assert stopped.token_ids == IDS[:5] + cut
    logits = engine.forward([(stopped, [tokens[len(cut)]])])[0]
    assert int(logits.argmax()) == tokens[len(cut) + 1]


def test_predictors_that_decide_on_the_cpu(engine: GpuEngine, cpu: Engine):
    modulator = tiny_modulator(engine.shape, "recurrent", dtype=torch.float32)
    control = modulator.with_levels(CONTROLS["constant"](modulator.predictor.config, 0.7))
    for method in (ModulatorMethod(modulator, 0.5), ModulatorMethod(control, 0.5)):
        sequence, other = engine.start(method), cpu.start(method)
        out = [engine.forward([(sequence, part)])[0] for part in (IDS[:4], IDS[4:5])]
        reference = [cpu.forward([(other, part)])[0] for part in (IDS[:4], IDS[4:5])]
        close(torch.cat(out).cpu(), torch.cat(reference))
        assert sequence.plan.equals(other.plan)


def test_pages_come_back(engine: GpuEngine):
    free = engine.pool.free_pages
    sequence = engine.start()
    engine.forward([(sequence, [1, 2])])
    assert engine.pool.free_pages == free - 1
    sequence.close()
    assert engine.pool.free_pages == free


def test_refusals(engine: GpuEngine, llama: Any, device: torch.device):
    plan = Plan.rest(engine.shape, 2)
    low = Replay(replace(plan, bits=np.full_like(plan.bits, 4)))
    with pytest.raises(VesicleError, match="asks for 4 weight bits"):
        engine.start(low)
    forgetful = Retention([[[]] * 2] * 2, 16)
    with pytest.raises(VesicleError, match="the GPU engine forgets no entries"):
        engine.start(forgetful)
    with pytest.raises(VesicleError, match="the GPU engine forgets no entries"):
        engine.start(
            Replay(replace(Plan.rest(engine.shape, 16), retained=forgetful.retained(engine.shape)))
        )
    sequence = engine.start(Replay(plan))
    with pytest.raises(VesicleError, match="3 tokens exceed this sequence's limit of 2"):
        engine.forward([(sequence, [1, 2, 3])])
    with pytest.raises(VesicleError, match="token id 97 is out of range; allowed: 0 to 96"):
        engine.forward([(sequence, [97])])
    with pytest.raises(VesicleError, match="a budget applies to a modulator"):
        engine.start(Dense(), 0.5)
    twice = engine.start()
    with pytest.raises(VesicleError, match="twice"):
        engine.forward([(twice, [1]), (twice, [1])])
    others = [tiny_modulator(engine.shape, dtype=torch.float32) for _ in range(2)]
    both = [(engine.start(ModulatorMethod(m, 0.5)), [1]) for m in others]
    with pytest.raises(VesicleError, match="2 different FFN stand-ins; allowed: 1"):
        engine.forward(both)
    small = GpuEngine.from_model(llama, weight_format="fp32", device=device, max_tokens=32)
    small.forward([(small.start(), [1, 2])])
    kept = small.start()
    small.forward([(kept, [1] * 17)], "none")
    with pytest.raises(VesicleError, match="the cache has 0 positions left of 32"):
        small.forward([(small.start(), [1] * 3)])
    with pytest.raises(VesicleError, match="weights are 'fp8'; allowed: fp32, bf16, int8, int4"):
        GpuEngine.from_model(llama, weight_format="fp8", device=device)
    gelu = tiny_llama(hidden_act="gelu")
    with pytest.raises(VesicleError, match="this model has the activation 'gelu'"):
        GpuEngine.from_model(gelu, device=device)
