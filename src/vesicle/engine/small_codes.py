"""Small FFNs in 4-bit codes: weights on a grid that bf16 holds exactly, and how it is found again.

A group of 32 input channels of an output has 16 values s (m + c), c = 0 to 15, with a scale s of
four significant bits and a whole m from -15 to 0. So |m + c| has four bits at most and every value
eight, which is what bf16 has: a modulator is saved in bf16 and nothing is lost. Beside packed
weights such an FFN is packed as they are; the reference computes with the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesicle.engine.encoding import GROUP, Grid, groups_of
from vesicle.engine.packed import PackedWeight
from vesicle.errors import VesicleError
from vesicle.small_modules import SmallFfn

BITS = 4
_TOP = 2**BITS - 1
_LEAST = 2.0**-13
"""Scales below are not exact in fp16, which packed weights have them in."""


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
    # A half more than 15 steps still rounds to 15: the end loses half a step, others win.
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


def packed(small: SmallFfn) -> list[tuple[PackedWeight, PackedWeight]]:
    """Both projections of every layer, as the kernels read them.

    Raises:
        VesicleError: They do not lie on grids of 4 bits.
    """
    found = []
    for both in zip(small.ffn_in.detach(), small.ffn_out.detach(), strict=True):
        rows = [w.T.contiguous() for w in both]
        first, second = (PackedWeight.pack(w, BITS, grid=grid_of(w)) for w in rows)
        if not (first.exact and second.exact):
            raise VesicleError("weights of a small FFN are not given back by 4-bit codes")
        found.append((first, second))
    return found
