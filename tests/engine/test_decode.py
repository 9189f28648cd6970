"""The native decoder against the engine's general path: Plans, levels, costs and logits."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vesicle.cost import price
from vesicle.effectors import GabaSparsity
from vesicle.engine import Engine, Sequence
from vesicle.engine.native import library
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import Dense, Method

TOLERANCE = 2e-5
"""fp32, logits of order 3: the same sums in another order, through 4 layers."""
LEVEL_TOLERANCE = 2.1e-6
"""Levels are rounded to six decimals; rounding differences may move the last one."""

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels are not built here")


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
            max_position_embeddings=512,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    native, general = Engine.from_model(model), Engine.from_model(model)
    assert native._decoder is not None
    general._decoder = None
    return native, general


def modulator_for(engine: Engine, summary: str, serotonin: bool) -> Modulator:
    torch.manual_seed(1)
    modulator = Modulator.new(
        engine.shape, effectors={"gaba": GabaSparsity(least=2, summary=summary)}
    )
    for name, parameter in modulator.named_parameters():
        if "standin" in name:
            parameter.data.normal_(0, 0.1)
        elif name.endswith("weight"):
            parameter.data.normal_(0, 0.15)
    if not serotonin:
        modulator.predictor.offset.data[:, 1] = -9.0
    return modulator


def decode(
    engine: Engine, method: Method, ids: list[int], prefill: int
) -> tuple[Sequence, torch.Tensor]:
    sequence, out = engine.start(method), []
    if prefill:
        out.append(engine.forward([(sequence, ids[:prefill])], "all")[0])
    out += [engine.forward([(sequence, [token])])[0] for token in ids[prefill:]]
    return sequence, torch.cat(out)


@pytest.mark.parametrize("prefill", [0, 1, 37, 100])
@pytest.mark.parametrize("summary", ["mean", "bounds"])
@pytest.mark.parametrize("kind", ["plain", "stand-ins", "budget 1", "dense"])
def test_both_paths_agree(engines, kind: str, summary: str, prefill: int):
    native, general = engines
    modulator = modulator_for(native, summary, kind == "stand-ins")
    method: Method = ModulatorMethod(modulator, 0.5)
    if kind == "budget 1":
        method = modulator.at(1.0)
    elif kind == "dense":
        method = Dense()
    ids = np.random.default_rng(0).integers(0, 97, 130).tolist()
    a, logits_a = decode(native, method, ids, prefill)
    b, logits_b = decode(general, method, ids, prefill)
    assert a.plan.equals(b.plan)
    assert a.cost == b.cost
    assert a.cost == price(
        a.plan,
        native.shape,
        method.overhead(native.shape),
    )
    assert a.levels.shape == b.levels.shape
    if a.levels.size:
        assert np.abs(a.levels - b.levels).max() < LEVEL_TOLERANCE
    difference = (logits_a - logits_b).abs()
    assert difference.max() < TOLERANCE, (difference.max(), difference.mean())
    if kind == "stand-ins":
        assert (a.plan.ffn != 2).any()
        assert (a.plan.attention != 1).any()
    if kind == "plain":
        assert (a.plan.kv_blocks < a.plan.kv_blocks.max(1, keepdims=True)).any()
