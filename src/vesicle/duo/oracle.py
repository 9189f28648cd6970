"""The oracle of Duo-LLM (Alizadeh et al. 2024): the best of all patterns, for each token.

A pattern is a choice in each of L layers; with n choices there are n^L. After layer l a token can
be in n^l states, so a tree of patterns computes each prefix once: about n^L / (n - 1) layers in all
rather than L n^L. What a pattern costs a token is defined in `context.py`.

The oracle reads the true next token, and takes the luckiest of many patterns. So it is shown beside
the expected best of N random patterns with as many big FFNs, which is as lucky for small N, and
beside the pattern that is nearest to the all-big output, which needs no label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from vesicle.duo.context import ROWS, TOKENS, Context, Measured
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL

TWO, THREE = (FFN_SMALL, FFN_BIG), (FFN_SKIP, FFN_SMALL, FFN_BIG)
_LEAVES = 1 << 22
"""Numbers of one kind that are held of a piece of tokens."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best pattern of each token for every number of big FFNs, K = L + 1 numbers from 0 on.

    Attributes:
        patterns: (T, K, L).
        loss: (T, K) nats.
        divergence: (T, K) nats from the all-big output.
    """

    patterns: Tensor
    loss: Tensor
    divergence: Tensor


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What an exhaustive search found.

    Attributes:
        labelled: The patterns of least loss.
        unlabelled: Those of least divergence.
        random: By N, (T, K) the loss to be expected of the best of N random patterns; the best is
            chosen with the label, token by token. For N = 1 it is the mean.
        small: (T,) the loss with small FFNs only.
        pattern_loss: (n^L,) mean loss of each of `all_patterns`, were it taken by every token.
    """

    labelled: Best
    unlabelled: Best
    random: dict[int, Tensor]
    small: Tensor
    pattern_loss: Tensor


def all_patterns(choices: tuple[int, ...], n_layers: int) -> Tensor:
    """(n^L, L) in rising order, the first layer first."""
    return torch.tensor(list(product(choices, repeat=n_layers)))


@torch.no_grad()
def exhaustive(
    context: Context, choices: tuple[int, ...] = TWO, rows: int = ROWS
) -> Iterator[tuple[Tensor, Measured]]:
    """What all patterns cost, a piece of tokens after another.

    Args:
        context: The text.
        choices: What is allowed in a layer.
        rows: States that are computed together, at least.

    Yields:
        Positions (M,), and (n^L, M) each cost in the order of `all_patterns`.
    """
    n_leaves = len(choices) ** context.n_layers
    for at in context.pieces(min(TOKENS, max(1, _LEAVES // n_leaves))):
        found = torch.empty(2, n_leaves, len(at))
        _grow(context, choices, 0, context.start(at), at, 0, found, rows)
        yield at, Measured(loss=found[0], divergence=found[1])


def _grow(
    context: Context,
    choices: tuple[int, ...],
    layer: int,
    h: Tensor,
    at: Tensor,
    first: int,
    found: Tensor,
    rows: int,
) -> None:
    """Fill in the leaves under states h (S, M, D), which are the tree's `first` to first + S."""
    if layer == context.n_layers:
        read = context.read(h, at)
        found[:, first : first + len(h)] = torch.stack([read.loss, read.divergence])
        return
    after = context.each(layer, context.attend(layer, h, at), choices).flatten(0, 1)
    step = max(1, rows // len(at))
    for start in range(0, len(after), step):
        part, begin = after[start : start + step], first * len(choices) + start
        _grow(context, choices, layer + 1, part, at, begin, found, rows)


def oracle_of(
    context: Context, choices: tuple[int, ...] = TWO, tries: Sequence[int] = (1, 10, 100)
) -> Oracle:
    """Search all patterns for the best of every token.

    Args:
        context: The text.
        choices: What is allowed in a layer; big must be.
        tries: N of the random patterns.
    """
    patterns = all_patterns(choices, context.n_layers)
    n_big = (patterns == FFN_BIG).sum(-1)
    groups = [(n_big == k).nonzero()[:, 0] for k in range(context.n_layers + 1)]
    found: dict[str, list[Best]] = {"loss": [], "divergence": []}
    random: dict[int, list[Tensor]] = {n: [] for n in tries}
    total = torch.zeros(len(patterns), dtype=torch.float64)
    for _, measured in exhaustive(context, choices):
        for name, parts in found.items():
            parts.append(_best(patterns, groups, measured, getattr(measured, name)))
        for n, losses in random.items():
            each = [expected_best(measured.loss[group], n) for group in groups]
            losses.append(torch.stack(each, dim=1))
        total += measured.loss.double().sum(1)
    return Oracle(
        labelled=_joined(found["loss"]),
        unlabelled=_joined(found["divergence"]),
        random={n: torch.cat(losses) for n, losses in random.items()},
        small=context.evaluate(torch.full((1, context.n_layers), FFN_SMALL)).loss[0],
        pattern_loss=total / context.n_tokens,
    )


def expected_best(losses: Tensor, n: int) -> Tensor:
    """(...) the mean of the least of n draws, with replacement, from losses (P, ...).

    The i-th least of P, from 1 on, is the least of n draws with probability
    ((P - i + 1) / P)^n - ((P - i) / P)^n.
    """
    ordered = losses.sort(dim=0).values
    left = torch.arange(len(losses), -1, -1, dtype=torch.float64) / len(losses)
    chances = (left[:-1] ** n - left[1:] ** n).to(losses.dtype)
    return torch.tensordot(chances, ordered, dims=1)


def _best(patterns: Tensor, groups: Sequence[Tensor], measured: Measured, by: Tensor) -> Best:
    """Of each group of patterns the best for every token, by (n^L, M)."""
    chosen = torch.stack([group[by[group].argmin(0)] for group in groups], dim=1)  # (M, K)
    return Best(
        patterns=patterns[chosen],
        loss=measured.loss.gather(0, chosen.T).T,
        divergence=measured.divergence.gather(0, chosen.T).T,
    )


def _joined(parts: Sequence[Best]) -> Best:
    return Best(
        patterns=torch.cat([part.patterns for part in parts]),
        loss=torch.cat([part.loss for part in parts]),
        divergence=torch.cat([part.divergence for part in parts]),
    )
