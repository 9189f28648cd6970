"""A preview of the LM head: what all words score, roughly, so that few need be computed exactly.

With the head's rows w and its input x the logits w x of V words are V D products. States of a model
lie near a space of few dimensions, as far as its words tell them apart: with k directions

    x ~ up (down x),     w x ~ (w up) (down x)

takes k D + k V products. The best m words by that are then computed exactly, m D products, and all
others keep what the preview says. (SVD-softmax, Shim, Lee, Choi, Boo and Sung, NIPS 2017: there the
directions are those of the head alone, here those of the logits that a model's own states have.)

`calibration.preview` finds the directions, GABA decides how many words are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.errors import VesicleError


class HeadPreview(nn.Module):
    """Directions by which the LM head of a model of width D is previewed.

    Attributes:
        down: (k, D), with what enters the head.
        up: (D, k), what the head's rows are multiplied with beforehand.
    """

    def __init__(self, rank: int, width: int) -> None:
        """All zero, for k = `rank` directions.

        Raises:
            ValueError: If `rank` is not between 1 and `width`.
        """
        super().__init__()
        if not 1 <= rank <= width:
            raise ValueError(f"rank of a head's preview is {rank}; allowed: 1 to {width}")
        self.down = nn.Parameter(torch.zeros(rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(width, rank), requires_grad=False)

    @property
    def rank(self) -> int:
        """K, the number of directions."""
        return int(self.down.shape[0])

    def check(self, width: int) -> None:
        """Refuse to preview the head of a model of another width.

        Raises:
            VesicleError: With both widths.
        """
        if self.down.shape[1] != width:
            raise VesicleError(
                f"a preview of the LM head has width {self.down.shape[1]}; this model has {width}"
            )

    def words(self, head: Tensor) -> Tensor:
        """(n, k) what some of the head's rows (n, D) are multiplied as, in their own dtype."""
        return (head.float() @ self.up.to(head.device)).to(head.dtype)

    def scores(self, x: Tensor, words: Tensor) -> Tensor:
        """(..., V) previewed logits, without the head's bias, of x (..., D)."""
        low = nn.functional.linear(x, self.down.to(x.device, x.dtype))
        return nn.functional.linear(low, words)


def merged(previewed: Tensor, exact: Tensor, counts: NDArray[np.integer]) -> Tensor:
    """Logits (T, V): of each token as many as `counts` (T,) says are exact, the best by preview.

    Args:
        previewed: (T, V).
        exact: (T, V).
        counts: 0 for all.
    """
    result = exact.clone()
    for token in np.flatnonzero(counts):
        best = previewed[token].topk(min(int(counts[token]), exact.shape[-1])).indices
        result[token] = previewed[token].scatter(-1, best, exact[token, best])
    return result
