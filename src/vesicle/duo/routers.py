"""Routers: they choose FFNs for each token and layer from the FFN's normed input.

- `ReadOutRouter`: logits of skip, small and big from that input, for one budget (Duo-LLM, Alizadeh
  et al. 2024; the paper's router is linear).
- `DialRouter`: a serotonin level from an `MlpPredictor` whose dial is the budget, so that one
  router serves all budgets. At dial 1 every level is 1, and all is big.

Each gives probabilities for training, by which outputs are mixed, and choices. `lean` moves choices
towards big; `share_matched` finds the lean at which a router spends what it is asked to. Choices
depend on the token alone and on what its states hold of earlier ones: they are causal. Texts come
whole, from position 0 on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vesicle.duo.module import Choices, Chooser
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.predictors import PredictorConfig
from vesicle.predictors.mlp import MlpPredictor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Router(nn.Module, ABC):
    """Chooses FFNs."""

    @abstractmethod
    def probabilities(self, layer: int, x: Tensor, dial: Tensor, temperature: float) -> Tensor:
        """(B, T, 3) of skip, small and big.

        Args:
            layer: 0 to L - 1.
            x: (B, T, D) normed input of the FFN.
            dial: (B,) share of FFNs that are to be big; not read by a router of one budget.
            temperature: The lower, the nearer to choices.
        """

    @abstractmethod
    def choose(self, layer: int, x: Tensor, dial: Tensor, lean: float) -> Tensor:
        """(B, T) choices; the higher `lean`, the more are big."""

    def soft(self, dial: Tensor, temperature: float) -> Chooser:
        """Mixes by probabilities."""
        return lambda layer, x: self.probabilities(layer, x, dial, temperature)

    def hard(self, dial: Tensor, lean: float = 0.0) -> Chooser:
        """Takes choices."""
        return lambda layer, x: self.choose(layer, x, dial, lean)


class ReadOutRouter(Router):
    """Logits W_l x, or V_l gelu(U_l x) with hidden units, and a bias each."""

    def __init__(
        self, n_layers: int, width: int, *, hidden: int = 0, skips: bool = False, seed: int = 0
    ) -> None:
        """All choices alike at first.

        Args:
            n_layers: L.
            width: D.
            hidden: Units of a hidden layer; none by default, and the router is linear.
            skips: Whether FFNs may be skipped.
            seed: Of hidden units' weights.
        """
        super().__init__()
        self.skips = skips
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = nn.ModuleList(
                nn.Linear(width, hidden) if hidden else nn.Identity() for _ in range(n_layers)
            )
        self.outer = nn.ModuleList(nn.Linear(hidden or width, 3) for _ in range(n_layers))
        for read_out in self.outer.parameters():
            nn.init.zeros_(read_out)

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """(B, T, 3) from x (B, T, D); minus infinity where a choice is not allowed."""
        inner = self.inner[layer](x)
        found: Tensor = self.outer[layer](
            inner if isinstance(self.inner[layer], nn.Identity) else nn.functional.gelu(inner)
        )
        barred = torch.tensor([not self.skips, False, False])
        return found.masked_fill(barred, -torch.inf)

    def probabilities(self, layer: int, x: Tensor, dial: Tensor, temperature: float) -> Tensor:
        """Softmax of the logits over the temperature."""
        return (self.logits(layer, x) / temperature).softmax(-1)

    def choose(self, layer: int, x: Tensor, dial: Tensor, lean: float) -> Tensor:
        """The greatest logit, `lean` added to that of big."""
        return (self.logits(layer, x) + lean * torch.tensor([0.0, 0.0, 1.0])).argmax(-1)


class DialRouter(Router):
    """Levels of serotonin: big from 1/2 up, small below it.

    With skips: big from 2/3 up, small from 1/3 up, skip below.
    """

    def __init__(
        self, n_layers: int, width: int, *, hidden: int = 16, skips: bool = False, seed: int = 0
    ) -> None:
        """Every level equals the dial at first.

        Args:
            n_layers: L.
            width: D.
            hidden: Units of the predictor.
            skips: Whether FFNs may be skipped.
            seed: Of the predictor's weights.
        """
        super().__init__()
        config = PredictorConfig(
            n_layers=n_layers, width=width, transmitters=("serotonin",), hidden=hidden
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = MlpPredictor(config)
        self.steps = (1 / 3, 2 / 3) if skips else (-torch.inf, 1 / 2)
        """From which levels up the FFN is small, and big."""

    def levels(self, layer: int, x: Tensor, dial: Tensor) -> Tensor:
        """(B, T) in [0, 1]; 1 is rest."""
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        return self.predictor.release(layer, x, positions, dial, {})[..., 0]

    def probabilities(self, layer: int, x: Tensor, dial: Tensor, temperature: float) -> Tensor:
        """Sigmoids of how far the level is above each step, a tenth of the temperature wide."""
        level = self.levels(layer, x, dial)
        runs, big = (torch.sigmoid((level - s) / (0.1 * temperature)) for s in self.steps)
        runs, big = (p.masked_fill(level >= 1, 1.0) for p in (runs, big))
        return torch.stack([1 - runs, runs - big, big], dim=-1)

    def choose(self, layer: int, x: Tensor, dial: Tensor, lean: float) -> Tensor:
        """The highest step that the level, `lean` added, reaches."""
        level = self.levels(layer, x, dial) + lean
        small = torch.where(level >= self.steps[0], FFN_SMALL, FFN_SKIP)
        return torch.where(level >= self.steps[1], FFN_BIG, small)


@torch.no_grad()
def routed(
    model: LlamaForCausalLM,
    choices: Choices,
    router: Router,
    texts: Tensor,
    dial: float,
    lean: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A pass in which a router chooses for all tokens.

    Args:
        model: With small FFNs.
        choices: Of that model.
        router: It.
        texts: (B, T) tokens.
        dial: Share of FFNs that are to be big.
        lean: Towards big.

    Returns:
        Logits (B, T, V), and the choices taken, (B, T, L).
    """
    with choices.by(router.hard(torch.full((len(texts),), dial), lean)) as taken:
        logits = model(texts).logits
        return logits, torch.stack(list(taken.values()), dim=-1)


def share_matched(
    model: LlamaForCausalLM,
    choices: Choices,
    router: Router,
    texts: Tensor,
    share: float,
    *,
    most: float = 16.0,
    rounds: int = 20,
) -> float:
    """The lean at which a share of the FFNs of texts (B, T) is big, by bisection.

    What is chosen in one layer changes what is chosen in later ones, so the share need not rise
    everywhere with the lean; the last lean whose share was at most the one asked for is given.
    """
    low, high = -most, most
    for _ in range(rounds):
        middle = (low + high) / 2
        _, taken = routed(model, choices, router, texts, share, middle)
        if (taken == FFN_BIG).float().mean() > share:
            high = middle
        else:
            low = middle
    return low
