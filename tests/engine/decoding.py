"""Engines that decode natively, engines beside them that do not, and methods that skip all kinds.

Shared by the tests of the native decoder and of the LM head.
"""

from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import random_plan, randomise
from vesicle.effectors import DopaminePrecision, GabaSparsity
from vesicle.engine import Engine, Sequence
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import Dense, Method, Replay
from vesicle.shapes import ModelShape

LADDER = ((0.8, 16), (0.65, 8), (0.5, 4), (0.35, 3), (0.0, 2))
VOCABULARY = 97
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 160).tolist()


def tiny(family: str = "llama") -> Any:
    """Sizes that are no whole tiles; every number is one that bfloat16 has."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
    }
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "biases": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qk-norm": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32)),
        "windows": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=43)),
        "gemma": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **sizes,
                head_dim=32,
                query_pre_attn_scalar=30,
                sliding_window=40,
                layer_types=["sliding_attention", "full_attention"] * 2,
                final_logit_softcapping=30.0,
            )
        ),
    }[family]()
    randomise(model, 0)
    return model.bfloat16().float().eval()


def native(weights: str, kv: str = "fp32", family: str = "llama") -> Engine:
    engine = Engine.from_model(tiny(family), weights=weights, kv=kv)
    assert engine._native is not None
    return engine


def beside(engine: Engine, weights: str, family: str = "llama") -> Engine:
    """An engine on the same pages that takes its general path.

    The decoder computes in fp32 with bf16 weights, the general path in bf16: the same numbers in
    fp32 are what both should come to.
    """
    form = "fp32" if weights == "bf16" else weights
    other = Engine.from_model(tiny(family), weights=form, kv=engine.pool.kv)
    other._native, other.pool = None, engine.pool
    return other


def modulator_for(
    shape: ModelShape, kind: str, summary: str = "bounds", **dopamine: Any
) -> Modulator:
    """Levels of all sizes; modules are skipped only where `kind` is "stand-ins"."""
    ladder = LADDER if kind == "ladder" else ((0.0, 16),)
    modulator = Modulator.new(
        shape,
        effectors={
            "gaba": GabaSparsity(least=2, summary=summary),
            "dopamine": DopaminePrecision(bits_ladder=ladder, **dopamine),
        },
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in modulator.named_parameters():
        if "standin" in name or name.endswith("weight"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (0.1 if "standin" in name else 0.15) * noise
    if kind != "stand-ins":
        modulator.predictor.offset.data[:, 1] = -9.0
    return modulator


def method_for(engine: Engine, kind: str, summary: str = "bounds", seed: int = 3) -> Method:
    modulator = modulator_for(engine.shape, kind, summary)
    if kind == "dense":
        return Dense()
    if kind == "budget 1":
        return modulator.at(1.0)
    if kind == "replay":
        plan = random_plan(engine.shape, len(IDS), np.random.default_rng(seed))
        if engine.shape.stored_bits is None:  # no planes of bits: fewer take the general path
            plan = plan.with_fields(bits=np.full_like(plan.bits, 16))
        return Replay(plan, modulator.stand_ins)
    return ModulatorMethod(modulator, 0.5)


def read(engine: Engine, method: Method, sizes: list[int]) -> tuple[Sequence, torch.Tensor]:
    """A sequence that has read `IDS` in pieces of these sizes, and all logits (T, V)."""
    sequence, at, rows = engine.start(method), 0, []
    for size in sizes:
        rows.append(engine.forward([(sequence, IDS[at : at + size])], "all")[0])
        at += size
    return sequence, torch.cat(rows)
