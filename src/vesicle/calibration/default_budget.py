"""The budget that is used when none is given: the lowest one that costs hardly any loss.

Loss is measured on text under the hard reference, budget by budget from the top, until it exceeds
the dense model's by more than the tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vesicle.modulator import Modulator
from vesicle.phases import EVERYWHERE, Phases
from vesicle.plan import Dense, Method
from vesicle.reference.attach import attach

TOLERANCE = 0.01
"""Relative rise in loss that counts as hardly any."""
_STEP = 0.02
_LOWEST = 0.5


def mean_loss(model: nn.Module, method: Method, windows: Tensor, prompt_tokens: int = 0) -> float:
    """Loss of windows (N, T) in nats per predicted token, under the hard reference.

    Of the tokens that follow the prompt; of all but the first without one.
    """
    device = next(model.parameters()).device
    first = max(1, prompt_tokens)
    total = 0.0
    with torch.no_grad():
        for window in windows.to(device):
            with attach(model, method, prompt_tokens=prompt_tokens):
                logits = model(window[None], use_cache=False).logits
            scored = logits[0, first - 1 : -1].float()
            total += nn.functional.cross_entropy(scored, window[first:]).item()
    return total / len(windows)


def measure_default_budget(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor,
    *,
    tolerance: float = TOLERANCE,
    phases: Phases = EVERYWHERE,
) -> tuple[float, dict[str, float]]:
    """Find the default budget.

    Args:
        model: A Hugging Face causal LM.
        modulator: Trained, with its dial measured.
        windows: (N, T) token ids of text that it was not trained on.
        tolerance: Relative rise in loss allowed.
        phases: On which tokens transmitters act. Unless that is all of them, the first half of each
            window is a prompt, and losses are those of the other half.

    Returns:
        The lowest budget, in steps of 0.02, before the first that exceeds the tolerance; and the
        losses measured, in nats per token, by budget ("1.00" is the dense model).

    Raises:
        ValueError: If `tolerance` is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; allowed: above 0")
    everywhere = phases.ignores_phase(modulator.predictor.config.transmitters)
    n = 0 if everywhere else windows.shape[1] // 2
    dense = mean_loss(model, Dense(), windows, n)
    losses, best = {"1.00": dense}, 1.0
    budget = round(1.0 - _STEP, 2)
    while budget >= _LOWEST:
        losses[f"{budget:.2f}"] = loss = mean_loss(model, modulator.at(budget, phases), windows, n)
        if loss > dense * (1 + tolerance):
            break
        best, budget = budget, round(budget - _STEP, 2)
    return best, losses
