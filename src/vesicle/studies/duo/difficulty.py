"""How difficult tokens are: where, which, and what it goes with; and one text with its tokens.

Difficulty at a position is of the token that is predicted there, so frequency and class are that
token's. Each figure is told of each test text, or of each seed where texts are too short for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesicle.duo import (
    Context,
    Group,
    by_class,
    by_frequency,
    by_position,
    difficulty_of,
    entropy,
    spearman,
)
from vesicle.plan import FFN_BIG, FFN_SMALL
from vesicle.studies.duo.oracles import rounded
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import searched
from vesicle.studies.tokens import token_classes

GAINS, HARD = 0.01, 1.0
"""Nats from which on a token gains, and from which on it is missed by much."""
_PARTS = 10


def tell_difficulty(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Difficulty of the tokens of test texts; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    tokens, oracles = run.split("test"), searched(run, "test").oracles
    difficulty = torch.stack([difficulty_of(o) for o in oracles])  # (N, T)
    drawn = torch.stack([difficulty_of(o) for o in searched(run, "drawn").oracles])
    small = torch.stack([o.small for o in oracles])
    big = torch.stack([o.labelled.loss[:, -1] for o in oracles])
    targets, tokenizer = tokens[:, 1:], run.corpus.tokenizer
    names = [token_classes(tokenizer, ids.tolist())[1:] for ids in tokens]
    flat = [name for own in names for name in own]
    n_parts = min(_PARTS, tokens.shape[1] - 1)
    return {
        "means": rounded(difficulty.mean(1)),
        "drawn_means": rounded(drawn.mean(1)),
        "idle": rounded((difficulty < GAINS).float().mean(1)),
        "idle_if_hard": [
            _share(d < GAINS, s > HARD) for d, s in zip(difficulty, small, strict=True)
        ],
        "idle_without_choice": rounded((small - big < GAINS).float().mean(1)),
        "by_position": [told_groups(by_position(d[None], n_parts)) for d in difficulty],
        "small_by_position": [told_groups(by_position(s[None], n_parts)) for s in small],
        "by_frequency": told_groups(by_frequency(difficulty, targets, run.split("train"))),
        "by_class": told_groups(by_class(difficulty.flatten(), flat)),
        "small_by_class": told_groups(by_class(small.flatten(), flat)),
        "correlations": _correlations(run, tokens, difficulty, small, big),
        "drawn": {
            "pieces": [tokenizer.decode([i], skip_special_tokens=False) for i in targets[0]],
            "difficulty": rounded(difficulty[0]),
        },
    }


def _correlations(
    run: Run, tokens: Tensor, difficulty: Tensor, small: Tensor, big: Tensor
) -> dict[str, float]:
    """Of ranks, over all tokens."""
    model, _ = run.trained()
    n_layers = run.size.n_layers
    contexts = [Context(model, own) for own in tokens]
    entropies = {
        name: torch.stack([entropy(c.logits(torch.full((n_layers,), n))) for c in contexts])
        for name, n in (("entropy, all small", FFN_SMALL), ("entropy, all big", FFN_BIG))
    }
    others = {"loss, all small": small, "loss, all big": big, **entropies}
    others["gain of all big"] = small - big
    return {
        name: round(spearman(difficulty.flatten(), values.flatten()), 4)
        for name, values in others.items()
    }


def _share(marked: Tensor, among: Tensor) -> float | None:
    """Share of the tokens `among` that are marked; None where there are none."""
    n = int(among.sum())
    return round(int((marked & among).sum()) / n, 5) if n else None


def told_groups(groups: list[Group]) -> list[dict[str, Any]]:
    """Groups that have tokens, as JSON."""
    return [
        {"name": g.name, "tokens": g.n_tokens, "mean": round(g.mean, 5)}
        for g in groups
        if g.n_tokens
    ]
