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
from collections.abc import Iterable

import torch
from torch import Tensor

from vesicle.engine import core
from vesicle.engine.encoding import groups_of
from vesicle.engine.packed import HEAD_TILE, PackedHead

LEAST_ROWS = 8192
"""Of a head that is worth a screen."""
DIRECTIONS = 16
_LEAST_STATES, _MOST_STATES = 64, 256
_ITERATIONS = 6
_AFTER = 8
"""Tokens of which the likeliest was asked before it is built: a single one is not worth it."""
_ROUNDING = 2.0**-13
"""Least bound of what fp32 sums of a row's products round by, as a share of both norms.

Sums of 32 products are exact; each group of them adds 2^-23 at most, here eight times as much.
"""


class HeadScreen:
    """What bounds a head's scores.

    Attributes:
        directions: (k, D) fp32, orthonormal.
        structure: What the core is handed; it lives as long as this.
    """

    def __init__(self, head: PackedHead, states: Tensor) -> None:
        """Find directions in states (n, D) fp32, as they enter the head, and price its rows.

        Raises:
            ValueError: If the head has no trailing plane.
        """
        if head.trailing is None:
            raise ValueError("the head has 4 bits; allowed: 8")
        k = min(DIRECTIONS, *states.shape)
        self.directions = _principal(states, k)
        tiles = -(-head.n_out // HEAD_TILE)
        self._products = torch.empty(tiles, k, HEAD_TILE, dtype=torch.float16)
        self._norms = torch.empty(tiles, HEAD_TILE)
        biggest = 0.0 if head.bias is None else float(head.bias.abs().max())
        library = core.load()
        assert library is not None
        widest = library.vesicle_screen(
            ctypes.byref(core.describe(head)),
            self.directions.data_ptr(),
            k,
            self._products.data_ptr(),
            self._norms.data_ptr(),
            core.threads(),
        )
        self.structure = core.Screen(
            directions=self.directions.data_ptr(),
            products=self._products.data_ptr(),
            norms=self._norms.data_ptr(),
            k=k,
            # fp16 rounds what is next to nothing by 2^-25.
            slack=widest * max(_ROUNDING, groups_of(head.n_in) * 2.0**-20) + 2.0**-22,
            offset=(k + 8) * 2.0**-23 * biggest,
        )
        self._rows = head.n_out

    @property
    def products(self) -> Tensor:
        """(V, k) fp16: what the trailing nibbles of a row are worth, times each direction."""
        return self._products.transpose(1, 2).flatten(0, 1)[: self._rows]

    @property
    def norms(self) -> Tensor:
        """(V,) fp32, of what the trailing nibbles of a row are worth."""
        return self._norms.flatten()[: self._rows]

    @property
    def bytes_held(self) -> int:
        """Of products and norms."""
        return self._products.nbytes + self._norms.nbytes


class Screening:
    """A head's screen: built from the first states that enter the head, and again from many more.

    Attributes:
        learns: Whether states are still of use.
        screen: The latest; None before the first.
    """

    def __init__(self, head: Tensor | PackedHead, width: int) -> None:
        """Of a head (V, width); one that is dense, has 4 bits or few rows never gets a screen."""
        rows = head.n_out if isinstance(head, PackedHead) else head.shape[0]
        packed = isinstance(head, PackedHead) and head.bits == 8 and rows >= LEAST_ROWS
        self._head = head if packed else None
        self.learns = packed
        self.screen: HeadScreen | None = None
        # (n, D) states so far; not tensor by tensor, which would take longer than the screen saves.
        with torch.inference_mode(False):  # so that it may be written inside and outside of it
            self._states = torch.empty(_MOST_STATES if packed else 0, width)
        self._kept: list[HeadScreen] = []  # the core may still point to the one before
        self._passes = self._held = self._rows = self._tokens = 0
        self._vocabulary = rows

    @property
    def share(self) -> float | None:
        """Mean share of a head's rows read whole, per likeliest token; None before the first.

        Without a screen it is 1.
        """
        return self._rows / self._tokens / self._vocabulary if self._tokens else None

    @property
    def read(self) -> tuple[int, int]:
        """Rows read whole, and tokens, so far."""
        return self._rows, self._tokens

    def count(self, rows: Iterable[int]) -> None:
        """Note how many rows were read whole for each token."""
        for n in rows:
            self._rows += n
            self._tokens += 1

    def learn(self, states: Tensor) -> int | None:
        """Take the states (n, D) of one pass; numbers that are not finite are left out.

        Returns:
            Address of the latest screen's structure.
        """
        new = states[states.isfinite().all(-1)][: _MOST_STATES - self._held]
        self._states[self._held : self._held + len(new)] = new
        self._held += len(new)
        self._passes += 1
        least = _LEAST_STATES if self.screen is None else _MOST_STATES
        if self._passes >= _AFTER and self._held >= least and isinstance(self._head, PackedHead):
            self.learns = self._held < _MOST_STATES
            try:
                self._kept.append(HeadScreen(self._head, self._states[: self._held]))
                self.screen = self._kept[-1]
            except (RuntimeError, MemoryError):  # it only saves time: nothing depends on it
                self.learns = False
            if not self.learns:
                self._states = torch.empty(0, 0)
        return None if self.screen is None else ctypes.addressof(self.screen.structure)


def _principal(states: Tensor, k: int) -> Tensor:
    """(k, D) orthonormal directions along which states (n, D) are largest, by block iteration."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(states.shape[1], k, generator=generator)
    for _ in range(_ITERATIONS):
        directions = torch.linalg.qr(states.t() @ (states @ directions)).Q
    return directions.t().contiguous()
