"""Searching patterns of deep models, where 2^L are too many.

Each search finds, for every token, a pattern for every number of big FFNs from 0 to a budget, and
begins with small FFNs everywhere. All work on a function that says what given patterns cost, such
as the loss or the divergence of `Context.evaluate`. With L layers, a budget of K and a beam of W
patterns:

- `greedy`: adds the one big FFN that lowers the cost most; about K L patterns.
- `beam`: the same, and keeps the W best of each number; about K W L patterns.
- `by_gains`: measures how far one big FFN, or two in neighbouring layers, change the cost; adds
  such changes up as if they were independent; and finds the pattern of least sum by dynamic
  programming. 2 L + K patterns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.plan import FFN_BIG, FFN_SMALL

Evaluate = Callable[[Tensor], Tensor]
"""From patterns (N, L), the same for all tokens, or (N, T, L) to what they cost, (N, T)."""
MOST_LAYERS = 62
"""So many bits of an integer tell patterns apart."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Patterns for 0 to K big FFNs.

    Attributes:
        patterns: (T, K + 1, L).
        cost: (T, K + 1), as measured.
        evaluated: Patterns that were measured for each token.
    """

    patterns: Tensor
    cost: Tensor
    evaluated: int


def greedy(evaluate: Evaluate, n_layers: int, budget: int | None = None) -> Found:
    """One big FFN after another; see `beam`, of which it is the narrowest."""
    return beam(evaluate, n_layers, budget, width=1)


def beam(evaluate: Evaluate, n_layers: int, budget: int | None = None, *, width: int = 4) -> Found:
    """The best of what adds one big FFN to the `width` best patterns with one less.

    Args:
        evaluate: Says what patterns cost.
        n_layers: L.
        budget: Most big FFNs; L by default.
        width: Patterns that are kept for each token and number.

    Raises:
        ValueError: The width or the budget is out of range.
    """
    budget = _checked(budget, n_layers)
    if width < 1:
        raise ValueError(f"width is {width}; allowed: 1 and above")
    cost = evaluate(_small(n_layers))  # (1, T)
    n_tokens, evaluated = cost.shape[1], 1
    kept = torch.zeros(1, n_tokens, n_layers, dtype=torch.bool)  # where FFNs are big
    found, costs = [kept[0]], [cost[0]]
    for _ in range(budget):
        tried = _one_more(kept)  # (N, T, L)
        cost = evaluate(_choices(tried)).masked_fill(_repeated(tried), torch.inf)
        evaluated += len(tried)
        best = cost.topk(min(width, len(tried)), dim=0, largest=False, sorted=True)
        # Fewer patterns than the beam is wide: it fills with repeated ones, whose successors are
        # repeated again, and lose again.
        kept = tried.gather(0, best.indices[..., None].expand(-1, -1, n_layers))
        found.append(kept[0])
        costs.append(best.values[0])
    return Found(
        patterns=_choices(torch.stack(found, dim=1)),
        cost=torch.stack(costs, dim=1),
        evaluated=evaluated,
    )


def by_gains(evaluate: Evaluate, n_layers: int, budget: int | None = None) -> Found:
    """Dynamic programming on the gains of single FFNs and of neighbours.

    With c_l = 1 where the FFN of layer l is big, f the cost, and e_l the pattern that is big there
    alone, the cost is taken to be

        f(0) + Σ_l a_l c_l + Σ_l b_l c_(l-1) c_l,    a_l = f(e_l) - f(0),
        b_l = f(e_(l-1) + e_l) - f(e_(l-1)) - f(e_l) + f(0)

    Args:
        evaluate: Says what patterns cost.
        n_layers: L.
        budget: Most big FFNs; L by default.

    Raises:
        ValueError: The budget is out of range.
    """
    budget = _checked(budget, n_layers)
    none, single = torch.zeros(1, n_layers, dtype=torch.bool), torch.eye(n_layers).bool()
    measured = evaluate(_choices(torch.cat([none, single, single[1:] | single[:-1]])))
    rest, alone, pairs = measured.split([1, n_layers, n_layers - 1])
    gains = alone - rest
    together = pairs - alone[1:] - alone[:-1] + rest
    chosen = _least_sums(gains, together, budget)  # (K + 1, T, L)
    return Found(
        patterns=_choices(chosen).transpose(0, 1),
        cost=evaluate(_choices(chosen)).T,
        evaluated=len(measured) + budget + 1,
    )


def _least_sums(gains: Tensor, together: Tensor, budget: int) -> Tensor:
    """(K + 1, T, L) where FFNs are big in the patterns of least sum, by how many are.

    Args:
        gains: (L, T).
        together: (L - 1, T).
        budget: K.
    """
    n_layers, n_tokens = gains.shape
    # Least sum with k big so far, where the last layer is small (0) or big (1).
    least = torch.full((2, budget + 1, n_tokens), torch.inf)
    least[0, 0] = 0.0
    came_from = []
    for layer in range(n_layers):
        to_small = least
        joined = together[layer - 1] if layer else torch.zeros(n_tokens)
        to_big = torch.stack([least[0], least[1] + joined]) + gains[layer]
        to_big = torch.cat([torch.full((2, 1, n_tokens), torch.inf), to_big[:, :-1]], dim=1)
        steps = [to_small.min(0), to_big.min(0)]
        least = torch.stack([step.values for step in steps])
        came_from.append(torch.stack([step.indices for step in steps]))
    left = torch.arange(budget + 1)[:, None].expand(-1, n_tokens)
    state = least.min(0).indices  # (K + 1, T)
    chosen = torch.zeros(budget + 1, n_tokens, n_layers, dtype=torch.bool)
    tokens = torch.arange(n_tokens)
    for layer in reversed(range(n_layers)):
        chosen[..., layer] = state == 1
        before = came_from[layer][state, left, tokens]
        left = left - state
        state = before
    return chosen


def _one_more(kept: Tensor) -> Tensor:
    """(W (L - k), T, L) patterns (W, T, L) with k big FFNs, each with one more."""
    small = (~kept).nonzero()[:, -1].view(*kept.shape[:2], -1)  # (W, T, L - k)
    added = torch.nn.functional.one_hot(small, kept.shape[-1]).bool()
    return (kept[:, :, None] | added).transpose(1, 2).flatten(0, 1)


def _repeated(tried: Tensor) -> Tensor:
    """(N, T) whether a token meets a pattern of (N, T, L) that is further up."""
    codes = (tried.long() << torch.arange(tried.shape[-1])).sum(-1)
    earlier = torch.ones(len(tried), len(tried), dtype=torch.bool).tril(-1)
    return ((codes[:, None] == codes[None]) & earlier[..., None]).any(1)


def _small(n_layers: int) -> Tensor:
    return torch.full((1, n_layers), FFN_SMALL)


def _choices(big: Tensor) -> Tensor:
    return torch.where(big, FFN_BIG, FFN_SMALL)


def _checked(budget: int | None, n_layers: int) -> int:
    most = n_layers if budget is None else budget
    if not 0 <= most <= n_layers:
        raise ValueError(f"budget is {budget}; allowed: 0 to {n_layers}")
    if n_layers > MOST_LAYERS:
        raise ValueError(f"{n_layers} layers; allowed: up to {MOST_LAYERS}")
    return most
