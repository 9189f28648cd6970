"""The likeliest token without reading all of the LM head: a screen with a proven bound.

An 8-bit head has two planes of nibbles. Scores by the leading plane alone, s(row), differ from the
exact ones by e(row) x, where e is what the trailing nibbles are worth beside their middle and x the
head's input, rounded as the kernels round it. With a few directions d along which inputs are large,
x = sum_d (d x) d + rest, so that

    e x = sum_d (e d) (d x) + e rest,    |e rest| <= |e| |rest|.

The products e d are stored and known; the norms |e| bound what is left. Rows whose bound does not
come up to the exact score of the best screened one cannot be the likeliest. All others are read
whole, in the arithmetic of the whole head, so the token is the same one, not probably the same.

Any directions give a right bound; those that the states of this very model have most of give a
tight one. They come from the first states that are seen (principal directions, uncentred, Golub and
Van Loan, Matrix Computations, 8.6), without any data of their own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vesicle.engine import core
from vesicle.engine.packed import HEAD_TILE, PackedHead

LEAST_ROWS = 8192
"""Of a head that is worth a screen."""
DIRECTIONS = 16
_LEAST_STATES, _MOST_STATES = 64, 512
_ITERATIONS = 6
_AFTER = 8
"""Tokens of which the likeliest was asked before it is built: a single one is not worth it."""
_ROUNDING = 2.0**-13
"""Bound of what fp32 sums of a row's products round by, as a share of both norms, several times."""


class HeadScreen:
    """What bounds a head's scores.

    Attributes:
        structure: What the core is handed; it lives as long as this.
        bytes_held: Of products and norms.
    """

    def __init__(self, head: PackedHead, states: Tensor) -> None:
        """Find directions in states (n, D) fp32, as they enter the head, and price its rows.

        Raises:
            ValueError: If the head has no trailing plane.
        """
        if head.trailing is None:
            raise ValueError("the head has 4 bits; allowed: 8")
        k = min(DIRECTIONS, *states.shape)
        self._directions = _principal(states, k)
        tiles = -(-head.n_out // HEAD_TILE)
        self._products = torch.empty(tiles, k, HEAD_TILE, dtype=torch.float16)
        self._norms = torch.empty(tiles, HEAD_TILE)
        library = core.load()
        assert library is not None
        widest = library.vesicle_screen(
            ctypes.byref(core.describe(head)),
            self._directions.data_ptr(),
            k,
            self._products.data_ptr(),
            self._norms.data_ptr(),
            core.threads(),
        )
        self.structure = core.Screen(
            directions=self._directions.data_ptr(),
            products=self._products.data_ptr(),
            norms=self._norms.data_ptr(),
            k=k,
            slack=widest * _ROUNDING,
        )
        self.bytes_held = self._products.nbytes + self._norms.nbytes


class States:
    """Collects what enters the head, for a first screen and then for a better one."""

    def __init__(self) -> None:
        """None yet."""
        self._found: list[Tensor] = []
        self._passes = self._used = 0

    def add(self, states: Tensor) -> None:
        """Take states (n, D) of one pass; those with numbers that are not finite are left out."""
        self._found.append(states[states.isfinite().all(-1)])
        self._passes += 1

    def news(self) -> Tensor | None:
        """All of them (n, D), where a screen is to be built from them now; else None."""
        n = sum(map(len, self._found))
        if self._passes < _AFTER or n < (_MOST_STATES if self._used else _LEAST_STATES):
            return None
        self._used = n
        return torch.cat(self._found)

    @property
    def complete(self) -> bool:
        """Whether more would change little."""
        return self._used >= _MOST_STATES


def _principal(states: Tensor, k: int) -> Tensor:
    """(k, D) orthonormal directions along which states (n, D) are largest, by block iteration."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(states.shape[1], k, generator=generator)
    for _ in range(_ITERATIONS):
        directions = torch.linalg.qr(states.t() @ (states @ directions)).Q
    return directions.t().contiguous()
