"""What choices cost as they are executed, all tokens at once, and in the oracle's context.

In the context a token's choices are judged while all earlier tokens are all big. Executed, every
token takes its own choices, and reads keys and values that those of earlier tokens left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.duo import Choices, Context, table, token_losses
from vesicle.plan import FFN_BIG, FFN_SMALL
from vesicle.studies.duo.oracles import rounded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_BATCH = 4


@torch.no_grad()
def executed(model: LlamaForCausalLM, choices: Choices, texts: Tensor, patterns: Tensor) -> Tensor:
    """(N,) mean loss of each text, in nats.

    Args:
        model: With small FFNs.
        choices: Of that model.
        texts: (N, T + 1) tokens.
        patterns: (N, T, L), or (L,) for all tokens.
    """
    patterns = patterns.expand(len(texts), texts.shape[1] - 1, -1)
    found = []
    for part, chosen in zip(texts.split(_BATCH), patterns.split(_BATCH), strict=True):
        with choices.by(table(chosen)):
            found.append(token_losses(model(part[:, :-1]).logits, part[:, 1:]).mean(1))
    return torch.cat(found)


def in_context(model: LlamaForCausalLM, texts: Tensor, patterns: Tensor) -> Tensor:
    """(N,) mean loss of each text (T + 1,) under patterns (N, T, L), the rest all big."""
    return torch.stack(
        [
            Context(model, tokens).evaluate(own[None]).loss.mean()
            for tokens, own in zip(texts, patterns, strict=True)
        ]
    )


def point(
    model: LlamaForCausalLM, choices: Choices, texts: Tensor, draws: list[Tensor]
) -> dict[str, Any]:
    """Both losses of each text under patterns (N, T, L), and the share of big FFNs.

    Of several draws the mean.
    """
    both = [(executed(model, choices, texts, p), in_context(model, texts, p)) for p in draws]
    return {
        "share": round(float(torch.stack(draws).eq(FFN_BIG).float().mean()), 5),
        "text_losses": rounded(torch.stack([losses for losses, _ in both]).mean(0)),
        "context_losses": rounded(torch.stack([losses for _, losses in both]).mean(0)),
    }


def random_patterns(shape: tuple[int, int, int], n_big: int, rng: torch.Generator) -> Tensor:
    """(N, T, L) with so many big FFNs for each token, all such patterns as likely."""
    order = torch.rand(shape, generator=rng).argsort(-1)
    return torch.where(order < n_big, FFN_BIG, FFN_SMALL)


def shuffled(patterns: Tensor, rng: torch.Generator) -> Tensor:
    """Patterns (N, T, L) given to other tokens of the same text."""
    order = torch.rand(patterns.shape[:2], generator=rng).argsort(-1)
    return patterns.gather(1, order[..., None].expand_as(patterns))
