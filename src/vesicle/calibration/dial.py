"""Which position of the dial executes which share of the dense FLOPs, measured on text.

The share is what the ledger prices under the hard reference, predictor and stand-ins included.
Starting from a coarse grid, positions are added between neighbours whose shares lie further apart
than `gap`, so that a budget looked up between two measured ones misses by less than that.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from vesicle.calibration.cache import keep, measurement_key, recall
from vesicle.cost import price_dense
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.reference.attach import attach

_COARSE = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)
_CLOSEST = 1e-3
"""Least distance between dial positions: a share that jumps cannot be refined for ever."""


def executed_share(model: nn.Module, method: ModulatorMethod, windows: Tensor) -> float:
    """Executed over dense FLOPs of a method on windows (N, T), under the hard reference."""
    device = next(model.parameters()).device
    executed, dense = 0, 0
    with torch.no_grad():
        for window in windows:
            with attach(model, method) as run:
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
            executed += run.cost.flops_total
            dense += price_dense(run.shape, len(window)).flops_total
    return executed / dense


def measure_dial(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    gap: float = 0.03,
    lowest: float = 0.1,
    cache: Path | None = None,
) -> list[tuple[float, float]]:
    """Measure the table that maps a budget to a position of the dial.

    Args:
        model: A Hugging Face causal LM.
        modulator: Trained.
        windows: (N, T) token ids of calibration text.
        gap: Shares of neighbouring rows lie no further apart than this, where the dial allows.
        lowest: Least dial position measured.
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
        },
    )
    path = cache / "dial.json" if cache else None
    kept = recall(path, key)
    if kept is not None:
        return [(float(b), float(d)) for b, d in kept]
    shares = {
        dial: executed_share(model, ModulatorMethod(modulator, dial), windows)
        for dial in (lowest, *(d for d in _COARSE if d > lowest))
    }
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
            shares[dial] = executed_share(model, ModulatorMethod(modulator, dial), windows)
    table = _rising(shares)
    keep(path, key, table)
    return table


def _rising(shares: dict[float, float]) -> list[tuple[float, float]]:
    """Rows (share, dial) from dial 1 downwards, without those that do not lower the share."""
    table: list[tuple[float, float]] = []
    for dial in sorted(shares, reverse=True):
        if not table or shares[dial] < table[-1][0] - 1e-9:
            table.append((shares[dial], dial))
    return table[::-1]
