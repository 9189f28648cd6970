"""A sparse autoencoder of vectors: the k largest of many features rebuild each of them.

    z = the k largest of relu((x / s - b) A), the others 0;     x' = s (z B + b)

with s the root mean square of the vectors that it is trained on (Makhzani and Frey 2013; Gao et al.
2024). So the number of active features is set, and no penalty shrinks them. Trained by
|x - x'|² / |x - mean|², the share of the variance that is missed.

Not reproduced: Gao et al.'s auxiliary loss for features that are never active, and their sizes; the
gated and annealed ones of Karvonen et al. (2024).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.errors import DataError
from vesicle.scratch import Recipe, fit


class Autoencoder(nn.Module):
    """As above.

    Attributes:
        encoder: (D, F).
        decoder: (F, D); at first the encoder's transpose, rows of length 1.
        bias: (D,).
        scale: s, a buffer.
        n_active: k.
    """

    scale: Tensor

    def __init__(self, width: int, n_features: int, n_active: int, seed: int = 0) -> None:
        """Random directions.

        Raises:
            ValueError: A size is out of range.
        """
        super().__init__()
        if not 1 <= n_active <= n_features or width < 1:
            raise ValueError(
                f"n_active is {n_active} of {n_features} features, width {width}; allowed: 1 to "
                "the number of features, and a width of 1 and above"
            )
        directions = torch.randn(n_features, width, generator=torch.Generator().manual_seed(seed))
        directions = directions / directions.norm(dim=1, keepdim=True)
        self.decoder = nn.Parameter(directions)
        self.encoder = nn.Parameter(directions.T.clone())
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.n_active = n_active

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.decoder)

    def encode(self, x: Tensor) -> Tensor:
        """(..., F) features of x (..., D)."""
        inner = nn.functional.relu((x / self.scale - self.bias) @ self.encoder)
        top = inner.topk(self.n_active, dim=-1)
        return torch.zeros_like(inner).scatter(-1, top.indices, top.values)

    def decode(self, features: Tensor) -> Tensor:
        """(..., D) of features (..., F)."""
        return self.scale * (features @ self.decoder + self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x (..., D)."""
        return self.decode(self.encode(x))


def missed(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """Share of the variance of x (N, D) that the reconstruction misses; 0 is perfect."""
    variance = (x - x.mean(0)).square().sum().clamp_min(1e-12)
    return (x - autoencoder(x)).square().sum() / variance


def fit_autoencoder(
    autoencoder: Autoencoder,
    x: Tensor,
    recipe: Recipe,
    folder: Path,
    *,
    batch: int,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    show: Callable[[int, float], None] | None = None,
) -> float:
    """Train it in place, or take up what `folder` holds of the same run.

    Args:
        autoencoder: A new one.
        x: (N, D) vectors.
        recipe: How; its weight decay should be 0.
        folder: Of this run alone.
        batch: Vectors of a step.
        seed: Of their order.
        facts: What the vectors depend on (JSON); another run is refused.
        show: Told the step that is done and its loss.

    Returns:
        The share of the variance missed on the last tenth of the vectors, which it did not see.

    Raises:
        DataError: There are fewer than ten vectors.
        VesicleError: As `scratch.fit`.
    """
    if len(x) < 10:
        raise DataError(
            f"there are {len(x)} vectors to train an autoencoder on; allowed: 10 and up"
        )
    known, other = x[: -(len(x) // 10)], x[-(len(x) // 10) :]
    with torch.no_grad():
        autoencoder.scale.copy_(known.square().mean().sqrt())
        autoencoder.bias.copy_((known / autoencoder.scale).mean(0))

    def loss_at(step: int) -> Tensor:
        rows = np.random.default_rng((seed, step)).integers(0, len(known), batch)
        return missed(autoencoder, known[torch.from_numpy(rows)])

    fit(autoencoder, loss_at, recipe, folder, facts=facts, show=show)
    with torch.no_grad():
        return float(missed(autoencoder, other))
