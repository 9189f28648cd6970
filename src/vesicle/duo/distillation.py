"""Small FFNs for a pretrained model, each distilled on its own: forward passes of the model alone.

With x the normed input of a layer's FFN, y what that adds to the residual stream, and r the stream
after it, the small FFN of the layer learns

    minimise  Σ_t |small(x_t) - y_t|² / |r_t|²  /  Σ_t |y_t|² / |r_t|²

by Adam, all layers side by side. No gradient passes through the model, which is never changed, and
layers know nothing of each other: what the small FFN of one makes of its input, the next has not
seen in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.activations import hidden_units
from vesicle.duo.ffn_inputs import Seen, watched
from vesicle.engine.small_codes import round_to_codes
from vesicle.errors import DataError, VesicleError
from vesicle.scratch import Recipe, draw, fit
from vesicle.small_modules import SmallFfn, SmallModule


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How small FFNs are distilled.

    Attributes:
        passes: Forward passes of the model, each over new windows as long as there are any.
        windows: Of a pass.
        parts: Optimizer steps on the tokens of a pass, each on another part of them.
        learning_rate: At its highest.
        seed: Of the order of windows and tokens.
        coded: Whether weights are rounded to 4-bit codes at the end, which packed engines read.
    """

    passes: int = 200
    windows: int = 4
    parts: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    coded: bool = True

    def __post_init__(self) -> None:
        """Check.

        Raises:
            VesicleError: Naming the setting and what is allowed.
        """
        for name in ("passes", "windows", "parts"):
            if getattr(self, name) < 1:
                raise VesicleError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        if not 0 < self.learning_rate < float("inf"):
            raise VesicleError(f"learning_rate is {self.learning_rate}; allowed: above 0")

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.passes * self.parts


def distil(
    model: nn.Module,
    windows: Tensor,
    small: SmallFfn,
    how: Distillation,
    folder: Path,
    *,
    facts: dict[str, Any] | None = None,
    show: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train small FFNs in place to do what the model's own do, or go on where a run was cut off.

    Args:
        model: A Hugging Face causal LM.
        windows: (N, T) token ids.
        small: Where to start from, such as `untrained.nested`; rounded at the end, to codes or else
            to bf16, as modulators are saved.
        how: How.
        folder: Of this run alone; checkpoints go there.
        facts: What the run depends on beside `how` (JSON); another run is refused.
        show: Told the optimizer step that is done and its loss.

    Returns:
        The relative squared error of every step, mean over layers.

    Raises:
        DataError: There is not one token beyond the first of a window.
        VesicleError: The folder holds another run or cannot be written, or an error is not finite.
    """
    if windows.numel() == 0 or windows.shape[1] < 2:
        raise DataError(f"small FFNs need windows of 2 tokens or more, not {tuple(windows.shape)}")
    recipe = Recipe(
        steps=how.steps,
        learning_rate=how.learning_rate,
        weight_decay=0.0,
        clip=10.0,
        checkpoint_every=max(1, how.steps // 10),
    )
    whole = {"passes": how.passes, "windows": how.windows, "parts": how.parts, "seed": how.seed}
    small.requires_grad_(True)
    try:
        with watched(model) as read:
            batches = _Batches(windows, how, read)
            losses = fit(
                small,
                lambda step: mean_error(small, batches.at(step)),
                recipe,
                folder,
                facts={**whole, **(facts or {})},
                show=show,
            )
    finally:
        small.requires_grad_(False)
    if how.coded:
        round_to_codes(small)
    else:
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.copy_(parameter.bfloat16())
    return losses


class _Batches:
    """What the FFNs saw, by optimizer step; steps of one forward pass share it."""

    def __init__(
        self, windows: Tensor, how: Distillation, read: Callable[[Tensor], list[Seen]]
    ) -> None:
        self._windows, self._how, self._read = windows, how, read
        self._held: tuple[int, list[Seen]] = (-1, [])

    def at(self, step: int) -> list[Seen]:
        number, part = divmod(step, self._how.parts)
        if self._held[0] != number:
            chosen = draw(len(self._windows), self._how.windows, number, self._how.seed)
            self._held = number, self._read(self._windows[chosen])
        seen = self._held[1]
        rng = np.random.default_rng((self._how.seed, number, 1))
        order = torch.from_numpy(rng.permutation(len(seen[0].x)))
        at = order.tensor_split(self._how.parts)[part]
        return [Seen(x=s.x[at], y=s.y[at], weight=s.weight[at]) for s in seen]


def mean_error(small: SmallFfn, seen: list[Seen]) -> Tensor:
    """Relative squared error, mean over layers, through which gradients flow."""
    total = torch.zeros(())
    # Unbound once: an index for each layer would have autograd add up whole stacks of zeros.
    for s, w_in, w_out in zip(seen, small.ffn_in.unbind(0), small.ffn_out.unbind(0), strict=True):
        hidden = hidden_units(s.x.float() @ w_in, small.activation, small.gated)
        total = total + relative_error(hidden @ w_out, s)
    return total / len(seen)


def relative_error(found: Tensor, seen: Seen) -> Tensor:
    """Squared error of (N, D) over the squared output, weighted; skipping outright would give 1."""
    y = seen.y.float()
    weight = seen.weight.float()
    whole = (weight * y.square()).sum().clamp_min(1e-30)
    return (weight * (found - y).square()).sum() / whole


@torch.no_grad()
def relative_errors(
    model: nn.Module, batches: Tensor, modules: dict[str, SmallModule]
) -> dict[str, list[float]]:
    """Relative squared error of each layer's small modules.

    Args:
        model: A Hugging Face causal LM.
        batches: (N, T) windows of token ids, read one by one.
        modules: By name.

    Returns:
        For each name, L numbers.
    """
    off: dict[str, Tensor] = {}
    whole: Tensor | None = None
    with watched(model) as read:
        for window in batches:
            seen = read(window[None])
            size = torch.stack([(s.weight * s.y.square()).sum() for s in seen])
            whole = size if whole is None else whole + size
            for name, small in modules.items():
                error = torch.stack(
                    [
                        (s.weight * (small.apply_layer(n, s.x) - s.y).square()).sum()
                        for n, s in enumerate(seen)
                    ]
                )
                off[name] = off.get(name, 0) + error
    assert whole is not None
    return {name: (error / whole.clamp_min(1e-30)).tolist() for name, error in off.items()}
