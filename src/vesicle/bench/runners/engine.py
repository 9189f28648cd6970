"""This engine, at rest or under a method."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vesicle.bench.contenders import BUDGET, OVERHEAD, REST, Contender
from vesicle.bench.runners.base import Runner
from vesicle.cost import price_dense
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.engine import CHUNK
from vesicle.engine.packed import PackedHead
from vesicle.errors import VesicleError
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import Phases
from vesicle.plan import Dense, Method, Plan
from vesicle.predictors import Predictor
from vesicle.processors import maker
from vesicle.shapes import ModelShape

_MIDDLE = 0.5
"""A dial whose own part in the deficit is zero, so that the predictor's offset alone decides."""

_NEVER = -200.0
"""An offset at which a deficit rounds to exactly 0, whatever the hidden state."""


class EngineRunner(Runner):
    """An `Engine` and as many sequences as the batch has."""

    def __init__(self, contender: Contender) -> None:
        """Set the number of torch's threads; `load` reads the weights."""
        self._contender = contender
        self._sequences: list[Sequence] = []
        self._read = 0, 0  # of the head's screening, when the steps began
        self._stepping = False  # whether the last pass was a step
        torch.set_num_threads(contender.threads)

    def load(self) -> dict[str, Any]:
        """Read the weights and make the contender's method.

        Returns:
            Facts about the method, and `weight_bytes`: those that a dense step of one token reads.
        """
        c = self._contender
        self._engine = Engine.from_pretrained(
            c.model, weights=c.weights, kv=c.kv, threads=c.threads
        )
        self._method, facts = _method(c, self._engine.shape)
        self._engine.start(self._method)  # refuses what does not fit
        native = self._engine._native
        self._clock = None if native is None else native.clock()
        dense = price_dense(self._engine.shape, 1)
        return {**facts, "weight_bytes": dense.weight_bytes}

    def begin(self, batch: int, length: int) -> None:
        """Close the sequences of the turn before, and start `batch` empty ones.

        Their caches grow as they are filled, so `length` is not needed.
        """
        for sequence in self._sequences:
            sequence.close()
        self._sequences = [self._engine.start(self._method) for _ in range(batch)]

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """In passes of the engine's own size, of as many sequences as fit."""
        self._stepping = False
        length = len(prompts[0])
        side_by_side = max(1, CHUNK // length)
        found: list[int] = []
        for first in range(0, len(prompts), side_by_side):
            group = slice(first, first + side_by_side)
            rows = list(zip(self._sequences[group], prompts[group], strict=True))
            for sequence, row in rows:
                sequence.begin_prompt(len(row))
            for start in range(0, length, CHUNK):
                part = [(sequence, row[start : start + CHUNK]) for sequence, row in rows]
                if start + CHUNK < length:
                    self._engine.forward(part, "none")
            found += self._engine.likeliest(part)
        return found

    def step(self, tokens: list[int]) -> list[int]:
        """One pass over all sequences."""
        native = self._engine._native
        if native is not None and self._clock is not None and not self._stepping:
            self._clock[:] = 0
            self._read = native.screening.read
        self._stepping = True
        batch = [
            (sequence, [token]) for sequence, token in zip(self._sequences, tokens, strict=True)
        ]
        return self._engine.likeliest(batch)

    def work(self, steps: int) -> dict[str, Any]:
        """From the ledger.

        A step reads the weights once for all sequences, at least those of the sequence that reads
        most, and each sequence's own cache.
        """
        costs = [sequence.token_costs for sequence in self._sequences]
        weights = np.stack([cost["weight_bytes"][-steps:] for cost in costs])  # (B, steps)
        kv = np.stack([cost["kv_bytes_read"][-steps:] for cost in costs])
        flops = sum(
            int(values[-steps:].sum())
            for cost in costs
            for name, values in cost.items()
            if name.startswith("flops_")
        )
        sequence = self._sequences[0]
        dense = price_dense(
            self._engine.shape, steps, first_position=sequence.length - steps
        ).flops_total * len(costs)
        if self._contender.mode == OVERHEAD and not sequence.plan.equals(
            Plan.rest(self._engine.shape, sequence.length)
        ):
            raise VesicleError("the modulator left something out where all levels should be 1")
        return {
            "step_bytes": float((weights.max(0) + kv.sum(0)).mean()),
            "executed_share": flops / dense,
            "phases": self._phases(steps, float(kv.sum(0).mean())),
        }

    def _phases(self, steps: int, kv_bytes: float) -> dict[str, dict[str, float]] | None:
        """Of a mean step, by phase: seconds, and the bytes that a dense one reads there."""
        if self._clock is None:
            return None
        weights = self._engine._weights
        parts = [
            sum(getattr(layer, name).bytes_held for layer in weights.layers)
            for name in ("attention_in", "attention_out", "ffn_in", "ffn_out")
        ]
        n_bytes = [parts[0], kv_bytes, *parts[1:], self._head_bytes()]
        return {
            name: {"s": float(spent) / steps, "bytes": float(size)}
            for name, spent, size in zip(core.PHASES, self._clock, n_bytes, strict=True)
        }

    def _head_bytes(self) -> float:
        """Of a screened head: the leading plane, what bounds it, and the rows read whole."""
        native, head = self._engine._native, self._engine._weights.head
        if not isinstance(head, PackedHead):
            return head.nbytes
        screen = None if native is None else native.screening.screen
        if native is None or screen is None:
            return head.bytes_held
        rows, tokens = (a - b for a, b in zip(native.screening.read, self._read, strict=True))
        whole = rows / max(tokens, 1) / head.n_out
        screened = head.high.nbytes + whole * head.bytes_held + screen.bytes_held
        return head.bytes_held if whole >= 1 else min(screened, head.bytes_held)


def _method(contender: Contender, shape: ModelShape) -> tuple[Method, dict[str, Any]]:
    """The method of a contender's mode, and facts about it."""
    if contender.mode == REST:
        return Dense(), {}
    if contender.share is not None:
        return _constant_gaba(shape, contender.share), {"share": contender.share}
    if contender.modulator is None:
        raise VesicleError(f"contender {contender.name} has no modulator")
    modulator = Modulator.from_pretrained(contender.modulator)
    if contender.mode == BUDGET:
        saving = contender.goal == "time"
        phases = Phases.saving_time(core.instructions(), maker()) if saving else Phases()
        budget = modulator.default_budget(phases) if contender.budget is None else contender.budget
        facts = {"budget": budget, "phases": phases.to_dict()}
        line = modulator.below_reach(budget, phases)
        return modulator.at(budget, phases), {**facts, **({"note": line} if line else {})}
    return _levels_of_one(modulator), {}


def _levels_of_one(modulator: Modulator) -> Method:
    """The modulator computing all its levels, all of which come out as 1.

    At budget 1 it would compute nothing: rest holds by construction there.
    """
    if not isinstance(modulator.predictor, Predictor):
        raise VesicleError("--overhead needs a trained modulator, not a control")
    with torch.no_grad():
        modulator.predictor.offset.fill_(_NEVER)
    return ModulatorMethod(modulator, _MIDDLE)


def _constant_gaba(shape: ModelShape, share: float) -> Method:
    """Every query reads this share of its KV blocks, and everything else rests.

    A linear predictor whose read-outs are zero releases the level, so that the engine takes the
    path that it takes for any modulator.
    """
    modulator = Modulator.new(shape, transmitters=("gaba",))
    predictor = modulator.predictor
    assert isinstance(predictor, Predictor)
    with torch.no_grad():
        predictor.offset.fill_(float(np.log((1 - share) / share)))
    return ModulatorMethod(modulator, _MIDDLE)
