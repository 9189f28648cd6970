"""Routers: which experts a token takes, and how much each counts.

A router scores all M experts, takes the k highest, and gives each a gate:

    gates = softmax over the k chosen of score / temperature      (or 1 for each, `weighted=False`)

- `TopKRouter` has learnt scores, x W + b (Shazeer et al. 2017).
- `SparsityRouter` has no weights of its own. After MoE-X (Yang et al. 2025) it prefers the experts
  of which the fewest units will be active, and estimates that without running them: where the
  weights of an expert's units on each channel d have mean μ_d and variance σ_d² over its units, and
  are taken for draws of a normal distribution, a unit's input is N(Σ μ_d x_d, Σ σ_d² x_d²), so that

    P(active) = (1 + erf z) / 2,   z = Σ μ_d x_d / sqrt(2 Σ σ_d² x_d²),   score = 1 - 2 P = -erf z

  which costs 2 M D multiplications instead of the M D F of all experts.
- `FixedRouter` takes the same experts for every token: what a small FFN made of them computes.

`balance_loss` is Switch's (Fedus et al. 2022): M Σ_j f_j P_j with f_j the share of choices that
expert j has, and P_j its mean probability. It is 1 where both are even and M where one expert has
all. Not reproduced: noise on scores, a capacity of experts, and dropping tokens beyond it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router decided for N tokens.

    Attributes:
        chosen: (N, k) numbers of experts.
        gates: (N, k) by which what they give is multiplied.
        scores: (N, M) of all experts.
    """

    chosen: Tensor
    gates: Tensor
    scores: Tensor

    @property
    def all_gates(self) -> Tensor:
        """(N, M) gates of all experts, 0 where one was not chosen."""
        return torch.zeros_like(self.scores).scatter(1, self.chosen, self.gates)


class Router(nn.Module, ABC):
    """Chooses among the experts of one layer.

    Attributes:
        n_active: How many experts a token takes, k.
    """

    n_active: int

    @abstractmethod
    def forward(self, x: Tensor, encoders: Tensor) -> Routing:
        """Route tokens, each by its own x alone.

        Args:
            x: (N, D) the layer's input.
            encoders: (M, D, F) the weights that decide whether a unit of each expert is active.
        """


class TopKRouter(Router):
    """Learnt scores.

    Attributes:
        weight: (D, M).
        bias: (M,).
        weighted: Whether gates are a softmax; else each is 1.
        temperature: Of that softmax.
    """

    def __init__(
        self,
        width: int,
        n_experts: int,
        n_active: int,
        *,
        weighted: bool = True,
        temperature: float = 1.0,
    ) -> None:
        """Weights drawn from N(0, 0.02).

        Raises:
            ValueError: There are fewer experts than are to be taken, or no positive temperature.
        """
        super().__init__()
        self.n_active, self.weighted = n_active, weighted
        self.temperature = _checked(n_experts, n_active, temperature)
        self.weight = nn.Parameter(torch.randn(width, n_experts) * 0.02)
        self.bias = nn.Parameter(torch.zeros(n_experts))

    def forward(self, x: Tensor, encoders: Tensor) -> Routing:
        """By x W + b."""
        return _highest(x @ self.weight + self.bias, self.n_active, self.weighted, self.temperature)


class SparsityRouter(Router):
    """Scores by the estimated sparsity of experts, from their weights.

    Attributes:
        weighted: Whether gates are a softmax; else each is 1.
        temperature: Of that softmax. The paper's is not known to us.
        densest: Turned round, as a control: take the experts with the most active units.
    """

    def __init__(
        self,
        n_experts: int,
        n_active: int,
        *,
        weighted: bool = True,
        temperature: float = 1.0,
        densest: bool = False,
    ) -> None:
        """No parameters.

        Raises:
            ValueError: There are fewer experts than are to be taken, or no positive temperature.
        """
        super().__init__()
        self.n_active, self.weighted, self.densest = n_active, weighted, densest
        self.temperature = _checked(n_experts, n_active, temperature)

    def forward(self, x: Tensor, encoders: Tensor) -> Routing:
        """By -erf z, or erf z where the densest are wanted."""
        scores = 1 - 2 * active_probability(x, encoders)
        if self.densest:
            scores = -scores
        return _highest(scores, self.n_active, self.weighted, self.temperature)


class FixedRouter(Router):
    """The same experts for every token.

    Attributes:
        experts: Their numbers.
        each: Gate of each.
    """

    def __init__(
        self, n_experts: int, experts: Sequence[int], gates: Sequence[float] | None = None
    ) -> None:
        """Choose.

        Args:
            n_experts: M.
            experts: Numbers of experts.
            gates: Of each; 1 if not given.

        Raises:
            ValueError: There are none, one is out of range or twice there, or gates are missing.
        """
        super().__init__()
        self.experts = check_experts(experts, n_experts)
        self.n_active, self.n_experts = len(self.experts), n_experts
        self.each = tuple(gates) if gates is not None else (1.0,) * self.n_active
        if len(self.each) != self.n_active:
            raise ValueError(f"there are {len(self.each)} gates; allowed: {self.n_active}")

    def forward(self, x: Tensor, encoders: Tensor) -> Routing:
        """Without looking at x."""
        chosen = torch.tensor(self.experts, device=x.device).expand(len(x), -1)
        return Routing(
            chosen=chosen,
            gates=x.new_tensor(self.each).expand(len(x), -1),
            scores=x.new_zeros(len(x), self.n_experts),
        )


def active_probability(x: Tensor, encoders: Tensor) -> Tensor:
    """(N, M) estimated share of each expert's units that are active, as the module docstring says.

    Args:
        x: (N, D).
        encoders: (M, D, F).
    """
    mean, variance = encoders.mean(2), encoders.var(2, correction=0)  # (M, D)
    spread = (x.square() @ variance.T).clamp_min(_LEAST_VARIANCE).sqrt()
    return (1 + torch.erf(x @ mean.T / (spread * math.sqrt(2)))) / 2


def balance_loss(routing: Routing, temperature: float = 1.0) -> Tensor:
    """M Σ f_j P_j of N tokens' choices; a gradient reaches P alone."""
    n_experts = routing.scores.shape[1]
    counts = routing.chosen.flatten().bincount(minlength=n_experts)
    shares = counts / routing.chosen.numel()
    return n_experts * (shares * (routing.scores / temperature).softmax(1).mean(0)).sum()


def check_experts(experts: Sequence[int], n_experts: int) -> tuple[int, ...]:
    """Numbers of experts, if each is there once.

    Raises:
        ValueError: There are none, or one is out of range or twice there.
    """
    for expert in experts:
        if not 0 <= expert < n_experts:
            raise ValueError(f"expert is {expert}; allowed: 0 to {n_experts - 1}")
    if not experts or len(set(experts)) < len(experts):
        raise ValueError(f"experts are {list(experts)}; allowed: at least one, each once")
    return tuple(experts)


def _highest(scores: Tensor, n_active: int, weighted: bool, temperature: float) -> Routing:
    top = scores.topk(n_active, dim=1)
    gates = (top.values / temperature).softmax(1) if weighted else torch.ones_like(top.values)
    return Routing(chosen=top.indices, gates=gates, scores=scores)


def _checked(n_experts: int, n_active: int, temperature: float) -> float:
    if not 1 <= n_active <= n_experts:
        raise ValueError(f"n_active is {n_active}; allowed: 1 to the {n_experts} experts")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0")
    return temperature
