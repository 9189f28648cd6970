"""Oracles of a deep pretrained model: which of its FFNs may be small, token by token.

A pretrained model with small FFNs everywhere says nothing of use, so the search begins with all
big and makes one more of them small, and one more. Beside the oracles that choose for each token
stand what knows less: one pattern for all tokens, random patterns, and labels that are drawn from
the all-big output, on which whatever is gained is luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.duo.context import Context, Measured
from vesicle.duo.oracle import expected_best
from vesicle.duo.search import Evaluate, Found, beam, by_gains, greedy
from vesicle.plan import FFN_BIG, FFN_SMALL

SEARCHES: dict[str, Callable[[Evaluate, int, int], Found]] = {
    "gains": by_gains,
    "greedy": greedy,
    "beam": beam,
}
TRIES = (1, 10)
"""N of the random patterns of which the best is taken."""


@dataclass(frozen=True, kw_only=True)
class DeepOracle:
    """What was found on one text of T tokens, for 0 to K small FFNs.

    Attributes:
        patterns: (T, K + 1, L) of the oracle, in codes of the Plan's field `ffn`.
        unlabelled_patterns: (T, K + 1, L) of the oracle without labels.
        loss: Nats, (T, K + 1): of `labelled`, `unlabelled`, `fixed` and `drawn`. The last is the
            oracle's loss on drawn labels less that of all big on them, plus that of all big on the
            text: what luck alone would have gained there.
        random: By N, (T, C) the loss to be expected of the best of N random patterns, for each of
            `counts`.
        counts: (C,) numbers of small FFNs.
    """

    patterns: Tensor
    unlabelled_patterns: Tensor
    loss: dict[str, Tensor]
    random: dict[int, Tensor]
    counts: tuple[int, ...]

    @property
    def difficulty(self) -> Tensor:
        """(T,) nats: with the fixed pattern of K small FFNs, less the least that was found."""
        return self.loss["fixed"][:, -1] - self.loss["labelled"].min(1).values


class _Memory:
    """What patterns cost in a context; the same ones are measured once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[bytes, Measured] = {}

    def measured(self, patterns: Tensor) -> Measured:
        name = f"{tuple(patterns.shape)}".encode() + patterns.to(torch.uint8).numpy().tobytes()
        if name not in self._known:
            self._known[name] = self._context.evaluate(patterns)
        return self._known[name]

    def loss(self, patterns: Tensor) -> Tensor:
        return self.measured(patterns).loss

    def divergence(self, patterns: Tensor) -> Tensor:
        return self.measured(patterns).divergence


def downwards(evaluate: Evaluate) -> Evaluate:
    """The same costs for a search that adds big FFNs to small ones: it adds small ones to big."""
    return lambda patterns: evaluate(FFN_SMALL + FFN_BIG - patterns)


def deep_oracle(
    context: Context,
    most: int,
    fixed: Tensor,
    *,
    search: str = "gains",
    n_random: int = 20,
    counts: Sequence[int] = (),
    seed: int = 0,
) -> DeepOracle:
    """Search a text's patterns.

    Args:
        context: The text, all big before each token.
        most: K, the largest number of small FFNs.
        fixed: (K + 1, L) a pattern for all tokens, by number of small FFNs.
        search: One of `SEARCHES`.
        n_random: Random patterns of each number.
        counts: Numbers of small FFNs for which they are drawn.
        seed: Of those, and of the drawn labels.
    """
    find, n_layers = SEARCHES[search], context.n_layers
    memory = _Memory(context)
    labelled = find(downwards(memory.loss), n_layers, most)
    unlabelled = find(downwards(memory.divergence), n_layers, most)
    patterns = _flipped(unlabelled.patterns)
    loss = {
        "labelled": labelled.cost,
        "unlabelled": context.evaluate(patterns.transpose(0, 1)).loss.T,
        "fixed": context.evaluate(fixed).loss.T,
        "drawn": _luck(context, find, most, seed),
    }
    return DeepOracle(
        patterns=_flipped(labelled.patterns),
        unlabelled_patterns=patterns,
        loss=loss,
        random=_random(context, counts, n_random, seed),
        counts=tuple(counts),
    )


def fixed_patterns(contexts: Sequence[Context], most: int) -> Tensor:
    """(K + 1, L) the pattern of least mean loss for each number of small FFNs, as gains add up.

    Args:
        contexts: Of the texts that it is chosen on.
        most: K.
    """
    n_tokens = [c.n_tokens for c in contexts]

    def mean(patterns: Tensor) -> Tensor:
        # The search takes the mean over tokens for its one token.
        same = patterns[:, 0] if patterns.dim() == 3 else patterns
        total = torch.stack([c.evaluate(same).loss.sum(1) for c in contexts]).sum(0)
        return total[:, None] / sum(n_tokens)

    return _flipped(by_gains(downwards(mean), contexts[0].n_layers, most).patterns)[0]


def _flipped(patterns: Tensor) -> Tensor:
    return FFN_SMALL + FFN_BIG - patterns


def _luck(
    context: Context, find: Callable[[Evaluate, int, int], Found], most: int, seed: int
) -> Tensor:
    """(T, K + 1), see `DeepOracle.loss`; the context's targets are put back."""
    big = torch.full((1, context.n_layers), FFN_BIG)
    true, own = context.targets, context.evaluate(big).loss[0]
    rng = torch.Generator().manual_seed(seed)
    try:
        shares = context.logits(big[0]).softmax(-1)
        context.targets = torch.multinomial(shares, 1, generator=rng)[:, 0]
        found = find(downwards(lambda p: context.evaluate(p).loss), context.n_layers, most)
        gained = found.cost - context.evaluate(big).loss[0][:, None]
    finally:
        context.targets = true
    return own[:, None] + gained


def _random(context: Context, counts: Sequence[int], n: int, seed: int) -> dict[int, Tensor]:
    rng = np.random.default_rng(seed)
    losses = []
    for count in counts:
        drawn = np.full((n, context.n_layers), FFN_BIG)
        for row in drawn:
            row[rng.permutation(context.n_layers)[:count]] = FFN_SMALL
        losses.append(context.evaluate(torch.from_numpy(drawn)).loss)
    return {k: torch.stack([expected_best(part, k) for part in losses], dim=1) for k in TRIES}
