"""Dial and default budget where GABA alone acts, measured in long texts.

What attention can leave out grows with the context: in a window of 512 tokens it is next to
nothing. So windows are thousands of tokens long, the first half of each is a prompt, which GABA
governs as well, and shares and losses are those of the other half. The engine measures them: it
counts what it executes, takes the loss in the same pass, and reads such a window in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vesicle.calibration.cache import keep, measurement_key, recall
from vesicle.calibration.default_budget import TOLERANCE
from vesicle.calibration.dial import rising
from vesicle.cost import price_dense_span
from vesicle.engine import Engine
from vesicle.modulator import Measured, Modulator, ModulatorMethod
from vesicle.phases import GABA_ALONE
from vesicle.plan import Dense, Method

DIALS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_SCORED = 256
"""Positions whose logits exist at once."""


def measure_long(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    tolerance: float = TOLERANCE,
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Measured, dict[str, float]]:
    """Measure what positions of the dial execute and lose where GABA alone acts.

    Args:
        model: A Hugging Face causal LM.
        modulator: Trained, GABA among its transmitters.
        windows: (N, T) token ids of text that it was not trained on, T in the thousands.
        tolerance: Relative rise in loss that the default budget may cost.
        cache: Folder that keeps the result.
        tell: Takes a line about each position that was measured.

    Returns:
        The table, and as default budget the least share, from the top, whose loss is within the
        tolerance; and the losses in nats per token, by share ("1.000" is the dense model).
    """
    parts = [*modulator.state_dict().values()]
    settings = {
        "tolerance": tolerance,
        "dials": DIALS,
        "effectors": {n: e.to_dict() for n, e in modulator.effectors.items()},
    }
    path = cache / "dial_long.json" if cache else None
    key = measurement_key(model, windows, parts, settings)
    kept = recall(path, key)
    if kept is None:
        kept = _measure(Engine.from_model(model), modulator, windows, tolerance, tell)
        keep(path, key, kept)
    dial, default, losses = kept
    table = [(float(budget), float(position)) for budget, position in dial]
    return Measured(dial=table, default_budget=default), losses


def _measure(
    engine: Engine,
    modulator: Modulator,
    windows: Tensor,
    tolerance: float,
    tell: Callable[[str], None],
) -> tuple[list[tuple[float, float]], float, dict[str, float]]:
    _, dense = _executed(engine, Dense(), windows)
    tell(f"at rest {dense:.4f} nats a token")
    shares, losses, default = {1.0: 1.0}, {"1.000": dense}, 1.0
    within = True
    for dial in DIALS:
        share, loss = _executed(engine, ModulatorMethod(modulator, dial, GABA_ALONE), windows)
        shares[dial], losses[f"{share:.3f}"] = share, loss
        within = within and loss <= dense * (1 + tolerance)
        default = round(share, 3) if within else default
        tell(f"dial {dial:g}: {share:.3f} of the FLOPs, {loss:.4f} nats a token")
    return rising(shares), default, losses


def _executed(engine: Engine, method: Method, windows: Tensor) -> tuple[float, float]:
    """Executed share of the dense FLOPs, and loss in nats a token, of the second halves."""
    length = windows.shape[1]
    first = length // 2 - 1  # the prompt's last token: what follows it is asked for
    flops, nats = 0, 0.0
    for ids in windows.tolist():
        sequence = engine.start(method)
        sequence.begin_prompt(first + 1)
        engine.forward([(sequence, ids[:first])], "none")
        for start in range(first, length, _SCORED):
            rows = engine.forward([(sequence, ids[start : start + _SCORED])], "all")[0].float()
            labels = torch.tensor(ids[start + 1 : start + 1 + _SCORED], dtype=torch.int64)
            nats += float(nn.functional.cross_entropy(rows[: len(labels)], labels, reduction="sum"))
        flops += sequence.cost_of(slice(first, None)).flops_total
        sequence.close()
    dense = price_dense_span(engine.shape, first, length, first).flops_total * len(windows)
    return flops / dense, nats / (len(windows) * (length - 1 - first))
