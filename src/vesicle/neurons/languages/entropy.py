"""Which languages a neuron is of: the entropy of its activation probabilities.

A neuron fires where its gate is above 0 (SiLU and GELU have the sign of what they are given). With
p_k the share of tokens of language k at which it fires, and p'_k = p_k / Σ p,

    score = - Σ_k p'_k ln p'_k - λ max_k p_k

and the share of neurons with the lowest scores (1 %) is selected (Zhang et al. 2025). λ is the
largest at which no selected neuron is one of all languages. A neuron is of language k where p_k
exceeds τ, the 95th percentile of all p. Of N languages, a selected neuron is *specific* if N = 1
and *related* if 1 < N < K; any neuron with N = K is *general*; the others are of no class.

LAPE (Tang et al. 2024) is the case λ = 0, of those neurons alone that have N >= 1.

Not as published: probabilities are of plain parallel sentences, where Zhang et al. take a model's
answers to mathematical questions; the first token of a sentence, before which there is nothing, is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vesicle.errors import DataError
from vesicle.neurons.hooks import Hooked

NONE, SPECIFIC, RELATED, GENERAL = range(4)
KINDS = ("none", "specific", "related", "general")
_HALVINGS = 30
_LARGEST = 1e3
"""Above this λ the entropy, at most ln K, has no say any more."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What neurons are.

    Attributes:
        kind: (M,) a number of `KINDS`.
        often: (M, K) whether a neuron's probability in a language exceeds the bar.
        count: (M,) N, in how many languages that is.
        balance: λ.
        bar: τ.
    """

    kind: Tensor
    often: Tensor
    count: Tensor
    balance: float
    bar: float

    def of_languages(self) -> Tensor:
        """(M,) whether a neuron is a language neuron: specific or related."""
        return (self.kind == SPECIFIC) | (self.kind == RELATED)

    def of(self, language: int, *, related: bool = True) -> Tensor:
        """Numbers of the neurons of a language: specific ones, and related ones if wanted."""
        wanted = self.of_languages() if related else self.kind == SPECIFIC
        return (wanted & self.often[:, language]).nonzero()[:, 0]


@torch.no_grad()
def fires(hooked: Hooked, sentences: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """How often neurons fire in sentences.

    Args:
        hooked: The model.
        sentences: Token ids, two and more of each.

    Returns:
        (M,) tokens at which each neuron fires, and how many tokens there are.
    """
    model: Any = hooked.model
    shape = hooked.shape
    total = torch.zeros(shape.n_layers * shape.ffn_width, dtype=torch.int32)
    tokens = 0
    for ids in sentences:
        with hooked.hold(read=["blocks.*.mlp.hook_pre"]) as seen:
            model.base_model(torch.tensor([ids]), use_cache=False)  # the head is not needed
        total += torch.cat([(x[0, 1:] > 0).sum(0) for x in seen.activations.values()]).int()
        tokens += len(ids) - 1
    return total, tokens


def probabilities(counts: Tensor, tokens: Tensor) -> Tensor:
    """(M, K) activation probabilities.

    Args:
        counts: (K, M) tokens at which neurons fire.
        tokens: (K,) tokens of each language.
    """
    return (counts.double() / tokens.double()[:, None]).T.contiguous()


def entropy(p: Tensor) -> Tensor:
    """(M,) nats, of probabilities (M, K) made to sum to 1; ln K where a neuron never fires."""
    total = p.sum(-1, keepdim=True)
    shares = torch.where(total > 0, p / total.clamp_min(1e-300), 1 / p.shape[-1])
    return torch.special.entr(shares).sum(-1)


def classify(p: Tensor, share: float = 0.01, bar_share: float = 0.95) -> Classes:
    """Say which neurons are specific to a language, related to several, or general.

    Args:
        p: (M, K) activation probabilities.
        share: Of neurons that are selected.
        bar_share: Of probabilities that lie at the bar or below it.

    Raises:
        DataError: A share is out of range.
    """
    selected_count = _number(share, len(p), "--share")
    spread, highest = entropy(p), p.max(-1).values
    bar = float(p.flatten().kthvalue(_number(bar_share, p.numel(), "bar_share")).values)
    often = p > bar
    count = often.sum(-1)
    general = count == p.shape[-1]

    def selected(balance: float) -> Tensor:
        return (spread - balance * highest).topk(selected_count, largest=False).indices

    def fits(balance: float) -> bool:
        return not bool(general[selected(balance)].any())

    low, high = 0.0, 1e-3
    while high < _LARGEST and fits(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    kind = torch.where(general, GENERAL, NONE)
    taken = selected(low)
    taken = taken[(count[taken] >= 1) & ~general[taken]]
    kind[taken] = torch.where(count[taken] == 1, SPECIFIC, RELATED)
    return Classes(kind=kind, often=often, count=count, balance=low, bar=bar)


def lape(p: Tensor, share: float = 0.01, bar_share: float = 0.95) -> Tensor:
    """(M,) whether a neuron is language-specific by LAPE: low entropy, and above the bar once.

    Args:
        p: (M, K) activation probabilities.
        share: Of neurons that are selected, at most.
        bar_share: As in `classify`.

    Raises:
        DataError: A share is out of range.
    """
    bar = p.flatten().kthvalue(_number(bar_share, p.numel(), "bar_share")).values
    heard = (p > bar).any(-1)
    score = torch.where(heard, entropy(p), math.inf)
    found = torch.zeros(len(p), dtype=torch.bool)
    found[score.topk(_number(share, len(p), "--share"), largest=False).indices] = True
    return found & heard


def _number(share: float, total: int, name: str) -> int:
    if not 0 < share < 1:
        raise DataError(f"{name} is {share:g}; allowed: above 0 and below 1")
    return max(1, round(share * total))
