"""How difficult a token is: what more compute could gain it (Duo-LLM, Alizadeh et al. 2024).

    difficulty = loss with small FFNs only - least loss over all patterns >= 0,  in nats

A token that is missed whatever is computed is not difficult in this sense, only hard to predict.
The definition reads the label and takes the luckiest of all patterns, so it is positive where there
is nothing but luck to gain; and the loss with small FFNs is a part of it, so that the two may
correlate for that reason alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.duo.oracle import Oracle


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of the tokens.

    Attributes:
        name: What they have in common.
        n_tokens: How many they are.
        mean: Of their values; not a number where there are none.
    """

    name: str
    n_tokens: int
    mean: float


def difficulty_of(found: Oracle) -> Tensor:
    """(T,) nats."""
    return found.small - found.labelled.loss.min(1).values


def entropy(logits: Tensor) -> Tensor:
    """(...) nats, of logits (..., V)."""
    shares = logits.log_softmax(-1)
    return -(shares.exp() * shares).sum(-1)


def by_position(values: Tensor, n_parts: int = 10) -> list[Group]:
    """Means over equal parts of texts, first to last, of values (..., T)."""
    flat = values.reshape(-1, values.shape[-1])
    parts = torch.tensor_split(torch.arange(values.shape[-1]), n_parts)
    return [_group(f"{n + 1} of {n_parts}", flat[:, part]) for n, part in enumerate(parts)]


def by_frequency(values: Tensor, tokens: Tensor, training: Tensor, n_parts: int = 5) -> list[Group]:
    """Means over tokens by how often they occur in training text, rare to frequent.

    Args:
        values: (...).
        tokens: (...) whose they are.
        training: (n,) tokens of the training text.
        n_parts: Of as many tokens each, but for ties, which stay together.
    """
    highest = int(torch.cat([tokens.flatten(), training.flatten()]).max()) + 1
    counts = training.flatten().bincount(minlength=highest)[tokens.flatten()]
    edges = torch.quantile(counts.double(), torch.linspace(0, 1, n_parts + 1).double())
    part = torch.bucketize(counts.double(), edges[1:-1])
    return [_group(f"{n + 1} of {n_parts}", values.flatten()[part == n]) for n in range(n_parts)]


def by_class(values: Tensor, names: Sequence[str]) -> list[Group]:
    """Means over tokens by the names of their classes, of values (T,), the highest mean first."""
    found = []
    for name in sorted(set(names)):
        mask = torch.tensor([other == name for other in names])
        found.append(_group(name, values[mask]))
    return sorted(found, key=lambda group: -group.mean)


def spearman(left: Tensor, right: Tensor) -> float:
    """Correlation of the ranks of (n,) and (n,); equal values share the mean of their ranks."""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[inverse]


def _group(name: str, values: Tensor) -> Group:
    return Group(name=name, n_tokens=values.numel(), mean=float(values.double().mean()))
