"""Codes of packed weights: which numbers the groups of a weight are made of, and rounding to them.

Input channels go in groups of 32. Within its group a weight is w = scale code + low, with whole
codes of 4 or 8 bits. Where a quantised file tells its own scales they are taken (a `Grid`), and
give back what the file says up to their rounding to fp16. Otherwise they follow from the range of a
group, and are rounded to fp16 before codes are chosen.

Codes are written by the native core where it is there, and by PyTorch in the same order of bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.errors import ModelError

GROUP = 32
STORED_BITS = (4, 8)
SLICE = 1024
"""Outputs that are encoded or decoded at a time: 2 MB at width 576, which caches hold."""
_ROWS = 8192
"""Outputs that the core encodes at a time, a multiple of 128; they are converted to fp32 first."""

Writer = Callable[[Tensor, "Tensor | None", int, Tensor, Tensor, Tensor], None]
"""Writes codes (groups, 32, N), scales and lows (groups, N) of outputs from one on to planes."""


def groups_of(n_in: int) -> int:
    """Groups of 32 that hold `n_in` channels."""
    return -(-n_in // GROUP)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers that a file's groups of 32 weights are made of: scale code + low.

    Attributes:
        bits: Of a code, which is a whole number from 0 on.
        scale: (out, groups) fp32.
        low: (out, groups) fp32.
    """

    bits: int
    scale: Tensor
    low: Tensor


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How a weight's codes are found, and what they stand for.

    A code is `multiplier` round((w - origin) inverse), from 0 to `top` before it is multiplied, and
    stands for scale code + low.

    Attributes:
        inverse: (out, groups) fp32.
        origin: (out, groups) fp32.
        scale: (out, groups) fp16.
        low: (out, groups) fp16.
        top: The largest code before it is multiplied.
        multiplier: A power of two.
    """

    inverse: Tensor
    origin: Tensor
    scale: Tensor
    low: Tensor
    top: float
    multiplier: float = 1.0


def best(
    weight: Tensor, bits: int, grid: Grid | None, fill: Callable[[Numbers, bool], float]
) -> float:
    """Encode a weight (out, in) with the numbers that lose least; the largest error.

    Args:
        weight: Row-major.
        bits: Of a code.
        grid: Where a file tells it.
        fill: Encodes with some numbers, and keeps the result or not; the largest error.

    Raises:
        ModelError: If a weight is not finite or too large for an fp16 scale.
        ValueError: If `bits` is not 4 or 8.
    """
    low, high = _ranges(weight)
    if bits not in STORED_BITS:
        raise ValueError(f"bits is {bits}; allowed: 4, 8")
    largest = torch.maximum(-low, high)
    if not float(largest.amax()) < 32768:  # also false for NaN
        raise ModelError(
            f"a weight's magnitude is {float(largest.amax())}; packed weights must be finite and "
            "below 32768"
        )
    if grid is not None:
        return fill(_on_grid(grid, bits), True)
    asymmetric = _numbers(((high - low) / (2**bits - 1)).half(), low.half(), bits)
    if bits == 4:
        return fill(asymmetric, True)
    # The default model's head is symmetric and given back exactly; most other weights lose less by
    # using all of the range.
    scale = (largest / 127).half()
    error = fill(_numbers(scale, 0 - 128 * scale, bits), True)
    if error > 0 and fill(asymmetric, False) < error:
        return fill(asymmetric, True)
    return error


def _numbers(scale: Tensor, low: Tensor, bits: int) -> Numbers:
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    return Numbers(inverse=inverse, origin=low.float(), scale=scale, low=low, top=2**bits - 1)


def _on_grid(grid: Grid, bits: int) -> Numbers:
    """Those of a file, whose codes may have fewer bits.

    They become leading bits, so that who reads the leading plane alone reads most of them.
    """
    multiplier = 2 ** (bits - grid.bits)
    scale = (grid.scale / multiplier).half()
    if not torch.equal(scale.float() * multiplier, grid.scale.half().float()):
        multiplier, scale = 1, grid.scale.half()  # too small for fp16
    inverse = torch.where(grid.scale == 0, torch.zeros_like(grid.scale), 1 / grid.scale)
    return Numbers(
        inverse=inverse,
        origin=grid.low,
        scale=scale,
        low=grid.low.half(),
        top=2**grid.bits - 1,
        multiplier=float(multiplier),
    )


def encode(
    weight: Tensor,
    numbers: Numbers,
    bits: int,
    write: Writer,
    high: Tensor | None,
    trailing: Tensor | None,
    *,
    head: bool,
) -> float:
    """Fill the planes of a packed weight.

    Args:
        weight: (out, in), row-major.
        numbers: Of its groups.
        bits: Of a code, 4 or 8.
        write: Writes to the planes, where PyTorch encodes.
        high: The plane of leading bits, scales and lows; None if only the error is wanted.
        trailing: The plane of trailing bits; None for 4-bit codes.
        head: Whether the planes are those of an LM head.

    Returns:
        The largest difference between a weight and what is given back.
    """
    from vesicle.engine import core  # late: it describes packed weights

    library = core.load()
    if library is None:
        return _encode_in_torch(weight, numbers, write, high, trailing, 16 if head else 64)
    n_out, n_in = weight.shape
    inverse, origin = numbers.inverse.contiguous(), numbers.origin.contiguous()
    scale, low = numbers.scale.contiguous(), numbers.low.contiguous()
    error = 0.0
    for start in range(0, n_out, _ROWS):
        rows = weight[start : start + _ROWS].detach().to(torch.float32).contiguous()
        encoding = core.Encoding(
            weight=rows.data_ptr(),
            first=start,
            rows=len(rows),
            n_in=n_in,
            n_out=n_out,
            inverse=inverse.data_ptr(),
            origin=origin.data_ptr(),
            scales=scale.data_ptr(),
            lows=low.data_ptr(),
            top=numbers.top,
            multiplier=numbers.multiplier,
            bits=bits,
            head=head,
            high=core.address(high),
            trailing=core.address(trailing),
        )
        error = max(error, library.vesicle_encode(ctypes.byref(encoding), core.threads()))
    return error


def _encode_in_torch(
    weight: Tensor,
    numbers: Numbers,
    write: Writer,
    high: Tensor | None,
    trailing: Tensor | None,
    step: int,
) -> float:
    """`encode`; outputs are padded to a multiple of `step`."""
    (n_out, n_in), error = weight.shape, 0.0
    for start in range(0, n_out, SLICE):
        part = slice(start, min(start + SLICE, n_out))
        n = -(-(part.stop - start) // step) * step
        inverse, origin, scale, low = (
            _turned(x[part], n)
            for x in (numbers.inverse, numbers.origin, numbers.scale, numbers.low)
        )
        grouped = _grouped(weight[part], n)
        codes = (grouped - origin[:, None]) * inverse[:, None]
        codes = codes.round_().clamp_(0, numbers.top).mul_(numbers.multiplier)
        back = torch.addcmul(low.float()[:, None], codes, scale.float()[:, None])
        error = max(error, float((back - grouped).flatten(0, 1)[:n_in].abs().amax()))
        codes.flatten(0, 1)[n_in:] = 0
        if high is not None:
            write(high, trailing, start, codes.to(torch.uint8), scale, low)
    return error


def _turned(x: Tensor, n: int) -> Tensor:
    """Numbers (N, groups) as (groups, n), with zeros for outputs that are missing."""
    return torch.nn.functional.pad(x, (0, 0, 0, n - len(x))).t().contiguous()


def _ranges(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest weight (out, groups) of every group, fp32."""
    n_in = weight.shape[1]
    whole = n_in // GROUP * GROUP
    lows, highs = [], []
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].detach()
        parts = [rows[:, :whole].unflatten(1, (-1, GROUP))] if whole else []
        low, high = ([getattr(p, kind)(-1) for p in parts] for kind in ("amin", "amax"))
        if whole < n_in:
            rest = rows[:, whole:]
            low.append(rest.amin(1, keepdim=True))
            high.append(rest.amax(1, keepdim=True))
        lows.append(torch.cat(low, 1).float())
        highs.append(torch.cat(high, 1).float())
    return torch.cat(lows), torch.cat(highs)


def _grouped(weight: Tensor, outputs: int) -> Tensor:
    """A row-major weight (out, in) as (groups, 32, outputs) fp32; what is missing is 0."""
    n_out, n_in = weight.shape
    groups = groups_of(n_in)
    grouped = torch.zeros(groups * GROUP, outputs)
    grouped[:n_in, :n_out] = weight.detach().t()
    return grouped.view(groups, GROUP, outputs)
