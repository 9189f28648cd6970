"""A little tuning on translations, so that a model before and after it can be compared.

Each FFN and attention projection W of the model is tuned by a low-rank addition (Hu et al. 2022),

    W + B A,  A (r, in), B (out, r), B = 0 at first,

on sentences in one language followed by the same sentence in another; the loss is that of the
second. At the end W + B A takes the place of W. The paper tunes by preferences between answers to
mathematical questions (MAPO, DPO), with a translation model as the judge: that is not reproduced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vesicle.errors import DataError
from vesicle.families import find_family

Encode = Callable[[str], list[int]]
_RANK, _RATE, _PAIRS = 4, 1e-3, 4
_LENGTH = 96
"""Tokens of a pair at most."""
NAMES = {"eng_Latn": "English", "deu_Latn": "German", "fra_Latn": "French", "ces_Latn": "Czech"}


class _Addition(nn.Module):
    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(_RANK, into) / into**0.5)
        self.b = nn.Parameter(torch.zeros(out, _RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).to(weight)


def align(
    model: Any,
    encode: Encode,
    pairs: Sequence[dict[str, str]],
    steps: int,
    *,
    seed: int = 0,
    show: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """Tune a model in place.

    Args:
        model: A causal LM of a supported family.
        encode: Text to token ids, without special tokens.
        pairs: Sentences by language.
        steps: Of four pairs each.
        seed: Of what is drawn.
        show: Told how many steps are done.

    Returns:
        The loss of each step, nats a token.

    Raises:
        DataError: There are no steps.
    """
    if steps < 1:
        raise DataError(f"--align is {steps}; allowed: 1 and above")
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        family = find_family(model.config)
        tuned = [
            linear
            for layer in family.layers(model)
            for m in [family.modules(layer)]
            for linear in (*m.query_key_value, m.out, *m.ffn_in, m.ffn_out)
        ]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        additions = [_Addition(*linear.weight.shape) for linear in tuned]
    for linear, addition in zip(tuned, additions, strict=True):
        parametrize.register_parametrization(linear, "weight", addition)
    learnt = [parameter for addition in additions for parameter in addition.parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=_RATE, weight_decay=0.0)
    found = []
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _RATE * min(
                1.0, (step + 1) / 10, 2 * (1 - step / steps)
            )
            losses = []
            for _ in range(_PAIRS):
                ids, start = _pair(rng.choice(pairs), encode, rng)
                logits = model(ids, use_cache=False).logits[0, start - 1 : -1].float()
                loss = nn.functional.cross_entropy(logits, ids[0, start:])
                (loss / _PAIRS).backward()
                losses.append(float(loss.detach()))
            nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(losses) / _PAIRS)
            if show is not None:
                show(step + 1, steps, f"loss {found[-1]:.2f}")
    finally:
        for linear in tuned:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.requires_grad_(False)
    return found


def _pair(pair: dict[str, str], encode: Encode, rng: random.Random) -> tuple[Tensor, int]:
    """(1, T) a sentence and its translation, and where the latter begins."""
    first, second = rng.sample(sorted(pair), 2)
    before = encode(f"{NAMES[first]}: {pair[first]}\n{NAMES[second]}:")
    whole = [*before, *encode(f" {pair[second]}\n")][:_LENGTH]
    start = min(len(before), len(whole) - 1)
    return torch.tensor([whole]), start
