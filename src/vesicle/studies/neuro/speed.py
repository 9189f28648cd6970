"""Time: the engine at rest and below it, side by side; jobs of the study that want an idle machine.

*Trained* decoders are the study's own, with what they learnt. *Shapes* have random weights and
uniform levels: they tell how time goes with size, and nothing of quality.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vesicle.bench.machine import hardware
from vesicle.engine import Engine
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.scratch import DecoderSize, new_decoder
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.scale import SCALES
from vesicle.studies.neuro.tables import WHOLE
from vesicle.studies.neuro.variants import variants

if TYPE_CHECKING:
    from vesicle.plan import Method

_DIALS = (1.0, 0.8, 0.6, 0.4)
_TURNS = 3
_PROMPT = 64
_VOCABULARY = 8192


def time_trained(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Decoding by the trained whole, at several dials; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject = run.trained(variants()[WHOLE])
    ids = next(run.judged("test"))[1][0, :_PROMPT].tolist()
    engine = Engine.from_model(subject.model, weights="fp32")
    methods = {dial: subject.method(dial) for dial in _DIALS}
    return {"machine": hardware(), "rows": _timed(engine, ids, methods, run.size.timed_tokens)}


def time_shape(out: Path, *, scale: str, shape: str) -> dict[str, Any]:
    """Decoding by a decoder with random weights in 4 bits, at uniform levels; a job."""
    width, n_layers, n_heads, n_kv, ffn = SCALES[scale].timed[shape]
    size = DecoderSize(
        vocabulary=_VOCABULARY,
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv,
        ffn=ffn,
        context=512,
    )
    model = new_decoder(size, 0).eval()
    parameters = sum(p.numel() for p in model.parameters())
    engine = Engine.from_model(model, weights="int4")
    del model
    modulator = Modulator.new(engine.shape, transmitters=("dopamine", "gaba"))
    methods: dict[float, Method] = {dial: ModulatorMethod(modulator, dial) for dial in _DIALS}
    ids = torch.randint(0, _VOCABULARY, (_PROMPT,), generator=torch.Generator().manual_seed(0))
    rows = _timed(engine, ids.tolist(), methods, SCALES[scale].timed_tokens)
    return {"machine": hardware(), "parameters": parameters, "rows": rows}


def _timed(
    engine: Engine, ids: list[int], methods: dict[float, Method], n_tokens: int
) -> list[dict[str, Any]]:
    """Medians of alternating turns over `n_tokens` decoded tokens, and what was executed."""
    found: dict[float, list[dict[str, float]]] = {dial: [] for dial in methods}
    for turn in range(_TURNS + 1):
        for dial, method in methods.items():
            one = _decoded(engine, ids, method, n_tokens)
            if turn:  # the first one warms up
                found[dial].append(one)
    rows = []
    for dial, own in found.items():
        middle = {key: statistics.median(one[key] for one in own) for key in own[0]}
        over = [one["step_ms"] / rest["step_ms"] for one, rest in zip(own, found[1.0], strict=True)]
        middle["of_rest"] = statistics.median(over)
        rows.append({"dial": dial, **{key: round(value, 4) for key, value in middle.items()}})
    return rows


def _decoded(engine: Engine, ids: list[int], method: Method, n_tokens: int) -> dict[str, float]:
    sequence = engine.start(method)
    try:
        engine.forward([(sequence, ids)], "none")
        before, dense_before = sequence.cost, sequence.dense_cost
        steps = []
        for i in range(n_tokens):
            started = time.perf_counter()
            engine.forward([(sequence, [ids[i % len(ids)]])])
            steps.append(1000 * (time.perf_counter() - started))
        after, dense_after = sequence.cost, sequence.dense_cost
    finally:
        sequence.close()
    return {
        "step_ms": statistics.median(steps),
        **{
            key: (getattr(after, key) - getattr(before, key))
            / (getattr(dense_after, key) - getattr(dense_before, key))
            for key in ("flops_total", "bytes_read")
        },
    }
