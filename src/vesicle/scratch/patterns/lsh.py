"""Reformer's attention (Kitaev et al. 2020): a query reads the keys that hash as it does.

Hashes are those of the paper: the place of the largest of [xR, -xR] for a random rotation R, and a
query reads what falls together with it in any of several rounds; the newest positions besides. What
is not reproduced: queries and keys keep projections of their own, for equal parameters (both are
normalised before they are hashed), buckets are not cut into chunks of equal size, and layers are
not reversible. transformers' own Reformer has other layers altogether, so its numbers would compare
more than attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.scratch.patterns.base import Masked, asking, places


class Lsh(Masked):
    """What hashes alike, and the newest positions."""

    kind = "reformer"

    def __init__(self, n_buckets: int, rounds: int = 2, recent: int = 32, seed: int = 0) -> None:
        """The pattern.

        Args:
            n_buckets: Even.
            rounds: Of hashing.
            recent: Newest positions that are read in any case.
            seed: Of the rotations, which stay as they are.

        Raises:
            ValueError: If the number of buckets is odd.
        """
        super().__init__()
        if n_buckets < 2 or n_buckets % 2:
            raise ValueError(f"n_buckets is {n_buckets}; allowed: even numbers from 2 up")
        self.n_buckets, self.rounds, self.recent, self.seed = n_buckets, rounds, recent, seed

    def seen(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """(B, H, T, S)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rounds, query.shape[-1], self.n_buckets // 2)
        rotations = torch.randn(shape, generator=generator).to(query)
        group = query.shape[1] // key.shape[1]
        asked = self._buckets(query.detach(), rotations)
        held = self._buckets(key.detach(), rotations).repeat_interleave(group, 1)
        alike = (asked[..., :, None, :] == held[..., None, :, :]).any(-1)
        return alike | (places(key) > asking(query, key)[:, None] - self.recent)

    @staticmethod
    def _buckets(x: Tensor, rotations: Tensor) -> Tensor:
        """(B, H, T, rounds)."""
        turned = torch.einsum(
            "bhtk,rkn->bhtrn", torch.nn.functional.normalize(x, dim=-1), rotations
        )
        return torch.cat([turned, -turned], -1).argmax(-1)
