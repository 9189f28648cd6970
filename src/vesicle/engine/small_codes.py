"""Small FFNs in 4-bit codes: weights on a grid that bf16 holds exactly, and how it is found again.

A group of 32 input channels of an output has 16 values s (m + c), c = 0 to 15, with a scale s of
four significant bits and a whole m from -15 to 0. So |m + c| has four bits at most and every value
eight, which is what bf16 has: a modulator is saved in bf16 and nothing is lost. Beside packed
weights such an FFN is packed as they are; the reference computes with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from vesicle.activations import hidden_units
from vesicle.engine.encoding import GROUP, Grid, groups_of
from vesicle.engine.packed import PackedWeight
from vesicle.errors import VesicleError
from vesicle.plan import FULL_BITS
from vesicle.small_modules import SmallFfn

BITS = 4
_TOP = 2**BITS - 1
_LEAST = 2.0**-21
"""The least scale of four significant bits that fp16, in which packed weights have it, holds."""
Pairs = list[tuple[PackedWeight, PackedWeight]]


def _grouped(weight: Tensor) -> Tensor:
    """(out, groups, 32) of a weight (out, in), the last group filled up with its first member."""
    n_out, n_in = weight.shape
    groups = groups_of(n_in)
    filled = weight.new_zeros(n_out, groups * GROUP)
    filled[:, :n_in] = weight
    if n_in % GROUP:
        filled[:, n_in:] = weight[:, (groups - 1) * GROUP, None]
    return filled.view(n_out, groups, GROUP)


def _ranges(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest of each group, 0 among them."""
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def rounded(weight: Tensor) -> Tensor:
    """The nearest weights (out, in) on such grids."""
    grouped = _grouped(weight.detach().float())
    low, high = _ranges(grouped)
    # The scale is rounded up, so that 15 steps reach to within half of one of the far end.
    step = ((high - low) / _TOP).clamp_min(_LEAST)
    mantissa, exponent = torch.frexp(step)  # from 1/2 up to 1
    scale = torch.ldexp((mantissa * 16).ceil() / 16, exponent)
    first = (low / scale).round()
    codes = ((grouped / scale[..., None]).round() - first[..., None]).clamp(0, _TOP)
    back = (codes + first[..., None]) * scale[..., None]
    return back.flatten(1)[:, : weight.shape[1]].contiguous()


def grid_of(weight: Tensor) -> Grid:
    """The grid on which a weight (out, in) lies.

    Raises:
        VesicleError: It lies on none.
    """
    grouped = _grouped(weight.detach().float())
    low, high = _ranges(grouped)
    scale = torch.zeros_like(low)
    open_groups = torch.ones_like(low, dtype=torch.bool)
    for steps in range(_TOP, 0, -1):
        step = (high - low) / steps
        places = grouped / step[..., None].where(step[..., None] > 0, torch.ones(()))
        whole = ((places - places.round()).abs() < 1e-3).all(-1)
        exact = (step.half().float() == step) & (low.half().float() == low)
        taken = open_groups & whole & exact
        scale = torch.where(taken, step, scale)
        open_groups &= ~taken
        if not open_groups.any():
            return Grid(bits=BITS, scale=scale, low=low)
    raise VesicleError(
        "a small FFN is said to have 4-bit codes, and its weights do not lie on a grid of those; "
        "set its bits to None"
    )


@torch.no_grad()
def round_to_codes(small: SmallFfn) -> None:
    """Round the weights of small FFNs to such grids, in place."""
    for stack in (small.ffn_in, small.ffn_out):
        for layer in stack:
            layer.copy_(rounded(layer.T.contiguous()).T)
    small.bits = BITS


@dataclass
class _Kept:
    """Codes of small FFNs; their weights are held, so that nothing else can lie there."""

    weights: tuple[Tensor, Tensor]
    written: tuple[int, int]
    pairs: Pairs


_kept: WeakKeyDictionary[SmallFfn, _Kept] = WeakKeyDictionary()


def written(small: SmallFfn) -> tuple[int, int]:
    """How often its weights were written to, but for what was done to their `data`.

    Those that were made in inference mode are not counted.
    """
    first, second = (0 if w.is_inference() else w._version for w in (small.ffn_in, small.ffn_out))
    return first, second


def packed(small: SmallFfn) -> Pairs:
    """Both projections of every layer, as the kernels read them; packed once.

    They follow weights that are replaced or written to, but not what is written to their `data`.

    Raises:
        VesicleError: They do not lie on grids of 4 bits.
    """
    weights = small.ffn_in.data, small.ffn_out.data
    known = _kept.get(small)
    if known is not None and known.written == written(small):
        same = zip(known.weights, weights, strict=True)
        if all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in same):
            return known.pairs
    pairs = _pack(small)
    _kept[small] = _Kept(weights, written(small), pairs)
    return pairs


def apply_coded(small: SmallFfn, layer: int, x: Tensor) -> Tensor:
    """The FFN of `layer` on x (N, D), as the kernels compute it: activations in 8 bits, in fp32."""
    first, second = packed(small)[layer]

    def times(weight: PackedWeight, x: Tensor) -> Tensor:
        return weight.multiply(x, np.full(len(x), weight.n_in), FULL_BITS)[0]

    return times(second, hidden_units(times(first, x), small.activation, small.gated))


def _pack(small: SmallFfn) -> Pairs:
    found = []
    for both in zip(small.ffn_in.detach(), small.ffn_out.detach(), strict=True):
        rows = [w.T.contiguous() for w in both]
        first, second = (PackedWeight.pack(w, BITS, grid=grid_of(w)) for w in rows)
        if not (first.exact and second.exact):
            raise VesicleError("weights of a small FFN are not given back by 4-bit codes")
        found.append((first, second))
    return found
