"""Looking again: a token is computed cheaply, and once more in full where the result is not sure.

After DynaLay (Mathur and Plis 2023, arXiv 2312.12781), whose agent chooses layers for an input and
evaluates hard ones again. Here the first look is any method's Plan, what is looked at again is a
rule on its logits, and the second look replaces the first: its keys and values are what later
tokens see. Both looks are paid for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.plan import Method

if TYPE_CHECKING:
    from vesicle.engine import Engine, Sequence

Rule = Callable[[Tensor], bool]
"""From the logits (V,) of a first look to whether a second one is taken."""


@dataclass(frozen=True, kw_only=True)
class Reevaluated:
    """A text of N scored tokens.

    Attributes:
        nats: (N,) by which each is missed.
        again: (N,) whether it was looked at twice.
        flops: Executed, of both looks.
        dense_flops: Of the dense model.
    """

    nats: Tensor
    again: Tensor
    flops: int
    dense_flops: int

    @property
    def share(self) -> float:
        """Executed FLOPs over the dense model's."""
        return self.flops / self.dense_flops


def unsure(confidence: float) -> Rule:
    """Look again where the likeliest token has less probability than that.

    Raises:
        VesicleError: It is no probability.
    """
    if not 0 <= confidence <= 1:
        raise VesicleError(f"confidence is {confidence}; allowed: 0 to 1")
    return lambda logits: float(logits.softmax(-1).max()) < confidence


def by_chance(share: float, seed: int = 0) -> Rule:
    """Look again at a share of the tokens, drawn: what a rule that knows something must beat."""
    rng = np.random.default_rng(seed)
    return lambda logits: bool(rng.random() < share)


def reevaluate(
    engine: Engine, ids: list[int], n_prompt: int, first: Method, second: Method, again: Rule
) -> Reevaluated:
    """Score a text, each token as it would be decoded.

    Args:
        engine: That computes.
        ids: Of the text.
        n_prompt: Tokens that are read before anything is scored, under `second`; 1 and above.
        first: The cheap look; it carries no state from token to token.
        second: The other.
        again: When it is taken.

    Raises:
        VesicleError: Nothing is left to score, or a method carries state.
    """
    if not 1 <= n_prompt < len(ids):
        raise VesicleError(f"n_prompt is {n_prompt}; allowed: 1 to {len(ids) - 1}")
    sequence, nats, twice, flops, dense = engine.start(second), [], [], 0, 0
    try:
        sequence.begin_prompt(n_prompt)
        if n_prompt > 1:
            engine.forward([(sequence, list(ids[: n_prompt - 1]))], "none")
        for token, following in pairwise(ids[n_prompt - 1 :]):
            looked, logits = _look(engine, sequence, first, token)
            flops += looked.cost.flops_total
            twice.append(again(logits))
            if twice[-1]:
                looked.close()
                looked, logits = _look(engine, sequence, second, token)
                flops += looked.cost.flops_total
            dense += looked.dense_cost.flops_total
            sequence.close()
            sequence = looked
            nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(following)))
    finally:
        sequence.close()
    return Reevaluated(
        nats=torch.stack(nats), again=torch.tensor(twice), flops=flops, dense_flops=dense
    )


def _look(
    engine: Engine, sequence: Sequence, method: Method, token: int
) -> tuple[Sequence, Tensor]:
    """A sequence that has gone on by a token under a method, and its logits (V,)."""
    fork = engine.fork(sequence, method=method)
    try:
        return fork, engine.forward([(fork, [token])])[0][0].float()
    except BaseException:
        fork.close()
        raise
