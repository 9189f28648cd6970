"""Duo FFNs: in every layer a token takes the big FFN, a small one, or neither.

After Duo-LLM (Alizadeh et al. 2024). With x the normed input of a layer's FFN and c the token's
choice there, coded as the Plan's field `ffn`,

    y = 0 (c = 0, skip),  small(x) (c = 1),  big(x) (c = 2)

or, while a router is trained, p_1 small(x) + p_2 big(x) with probabilities p of the three.

What is chosen comes from outside: all layers of a model ask one `Choices`. Skipping leaves out the
FFN alone; attention always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.plan import FFN_BIG, FFN_SMALL

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Chooser = Callable[[int, Tensor], Tensor]
"""From a layer and its FFN's normed input (B, T, D): choices (B, T), integers, or probabilities
(B, T, 3) of skip, small and big."""


def always(choice: int) -> Chooser:
    """The same for every token and layer."""
    return lambda layer, x: torch.full(x.shape[:-1], choice, device=x.device)


def table(choices: Tensor) -> Chooser:
    """What `choices` (B, T, L) or (T, L) says."""
    return lambda layer, x: choices[..., layer].expand(x.shape[:-1])


class Choices:
    """Who chooses, for all layers of a model; all is big by default."""

    def __init__(self) -> None:
        self._chooser = always(FFN_BIG)
        self._taken: dict[int, Tensor] = {}

    @contextmanager
    def by(self, chooser: Chooser) -> Iterator[dict[int, Tensor]]:
        """Let `chooser` choose inside the block.

        Gives what the last pass was told, by layer: (B, T) or (B, T, 3).
        """
        before = self._chooser, self._taken
        self._chooser, self._taken = chooser, {}
        try:
            yield self._taken
        finally:
            self._chooser, self._taken = before

    def ask(self, layer: int, x: Tensor) -> Tensor:
        """What is chosen for x (B, T, D) in a layer."""
        self._taken[layer] = self._chooser(layer, x)
        return self._taken[layer]


class GatedFfn(nn.Module):
    """down (silu(gate x) * up x), without biases."""

    def __init__(self, width: int, units: int, spread: float) -> None:
        """Weights drawn from N(0, spread)."""
        super().__init__()
        self.gate = nn.Linear(width, units, bias=False)
        self.up = nn.Linear(width, units, bias=False)
        self.down = nn.Linear(units, width, bias=False)
        for part in (self.gate, self.up, self.down):
            nn.init.normal_(part.weight, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class DuoFeedForward(nn.Module):
    """The FFNs of one layer.

    Attributes:
        big: The one that was there.
        small: Of few hidden units.
        choices: Of the whole model.
        layer: Which one this is.
    """

    def __init__(self, big: nn.Module, small: nn.Module, choices: Choices, layer: int) -> None:
        super().__init__()
        self.big, self.small = big, small
        self.choices, self.layer = choices, layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), by what is chosen."""
        chosen = self.choices.ask(self.layer, x)
        if chosen.is_floating_point():
            small, big = chosen[..., FFN_SMALL, None], chosen[..., FFN_BIG, None]
            return small * self.small(x) + big * self.big(x)
        return self.hard(x, chosen)

    def hard(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What x (..., D) gives under choices (...); a module sees only the tokens that take it."""
        result = torch.zeros_like(x)
        for choice, module in ((FFN_SMALL, self.small), (FFN_BIG, self.big)):
            takes = chosen == choice
            if bool(takes.all()):
                return module(x)
            if bool(takes.any()):
                result[takes] = module(x[takes])
        return result


def make_duo(model: LlamaForCausalLM, ratio: int = 16, seed: int = 0) -> Choices:
    """Give every layer of a model a small FFN beside its own, in place.

    Args:
        model: As `scratch.new_decoder` builds it, or trained.
        ratio: Hidden units of its FFN for each one of the small FFN, which has at least one.
        seed: Of the small FFNs' weights; the state of torch's own generator is left as it was.

    Returns:
        By whom all layers' choices are set.

    Raises:
        ValueError: The ratio is below 1.
        VesicleError: The model has small FFNs already.
    """
    if ratio < 1:
        raise ValueError(f"ratio is {ratio}; allowed: 1 and above")
    config, choices = model.config, Choices()
    units = max(1, int(config.intermediate_size) // ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, layer in enumerate(model.model.layers):
            if isinstance(layer.mlp, DuoFeedForward):
                raise VesicleError("the model has small FFNs already")
            small = GatedFfn(int(config.hidden_size), units, float(config.initializer_range))
            layer.mlp = DuoFeedForward(cast(nn.Module, layer.mlp), small, choices, number)
    return choices
