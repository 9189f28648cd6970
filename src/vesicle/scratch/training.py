"""Training a small model from scratch: AdamW, warm-up and cosine, checkpoints, resumable.

The batch of a step is a function of (seed, step), so a run that was killed goes on where its newest
checkpoint was and ends with the same weights. A finished run is never repeated: its folder holds
`model.safetensors` and `run.json`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint

_MODEL, _RUN, _CHECKPOINTS = "model.safetensors", "run.json", "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At its highest, after the warm-up.
        warmup: Share of the steps in which it rises; then it falls as a cosine to a tenth.
        weight_decay: Of matrices.
        clip: Largest norm of a gradient.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Check that there are steps.

        Raises:
            ValueError: There are none.
        """
        if self.steps < 1 or self.checkpoint_every < 1:
            raise ValueError(
                f"steps is {self.steps}, checkpoint_every {self.checkpoint_every}; "
                "allowed: 1 and above"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0 on."""
        rising = max(1.0, self.warmup * self.steps)
        if step + 1 < rising:
            return self.learning_rate * (step + 1) / rising
        place = (step + 1 - rising) / max(1.0, self.steps - rising)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * place)) / 2)


def draw(n_items: int, batch: int, step: int, seed: int) -> list[int]:
    """Which items a step takes: a new order for each pass over all of them."""
    chosen = []
    for k in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(k, n_items)
        order = np.random.default_rng((seed, epoch)).permutation(n_items)
        chosen.append(int(order[place]))
    return chosen


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
    *,
    facts: dict[str, Any] | None = None,
    show: Callable[[int, float], None] | None = None,
    faster: Callable[[str], float] | None = None,
) -> list[float]:
    """Train a model in place, or take up what `folder` holds of the same run.

    Args:
        model: What to train.
        loss_at: Loss of the model on the batch of a step.
        recipe: How.
        folder: Of this run alone.
        facts: What the run depends on beside the recipe (JSON); another run is refused.
        show: Told the step that is done and its loss.
        faster: How many times the learning rate a parameter has, by its name; once if not given.
            Those that have more have no weight decay.

    Returns:
        The loss of every step.

    Raises:
        VesicleError: The folder holds another run, cannot be written, or the loss is not finite.
    """
    from safetensors.torch import load_file, save_file

    # As JSON has them: tuples are lists there.
    whole = json.loads(json.dumps({"recipe": asdict(recipe), **(facts or {})}))
    done = folder / _RUN
    if done.exists():
        record = read_json(done)
        _check(folder, record["facts"], whole)
        model.load_state_dict(load_file(folder / _MODEL), strict=False)
        return list(record["losses"])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        _groups(named, recipe.weight_decay, faster), betas=(0.9, 0.95), foreach=True
    )
    losses: list[float] = []
    checkpoint = newest_checkpoint(folder / _CHECKPOINTS)
    if checkpoint is not None:
        _check(folder, checkpoint.facts["facts"], whole)
        losses = list(checkpoint.facts["losses"])
        _restore(named, optimizer, checkpoint)
    model.train()
    for step in range(len(losses), recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step) * group["times"]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(named.values()), recipe.clip)
        if not math.isfinite(norm.item()):
            raise VesicleError(f"step {step + 1}: the gradient is not finite; lower learning_rate")
        optimizer.step()
        losses.append(round(loss.item(), 5))
        if show is not None:
            show(step + 1, losses[-1])
        if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
            _keep(folder, named, optimizer, losses, whole)
    model.eval()
    with atomic_path(folder / _MODEL) as part:
        save_file({name: p.detach().contiguous() for name, p in named.items()}, part)
    # Last, so that a run that has it has everything.
    write_json(done, {"facts": whole, "losses": losses}, indent=None)
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    return losses


def _groups(
    named: dict[str, nn.Parameter], decay: float, faster: Callable[[str], float] | None
) -> list[dict[str, Any]]:
    """Parameters that share a learning rate and a weight decay, which vectors do not have.

    Nor have those that learn faster: they are few, and would be pulled to 0 as much faster.
    """
    found = dict[tuple[float, float], list[nn.Parameter]]()
    for name, parameter in named.items():
        times = 1.0 if faster is None else faster(name)
        own = decay if parameter.dim() > 1 and times == 1 else 0.0
        found.setdefault((times, own), []).append(parameter)
    return [
        {"params": those, "weight_decay": own, "times": times}
        for (times, own), those in found.items()
    ]


def _keep(
    folder: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    facts: dict[str, Any],
) -> None:
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in named.items()}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam.{key}.{name}"] = value
    save_checkpoint(
        folder / _CHECKPOINTS,
        Checkpoint(step=len(losses), tensors=tensors, facts={"facts": facts, "losses": losses}),
    )


def _restore(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    with torch.no_grad():
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                named[rest].copy_(tensor)
            else:
                key, _, owner = rest.partition(".")
                optimizer.state[named[owner]][key] = tensor


def _check(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise VesicleError(
                f"{folder} holds a run with another {name}: use another folder, or remove it"
            )
