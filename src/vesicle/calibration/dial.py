"""Which position of the dial executes which share of the dense FLOPs, measured on text.

The share is what the ledger prices under the hard reference, predictor and stand-ins included: of
all tokens, or of those that follow the first half of each window, which is a prompt at rest.
Starting from a coarse grid, positions are added between neighbours whose shares lie further apart
than `gap`, so that a budget looked up between two measured ones misses by less than that.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.calibration.cache import keep, measurement_key, recall
from vesicle.cost import price_tokens
from vesicle.modulator import Dial, Modulator, ModulatorMethod
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import Plan
from vesicle.reference.attach import attach

_COARSE = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)
_CLOSEST = 1e-3
"""Least distance between dial positions: a share that jumps cannot be refined for ever."""


def executed_share(
    model: nn.Module, method: ModulatorMethod, windows: Tensor, prompt_tokens: int = 0
) -> float:
    """Executed over dense FLOPs of a method on windows (N, T), under the hard reference.

    Of the tokens from the last one of the prompt on, whose next token is asked for.
    """
    device = next(model.parameters()).device
    first = max(0, prompt_tokens - 1)
    executed, dense = 0, 0
    with torch.no_grad():
        for window in windows:
            with attach(model, method, prompt_tokens=prompt_tokens) as run:
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
            overhead = method.overhead(run.shape)
            tokens = price_tokens(run.plan, run.shape, overhead, released=run.released[0])
            rest = price_tokens(Plan.rest(run.shape, len(window)), run.shape)
            executed += _flops(tokens, first)
            dense += _flops(rest, first)
    return executed / dense


def _flops(tokens: dict[str, NDArray[np.int64]], first: int) -> int:
    return sum(int(v[first:].sum()) for name, v in tokens.items() if name.startswith("flops_"))


def measure_dial(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    gap: float = 0.03,
    lowest: float = 0.1,
    phases: Phases = EVERYWHERE,
    cache: Path | None = None,
) -> Dial:
    """Measure the table that maps a budget to a position of the dial.

    Args:
        model: A Hugging Face causal LM.
        modulator: Trained.
        windows: (N, T) token ids of calibration text.
        gap: Shares of neighbouring rows lie no further apart than this, where the dial allows.
        lowest: Least dial position measured.
        phases: On which tokens transmitters act. Unless that is all of them, the first half of each
            window is a prompt, and shares are those of the other half.
        cache: Folder that keeps the result.

    Returns:
        (budget, dial) pairs, both rising, ending at (1, 1): the value for `ModulatorInfo.dial`.

    Raises:
        ValueError: If `gap` or `lowest` is out of range.
    """
    if not 0 < gap < 1:
        raise ValueError(f"gap is {gap}; allowed: between 0 and 1")
    if not 0 < lowest < 1:
        raise ValueError(f"lowest is {lowest}; allowed: between 0 and 1")
    key = measurement_key(
        model,
        windows,
        modulator.state_dict().values(),
        {
            "gap": gap,
            "lowest": lowest,
            "effectors": {n: e.to_dict() for n, e in modulator.effectors.items()},
            "phases": phases.to_dict(),
        },
    )
    everywhere = phases.ignores_phase(modulator.predictor.config.transmitters)
    prompt_tokens = 0 if everywhere else windows.shape[1] // 2
    name = "dial.json" if everywhere else "dial_generated.json"
    path = cache / name if cache else None
    kept = recall(path, key)
    if kept is not None:
        return [(float(b), float(d)) for b, d in kept]

    def share(dial: float) -> float:
        method = ModulatorMethod(modulator, dial, phases)
        return executed_share(model, method, windows, prompt_tokens)

    shares = {dial: share(dial) for dial in (lowest, *(d for d in _COARSE if d > lowest))}
    shares[1.0] = 1.0
    while True:
        dials = sorted(shares)
        wide = [
            (a + b) / 2
            for a, b in pairwise(dials)
            if abs(shares[b] - shares[a]) > gap and b - a > _CLOSEST
        ]
        if not wide:
            break
        for dial in wide:
            shares[dial] = share(dial)
    table = rising(shares)
    keep(path, key, table)
    return table


def rising(shares: dict[float, float]) -> list[tuple[float, float]]:
    """Rows (share, dial) from dial 1 downwards, without those that do not lower the share."""
    table: list[tuple[float, float]] = []
    for dial in sorted(shares, reverse=True):
        if not table or shares[dial] < table[-1][0] - 1e-9:
            table.append((shares[dial], dial))
    return table[::-1]
