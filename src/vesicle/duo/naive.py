"""What `context.py` and `oracle.py` compute, by the model's own forward passes.

One pass for each token and pattern: the text up to that token, which takes the pattern while all
before it take the base. Slow, and plainly what is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vesicle.duo.context import Measured
from vesicle.duo.module import Choices, table
from vesicle.plan import FFN_BIG

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def measure(
    model: LlamaForCausalLM,
    choices: Choices,
    tokens: Tensor,
    patterns: Tensor,
    base: int = FFN_BIG,
    positions: Tensor | None = None,
) -> Measured:
    """What patterns cost the tokens of a text.

    Args:
        model: With small FFNs.
        choices: Of that model.
        tokens: (T + 1,), the last of which is only predicted.
        patterns: (N, L).
        base: What all earlier tokens take.
        positions: (M,) of which tokens; of all T by default.

    Returns:
        (N, M) each.
    """
    found = []
    at = range(len(tokens) - 1) if positions is None else positions.tolist()
    for t in at:
        whole = torch.full_like(patterns[0], FFN_BIG)
        best = _last(model, choices, tokens[: t + 1], whole, base)
        for pattern in patterns:
            ours = _last(model, choices, tokens[: t + 1], pattern, base)
            apart = (best.exp() * (best - ours)).sum()
            found.append(torch.stack([-ours[tokens[t + 1]], apart]))
    both = torch.stack(found).view(len(at), len(patterns), 2)
    return Measured(loss=both[..., 0].T, divergence=both[..., 1].T)


def _last(
    model: LlamaForCausalLM, choices: Choices, tokens: Tensor, pattern: Tensor, base: int
) -> Tensor:
    """(V,) log-probabilities after tokens (t,), the last of which takes `pattern` (L,)."""
    chosen = torch.full((1, len(tokens), len(pattern)), base)
    chosen[0, -1] = pattern
    with choices.by(table(chosen)):
        return model(tokens[None]).logits[0, -1].log_softmax(-1)
