"""A small network for addition modulo p, trained here until it does pairs that it has not seen.

    x = e(a) + e(b)        h = relu(W x + c)        logits = U h, less their mean

Its layers are embeddings x, hidden units h and logits. All training pairs are one batch. With
weight decay the network first knows those by heart, and then finds the rule (Power et al. 2022), by
sines and cosines (Nanda et al. 2023).

The paper trains a transformer of one layer. Here the sum of two embeddings stands for attention
that looks at both numbers alike, and trains in a minute; there are no positions and no residual
stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.neurons.basis.local_interaction import Section
from vesicle.scratch import Recipe, fit

LAYERS = ("embeddings", "hidden units", "logits")


@dataclass(frozen=True, kw_only=True)
class ModularConfig:
    """What is trained, and how.

    Attributes:
        modulus: p.
        width: Of embeddings and hidden units.
        steps: Optimizer steps, each on all training pairs.
        train_share: Of all pairs.
        learning_rate: At its highest.
        weight_decay: Without it nothing but the training pairs is learnt.
    """

    modulus: int = 113
    width: int = 128
    steps: int = 1500
    train_share: float = 0.4
    learning_rate: float = 3e-3
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            VesicleError: One is out of its range.
        """
        if not 3 <= self.modulus <= 499:
            raise VesicleError(f"modulus is {self.modulus}; allowed: 3 to 499")
        if not 1 <= self.width <= 1024:
            raise VesicleError(f"width is {self.width}; allowed: 1 to 1024")
        if self.steps < 1:
            raise VesicleError(f"steps is {self.steps}; allowed: 1 and above")
        if not 0 < self.train_share < 1:
            raise VesicleError(f"train_share is {self.train_share}; allowed: between 0 and 1")


class ModularAdder(nn.Module):
    """The network."""

    def __init__(self, modulus: int, width: int, seed: int) -> None:
        """With random weights.

        Args:
            modulus: p.
            width: Of embeddings and hidden units.
            seed: Of the weights; the state of torch's own generator is left as it was.
        """
        super().__init__()
        self.modulus = modulus
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(modulus, width)
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.hidden = nn.Linear(width, width)
            self.head = nn.Linear(width, modulus, bias=False)

    def embed(self, pairs: Tensor) -> Tensor:
        """(N, D) embeddings of pairs (N, 2)."""
        found: Tensor = self.embedding(pairs).sum(1)
        return found

    @property
    def sections(self) -> tuple[Section, ...]:
        """What lies between adjacent ones of `LAYERS`."""
        return self._units, self._logits

    def forward(self, pairs: Tensor) -> Tensor:
        """(N, p) logits of pairs (N, 2)."""
        return self._logits(self._units(self.embed(pairs)))

    def _units(self, x: Tensor) -> Tensor:
        found: Tensor = self.hidden(x).relu()
        return found

    def _logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.head(h)
        # Their mean changes no probability, and would count as a feature.
        return logits - logits.mean(-1, keepdim=True)


def all_pairs(modulus: int) -> Tensor:
    """(p², 2)."""
    numbers = torch.arange(modulus)
    return torch.cartesian_prod(numbers, numbers)


def sums(pairs: Tensor, modulus: int) -> Tensor:
    """(N,) of pairs (N, 2), modulo p."""
    return pairs.sum(1) % modulus


def accuracy(logits: Tensor, expected: Tensor) -> float:
    """Share of rows whose highest logit is the expected one."""
    return float((logits.argmax(-1) == expected).double().mean())


def trained_adder(
    config: ModularConfig,
    seed: int,
    folder: Path,
    show: Callable[[int, float], None] | None = None,
) -> tuple[ModularAdder, Tensor]:
    """Train the network, or take up what a folder holds of the same run.

    Args:
        config: What, and how.
        seed: Of weights and of which pairs it is trained on.
        folder: Of this run alone.
        show: Told the step that is done and its loss.

    Returns:
        The network, and the (n, 2) pairs that it was not trained on.

    Raises:
        VesicleError: The folder holds another run, or cannot be written.
    """
    pairs = all_pairs(config.modulus)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    n_train = max(1, int(config.train_share * len(pairs)))
    train, held_out = pairs[order[:n_train]], pairs[order[n_train:]]
    expected = sums(train, config.modulus)
    network = ModularAdder(config.modulus, config.width, seed)
    recipe = Recipe(
        steps=config.steps, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    fit(
        network,
        lambda _: nn.functional.cross_entropy(network(train), expected),
        recipe,
        folder,
        facts={"network": asdict(config), "seed": seed},
        show=show,
    )
    return network.requires_grad_(False).eval(), held_out
