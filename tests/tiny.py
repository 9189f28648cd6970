"""Tiny random models, modulators and Plans: no downloads, and every effect visible.

Weights are far larger than a fresh initialisation's, norms' gains and every bias are random, so
that a masked channel, a skipped layer or a wrong position moves the logits well beyond tolerance.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from vesicle.effectors import DopaminePrecision, Effector, GabaSparsity, SerotoninDepth
from vesicle.families import find_family
from vesicle.modulator import Modulator
from vesicle.plan import FIELDS, ROW, Plan, numbers
from vesicle.plan.rows import PLACES, bounds
from vesicle.plan.spread import UNIT
from vesicle.predictors import (
    CONTROLS,
    PREDICTORS,
    Levels,
    Predictor,
    PredictorConfig,
    QuadraticPredictor,
)
from vesicle.shapes import ModelShape, Spread

VOCABULARY = 97
TRANSMITTERS = ("dopamine", "serotonin", "gaba")
SHAPE = ModelShape(
    n_layers=3,
    width=48,
    n_heads=4,
    n_kv_heads=2,
    head_size=12,
    ffn_width=80,
    gated=True,
    vocabulary=VOCABULARY,
)
"""The shape of the tiny Llama."""


def _llama_like(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(
        **{
            "num_hidden_layers": 3,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **settings,
        }
    )


def _gpt_neox(*, parallel: bool) -> Any:
    return transformers.GPTNeoXConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=80,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        rotary_pct=0.5,
        use_parallel_residual=parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama_like("LlamaConfig", tie_word_embeddings=True),
    "mistral": lambda: _llama_like("MistralConfig", sliding_window=None, head_dim=16),
    "qwen2": lambda: _llama_like("Qwen2Config"),
    "qwen3": lambda: _llama_like("Qwen3Config", head_dim=16),
    "smollm3": lambda: _llama_like("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "gemma3": lambda: _llama_like(
        "Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=20.0,
        tie_word_embeddings=True,
    ),
    "gpt_neox_parallel": lambda: _gpt_neox(parallel=True),
    "gpt_neox_sequential": lambda: _gpt_neox(parallel=False),
}
"""One config per family and variant; a new one is tested by its line here."""


def randomise(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew: gains around 1, biases around 0, outputs of matrices around 2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)


def tiny_model(
    name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0
) -> Any:
    """A random causal LM of one of `CONFIGS`, in evaluation mode."""
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomise(model, seed)
    return model.to(dtype).eval()


def shape_of(model: Any) -> ModelShape:
    """The shape by which a model's costs are counted."""
    size = next(model.parameters()).element_size()
    shape = find_family(model.config).decoder_config(model.config).shape
    return replace(shape, weight_bytes=size, kv_bytes=size)


def tokens(n: int, *, batch: int = 1, seed: int = 1) -> Tensor:
    """(batch, n) random token ids; 0 is left for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, n), generator=generator)


def perturb(levels: Levels, seed: int = 2) -> None:
    """Move a predictor's parameters off their initial values: levels differ by token and layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in levels.named_parameters():
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 3 else 0.3
            if name in QuadraticPredictor.slow:
                scale *= 0.3  # nothing bounds a square, and levels should not round to 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise).to(parameter.dtype))


def tiny_predictor(
    kind: str,
    *,
    n_layers: int = 3,
    width: int = 48,
    transmitters: tuple[str, ...] = TRANSMITTERS,
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
) -> Predictor:
    """A predictor of one of the registered kinds with random, non-zero parameters."""
    config = PredictorConfig(n_layers=n_layers, width=width, transmitters=transmitters, hidden=6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        predictor = PREDICTORS[kind](config)
    perturb(predictor, seed)
    return predictor.to(dtype)


def tiny_control(kind: str, config: PredictorConfig) -> Levels:
    """A control of one of the registered kinds, around varied levels."""
    n, a = config.n_layers, len(config.transmitters)
    rng = np.random.default_rng(3)
    make: dict[str, Callable[[], Levels]] = {
        "constant": lambda: CONTROLS["constant"](config, rng.uniform(0.5, 0.95, (n, a))),
        "random": lambda: CONTROLS["random"](config, rng.uniform(0.6, 0.9, (n, a)), seed=5),
        "shuffled": lambda: CONTROLS["shuffled"](config, rng.uniform(0.2, 1, (90, n, a)), seed=5),
        "replay": lambda: CONTROLS["replay"](config, rng.uniform(0.2, 1, (90, n, a))),
    }
    return make[kind]()


def tiny_modulator(
    shape: ModelShape,
    kind: str = "linear",
    *,
    transmitters: tuple[str, ...] = TRANSMITTERS,
    ladder: bool = False,
    bypass_below: float = 0.0,
    summary: str = "mean",
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
) -> Modulator:
    """A modulator whose levels spread over about 0.2 to 1 and whose stand-ins are random.

    Args:
        shape: Of the model.
        kind: Of the predictor.
        transmitters: Those released.
        ladder: Whether dopamine also lowers weight bits.
        bypass_below: Serotonin's lowest step.
        summary: How GABA summarises blocks.
        dtype: Of the predictor.
        seed: Of every parameter.
    """
    steps = ((0.8, 16), (0.65, 8), (0.5, 4), (0.35, 3), (0.0, 2))
    effectors: dict[str, Effector] = {
        "dopamine": DopaminePrecision(
            site_rates=(0.6, 0.8, 0.7, 1.2), bits_ladder=steps if ladder else ((0.0, 16),)
        ),
        "serotonin": SerotoninDepth(ffn_below=0.5, attention_below=0.4, bypass_below=bypass_below),
        "gaba": GabaSparsity(summary=summary, least=2),
    }
    modulator = Modulator.new(
        shape,
        model_name="tiny",
        transmitters=transmitters,
        effectors=effectors,
        ffn_rank=5,
        attention_rank=4,
    ).with_levels(
        tiny_predictor(
            kind,
            n_layers=shape.n_layers,
            width=shape.width,
            transmitters=transmitters,
            dtype=dtype,
            seed=seed,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for standin in (modulator.ffn_standin, modulator.attention_standin):
            for parameter in standin.parameters():
                # Representable in bfloat16, the format on disk, so that saving loses nothing.
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.bfloat16())
    return modulator.eval()


DECIDED = tuple(field.name for field in FIELDS if not field.last_layer)
"""Names of the fields that every layer has."""


_MOSTLY = {"ffn": [0.1, 0.2, 0.7], "attention": [0.2, 0.8]}
"""Most modules run, so that what is done can be told from what is not."""


def random_spread(shape: ModelShape, rng: np.random.Generator) -> Spread:
    """How unequally KV heads read, from nothing to four times as much; alike in windowed layers."""
    parts = rng.integers(0, 4 * UNIT, (shape.n_layers, shape.n_kv_heads))
    parts[shape.layer_windows > 0] = UNIT
    return tuple(tuple(row) for row in parts.tolist())


def random_plan(shape: ModelShape, t: int, rng: np.random.Generator) -> Plan:
    """A valid Plan of t tokens that varies every field that decides for a layer."""
    size = (t, shape.n_layers)
    low, high = bounds(shape, np.arange(t, dtype=np.int32))
    rows = np.zeros(size, ROW)
    for field in FIELDS:
        part = slice(PLACES[field.name], PLACES[field.name] + field.width)
        if field.name == "channels":
            found = [rng.integers(w // 2, w + 1, size) for w in shape.site_widths]
            rows[field.name] = np.stack(found, axis=-1)
        elif field.values:
            rows[field.name] = rng.choice(np.array(field.values[::-1]), (*size, field.width))
        elif field.name in _MOSTLY:
            odds = _MOSTLY[field.name]
            rows[field.name] = rng.choice(len(odds), size, p=odds)
        elif not field.last_layer:
            numbers(rows)[..., part] = rng.integers(low[..., part], high[..., part] + 1)
    return Plan(rows=rows)
