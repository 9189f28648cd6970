"""What a decoder and its exits are trained for: good words at every layer, and exits that know.

After Schuster et al. 2022 (CALM, arXiv 2207.07061, section 3). An exit is the residual stream after
a layer's attention, as `EarlyExit` sees it; the model's own final norm and head read it. The whole
model is the last of L + 1 outputs. With CE_i the cross-entropy of output i = 1, ..., L + 1 and a_l
whether exit l names the same likeliest token as the whole model,

    loss = sum_i i CE_i / sum_i i  +  mean over l of BCE(c_l, a_l)              in nats

c_l is read from a state without gradient and a_l has none: the second term trains classifiers
alone, the first the model alone, and is a constant where the model is frozen.

Not reproduced: the paper trains classifiers after the model, which is then frozen, and its code has
agreeing and other tokens count alike. Here they count as they come: c_l is to be a probability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.checkpoint import checkpoint

from vesicle.predictors.early_exit import EarlyExit

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def early_exit_loss(
    model: LlamaForCausalLM,
    predictor: EarlyExit,
    ids: Tensor,
    scored: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of all exits and of the whole model, in one dense pass.

    Logits of one output are there at a time, of scored targets alone; going back computes them
    again.

    Args:
        model: The decoder, with no method attached.
        predictor: Its classifiers.
        ids: (B, T).
        scored: (B, T) which tokens are targets that count; the first of a text has nothing before
            it and never does.
        weights: (B, T - 1) or what broadcasts to it: how much each target weighs beside the others
            in cross-entropies; alike if not given.

    Returns:
        Scalar, fp32 or the predictor's dtype, whichever is finer.

    Raises:
        ValueError: If no target counts.
    """
    counted = scored[:, 1:]
    if not counted.any():
        raise ValueError("scored marks no target; allowed: one or more after the first token")
    wanted = ids[:, 1:][counted]  # (N,)
    weighs = torch.ones_like(counted, dtype=torch.float32) if weights is None else weights
    weighs = weighs.expand(counted.shape)[counted]
    weighs = weighs / weighs.sum()
    exits: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        exits.append(args[0][:, :-1][counted])  # (N, D)

    layers: list[Any] = list(model.model.layers)
    handles = [layer.post_attention_layernorm.register_forward_pre_hook(keep) for layer in layers]
    try:
        final = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][counted]
    finally:
        for handle in handles:
            handle.remove()

    def judge(normed: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the likeliest tokens (N,), of normed states (N, D)."""
        logits = model.lm_head(normed)
        each = cross_entropy(logits.float(), wanted, reduction="none")
        return (each * weighs).sum(), logits.argmax(-1)

    def judge_exit(state: Tensor) -> tuple[Tensor, Tensor]:
        return judge(model.model.norm(state))

    whole, likeliest = checkpoint(judge, final, use_reentrant=False)
    total = (len(exits) + 1) * whole
    missed = torch.zeros((), device=ids.device)
    for layer, state in enumerate(exits):
        loss, named = checkpoint(judge_exit, state, use_reentrant=False)
        total = total + (layer + 1) * loss
        z = predictor.confidence(layer, state.detach())
        missed = missed + binary_cross_entropy_with_logits(z, (named == likeliest).to(z.dtype))
    n = len(exits)
    return total / ((n + 1) * (n + 2) / 2) + missed / n
