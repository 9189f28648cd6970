"""What of an oracle's choices can be known: probes that predict them, layer by layer.

A probe is told of a token either nothing (how often the layer is big), its FFN's normed input in a
pass that is all big, that and the embedding of the true next token, or that and what the same
oracle chose in earlier layers. So the first says what a router could know, the second what it would
know if it saw the future, and the third how much is only the count of what is already spent; but an
oracle that reads the label also tells of it by its earlier choices.

What a probe gains is the fall of the log loss below that of nothing, on test texts, in nats a
choice: at most what the input tells of the choice, for other probes might find more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vesicle.duo import Choices
from vesicle.plan import FFN_BIG
from vesicle.studies.duo.oracles import rounded
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import searched

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

INPUTS = ("input", "input and next token", "input and earlier choices")
_HIDDEN, _RATE, _DECAY = 32, 1e-2, 1e-2
_LOOK_EVERY = 5
_HELD = 4
"""One text in so many says when a probe stops learning."""
Predict = Callable[[Tensor], Tensor]


def probe_choices(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    oracle: str,
    budget: int,
) -> dict[str, Any]:
    """Probes of one oracle at one number of big FFNs; a job.

    Args:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder and of the probes' weights.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        oracle: `labelled` or `unlabelled`.
        budget: Number of big FFNs.
    """
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    model, choices = run.trained()
    sides = []
    for split in ("labels", "test"):
        tokens = run.split(split)
        big = searched(run, split).patterns(oracle, budget).eq(FFN_BIG).float()  # (N, T, L)
        told = {name: _told(model, choices, tokens, big, name) for name in INPUTS}
        sides.append((told, big.permute(2, 0, 1)))
    (told, right), (test_told, test_right) = sides
    known = right.mean((1, 2)).clamp(1e-4, 1 - 1e-4).logit()[:, None, None]
    nothing = _log_loss(known.expand_as(test_right), test_right)  # (L, N)
    rows = []
    for name in INPUTS:
        predict = fit_probe(told[name], right, run.size.probe_steps, run.seed)
        logits = predict(test_told[name])
        gain = nothing - _log_loss(logits, test_right)
        rows.append(
            {
                "inputs": name,
                "gains": rounded(gain.mean(0)),
                "gain_by_layer": rounded(gain.mean(1)),
                "accuracies": rounded(_accuracy(logits, test_right)),
            }
        )
    return {
        "oracle": oracle,
        "budget": budget,
        "nothing": {
            "log_losses": rounded(nothing.mean(0)),
            "accuracies": rounded(_accuracy(known.expand_as(test_right), test_right)),
        },
        "rows": rows,
    }


def fit_probe(told: Tensor, right: Tensor, steps: int, seed: int) -> Predict:
    """An MLP for each of L layers, fitted with AdamW on all texts at once.

    It begins as the frequency of its layer, and is kept as it was when it predicted the last texts
    best, which it does not learn from.

    Args:
        told: (L, N, T, I).
        right: (L, N, T) 1 where the FFN is big.
        steps: Of the optimizer.
        seed: Of the first weights.

    Returns:
        From (L, N, T, I) to logits (L, N, T) of big.
    """
    n_held = max(1, told.shape[1] // _HELD)
    own, wanted = told[:, :-n_held], right[:, :-n_held]
    centre = own.mean((1, 2), keepdim=True)
    spread = own.std((1, 2), keepdim=True).clamp_min(1e-6)
    weights = _first(told.shape[0], told.shape[-1], wanted, seed)
    best = [w.detach().clone() for w in weights]
    least = torch.full((len(told),), torch.inf)
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    for step in range(steps + 1):
        if step % _LOOK_EVERY == 0 or step == steps:
            with torch.no_grad():
                logits = _mlp(weights, (told[:, -n_held:] - centre) / spread)
                now = _log_loss(logits, right[:, -n_held:]).mean(1)
                for kept, weight in zip(best, weights, strict=True):
                    kept[now < least] = weight[now < least]
                least = torch.minimum(least, now)
        optimizer.zero_grad()
        logits = _mlp(weights, (own - centre) / spread)
        # Summed over layers, whose probes share nothing.
        binary_cross_entropy_with_logits(logits, wanted).mul(len(told)).backward()
        optimizer.step()
    return lambda given: _mlp(best, (given - centre) / spread)


def _first(n_layers: int, n_inputs: int, right: Tensor, seed: int) -> list[Tensor]:
    """Weights and biases whose output is the frequency, whatever the input."""
    rng = torch.Generator().manual_seed(seed)
    inner = torch.randn(n_layers, n_inputs, _HIDDEN, generator=rng) * n_inputs**-0.5
    known = right.mean((1, 2)).clamp(1e-4, 1 - 1e-4).logit()
    made = [
        inner,
        torch.zeros(n_layers, 1, _HIDDEN),
        torch.zeros(n_layers, _HIDDEN, 1),
        known[:, None, None],
    ]
    return [weight.clone().requires_grad_() for weight in made]


def _mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    """(L, N, T) logits of x (L, N, T, I)."""
    inner, inner_bias, outer, outer_bias = weights
    hidden = torch.baddbmm(inner_bias, x.flatten(1, 2), inner)
    return torch.baddbmm(outer_bias, torch.nn.functional.gelu(hidden), outer).view(x.shape[:-1])


def _log_loss(logits: Tensor, right: Tensor) -> Tensor:
    """(L, N) nats a choice, of (L, N, T)."""
    return binary_cross_entropy_with_logits(logits, right, reduction="none").mean(-1)


def _accuracy(logits: Tensor, right: Tensor) -> Tensor:
    """(N,) shares of choices that are told right, of (L, N, T)."""
    return (logits > 0).eq(right > 0.5).float().mean((0, 2))


@torch.no_grad()
def _told(
    model: LlamaForCausalLM, choices: Choices, tokens: Tensor, big: Tensor, name: str
) -> Tensor:
    """(L, N, T, I) what probes of each layer are told of tokens (N, T + 1), choices (N, T, L)."""
    seen = list[Tensor]()

    def watch(layer: int, x: Tensor) -> Tensor:
        seen.append(x)
        return torch.full(x.shape[:-1], FFN_BIG)

    with choices.by(watch):
        model.model(tokens[:, :-1])
    inputs = torch.stack(seen)
    if name == "input":
        return inputs
    if name == "input and next token":
        after = model.model.embed_tokens(tokens[:, 1:])
        return torch.cat([inputs, after.expand_as(inputs)], dim=-1)
    layers = torch.arange(len(inputs))
    earlier = (layers < layers[:, None])[:, None, None]  # (L, 1, 1, L): before the layer asked
    return torch.cat([inputs, big[None] * earlier], dim=-1)
