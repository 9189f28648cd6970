"""Stage 2, what takes long: the exhaustive search on the texts of a split, done once.

Of the split `drawn` each target is drawn from the all-big output there, in the true context. No
pattern can know more of it than that output, so what an oracle gains on such labels is luck alone.

All that later jobs need of it lies in `oracles/` of the study's folder; a file that was made of
other texts or sizes, or is lost, is made anew.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.duo import THREE, TWO, Best, Context, Oracle, oracle_of
from vesicle.files import atomic_path
from vesicle.plan import FFN_BIG
from vesicle.studies.duo.run import Run

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TRIES = (1, 10, 100)
"""N of the random patterns of which the best is taken."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Oracles of the N texts of a split.

    Attributes:
        oracles: (N,) of each text.
        seconds: That the search took.
    """

    oracles: tuple[Oracle, ...]
    seconds: float

    def patterns(self, oracle: str, n_big: int) -> Tensor:
        """(N, T, L) choices of the `labelled` or the `unlabelled` oracle."""
        return torch.stack([getattr(o, oracle).patterns[:, n_big] for o in self.oracles])


def search_split(
    out: Path,
    *,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    split: str,
    n_choices: int,
) -> dict[str, Any]:
    """Search the patterns of a split's texts; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    found = searched(run, split, n_choices)
    n_texts, n_tokens = len(found.oracles), len(found.oracles[0].small)
    return {
        "texts": n_texts,
        "tokens": n_texts * n_tokens,
        "patterns": n_choices**run.size.n_layers,
        "seconds": round(found.seconds, 2),
    }


def searched(run: Run, split: str, n_choices: int = 2) -> Searched:
    """What the search found, from its file if it is there.

    Args:
        run: The decoder.
        split: As `Run.split` has it.
        n_choices: 2, or 3 where FFNs may be skipped.
    """
    from safetensors import safe_open

    path = run.out / "oracles" / f"{split}-{n_choices}-{run.seed}.safetensors"
    asked = {"split": split, "n_texts": len(run.split(split)), "n_choices": n_choices}
    facts = json.dumps({**run.facts, **asked}, sort_keys=True)
    if path.exists():
        with safe_open(path, "pt") as file:
            kept = file.metadata()
            if kept["facts"] == facts:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return Searched(oracles=_unpacked(tensors), seconds=float(kept["seconds"]))
    return _search(run, split, n_choices, path, facts)


def _search(run: Run, split: str, n_choices: int, path: Path, facts: str) -> Searched:
    from safetensors.torch import save_file

    model, _ = run.trained()
    started = time.monotonic()
    allowed = TWO if n_choices == 2 else THREE
    rng = torch.Generator().manual_seed(run.seed)
    drawn = rng if split == "drawn" else None
    oracles = tuple(
        oracle_of(_context(model, tokens, drawn), allowed, TRIES) for tokens in run.split(split)
    )
    seconds = time.monotonic() - started
    with atomic_path(path) as part:
        save_file(_packed(oracles), part, {"facts": facts, "seconds": f"{seconds:.3f}"})
    return Searched(oracles=oracles, seconds=seconds)


def _context(model: LlamaForCausalLM, tokens: Tensor, drawn: torch.Generator | None) -> Context:
    """A text's context; its targets drawn from the all-big output, if there is a generator."""
    context = Context(model, tokens)
    if drawn is not None:
        shares = context.logits(torch.full((context.n_layers,), FFN_BIG)).softmax(-1)
        context.targets = torch.multinomial(shares, 1, generator=drawn)[:, 0]
    return context


def _packed(oracles: tuple[Oracle, ...]) -> dict[str, Tensor]:
    found = {
        "small": torch.stack([o.small for o in oracles]),
        "pattern_loss": torch.stack([o.pattern_loss for o in oracles]),
    }
    for n in TRIES:
        found[f"random.{n}"] = torch.stack([o.random[n] for o in oracles])
    for name in ("labelled", "unlabelled"):
        best = [getattr(o, name) for o in oracles]
        found[f"{name}.patterns"] = torch.stack([b.patterns for b in best]).to(torch.uint8)
        found[f"{name}.loss"] = torch.stack([b.loss for b in best])
        found[f"{name}.divergence"] = torch.stack([b.divergence for b in best])
    return found


def _unpacked(tensors: dict[str, Tensor]) -> tuple[Oracle, ...]:
    def best(name: str, i: int) -> Best:
        return Best(
            patterns=tensors[f"{name}.patterns"][i].long(),
            loss=tensors[f"{name}.loss"][i],
            divergence=tensors[f"{name}.divergence"][i],
        )

    return tuple(
        Oracle(
            labelled=best("labelled", i),
            unlabelled=best("unlabelled", i),
            random={n: tensors[f"random.{n}"][i] for n in TRIES},
            small=tensors["small"][i],
            pattern_loss=tensors["pattern_loss"][i],
        )
        for i in range(len(tensors["small"]))
    )
