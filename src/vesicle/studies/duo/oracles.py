"""Stage 2, what the oracle gains: losses by number of big FFNs beside chance, text by text.

A fixed pattern is one for all tokens and texts. It is chosen on validation texts, out of all or out
of 100 drawn at random, and so are all numbers and patterns that the report judges by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesicle.duo import THREE, TWO, Oracle, all_patterns
from vesicle.plan import FFN_BIG
from vesicle.studies.duo.run import Run
from vesicle.studies.duo.searched import TRIES, searched

DRAWN = 100
"""Random patterns of which a fixed one is chosen."""


def judge_oracles(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    n_choices: int,
) -> dict[str, Any]:
    """Mean losses of each test text, in nats, by number of big FFNs; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    test, drawn_test, valid = (
        searched(run, split, n_choices).oracles for split in ("test", "drawn", "valid")
    )
    patterns = all_patterns(TWO if n_choices == 2 else THREE, run.size.n_layers)
    on_valid = torch.stack([o.pattern_loss for o in valid]).mean(0)
    fixed, drawn = best_fixed(patterns, on_valid), best_drawn(patterns, on_valid, seed)
    on_test = torch.stack([o.pattern_loss for o in test])  # (N, P)
    return {
        "n_choices": n_choices,
        "curves": {
            **_curves(test),
            "drawn": rounded(torch.stack([o.labelled.loss.mean(0) for o in drawn_test])),
            "fixed": rounded(on_test[:, fixed]),
            f"fixed of {DRAWN}": rounded(on_test[:, drawn]),
        },
        "divergence": {
            name: rounded(torch.stack([getattr(o, name).divergence.mean(0) for o in test]))
            for name in ("labelled", "unlabelled")
        },
        "any_number": rounded(torch.stack([o.labelled.loss.min(1).values.mean() for o in test])),
        "valid_labelled": rounded(torch.stack([o.labelled.loss.mean(0) for o in valid]).mean(0)),
        "fixed_patterns": patterns[fixed].tolist(),
        "layers": {
            name: rounded(torch.stack([_layers(getattr(o, name).patterns) for o in test]))
            for name in ("labelled", "unlabelled")
        },
        "best_layer": [_best_single(patterns, losses) for losses in on_test],
    }


def best_fixed(patterns: Tensor, losses: Tensor) -> list[int]:
    """Of patterns (P, L) with losses (P,), the best for each number of big FFNs."""
    n_big = (patterns == FFN_BIG).sum(-1)
    return [
        int(losses.masked_fill(n_big != k, torch.inf).argmin())
        for k in range(patterns.shape[1] + 1)
    ]


def best_drawn(patterns: Tensor, losses: Tensor, seed: int) -> list[int]:
    """The best of patterns drawn with replacement, for each number of big FFNs."""
    rng = torch.Generator().manual_seed(seed)
    n_big, found = (patterns == FFN_BIG).sum(-1), []
    for k in range(patterns.shape[1] + 1):
        group = (n_big == k).nonzero()[:, 0]
        drawn = group[torch.randint(len(group), (DRAWN,), generator=rng)]
        found.append(int(drawn[losses[drawn].argmin()]))
    return found


def rounded(values: Tensor) -> Any:
    """As lists, to a hundred-thousandth."""
    return _five(values.tolist())


def _five(value: Any) -> Any:
    return [_five(v) for v in value] if isinstance(value, list) else round(value, 5)


def _curves(oracles: tuple[Oracle, ...]) -> dict[str, Any]:
    """(N, K) each."""
    found = {
        name: torch.stack([getattr(o, name).loss.mean(0) for o in oracles])
        for name in ("labelled", "unlabelled")
    }
    for n in TRIES:
        found[f"random {n}"] = torch.stack([o.random[n].mean(0) for o in oracles])
    return {name: rounded(values) for name, values in found.items()}


def _layers(patterns: Tensor) -> Tensor:
    """(K, L) shares of tokens whose FFN is big, of patterns (T, K, L)."""
    return (patterns == FFN_BIG).float().mean(0)


def _best_single(patterns: Tensor, losses: Tensor) -> int:
    """The layer whose FFN, big alone and for every token, gives a text its least loss."""
    pattern = patterns[best_fixed(patterns, losses)[1]]
    return int((pattern == FFN_BIG).nonzero()[0, 0])
