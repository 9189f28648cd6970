"""Projections that read only what a Plan says: chosen input channels, fewer weight bits.

Weights are stored channel-major, (in, out), so that the rows of channels that are not read are
never touched. Every call returns what it read, which is what the engine's ledger counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.engine.native import library
from vesicle.nested import NestedWeight
from vesicle.plan import FULL_BITS, IntArray


@dataclass(kw_only=True)
class ChannelMajor:
    """A projection, or several that share their input, side by side.

    Attributes:
        weight: (in, out), contiguous.
        bias: (out,) or None.
        nested: The same weight in the nested store, made when a Plan first asks for fewer bits.
    """

    weight: Tensor
    bias: Tensor | None
    nested: NestedWeight | None = field(default=None)

    @classmethod
    def stack(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> ChannelMajor:
        """Join row-major weights (out_i, in) and their biases (out_i,)."""
        first = weights[0]
        n_out = sum(len(w) for w in weights)
        weight = torch.empty(first.shape[1], n_out, dtype=first.dtype, device=first.device)
        start = 0
        for w in weights:
            weight[:, start : start + len(w)] = w.t()
            start += len(w)
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [
                    w.new_zeros(len(w)) if b is None else b
                    for w, b in zip(weights, biases, strict=True)
                ]
            )
        return cls(weight=weight, bias=bias)

    @property
    def n_in(self) -> int:
        """Input channels."""
        return int(self.weight.shape[0])

    @property
    def n_out(self) -> int:
        """Outputs."""
        return int(self.weight.shape[1])


def project(
    x: Tensor, w: ChannelMajor, counts: IntArray, bits: IntArray, columns: int | None = None
) -> tuple[Tensor, IntArray]:
    """Multiply, reading only `counts[t]` input channels of token t at `bits[t]` bits.

    Args:
        x: (T, in).
        w: The projection.
        counts: (T,) channels to read, those of largest |x|.
        bits: (T,) weight bits.
        columns: Compute the first `columns` outputs only; all by default.

    Returns:
        (T, columns) outputs, and (T,) the rows of the weight that were read.
    """
    columns = w.n_out if columns is None else columns
    if (
        len(counts) == 1 and bits[0] == FULL_BITS
    ):  # decoding: no need to sort tokens by what they run
        if counts[0] >= w.n_in:
            return _dense(x, w, columns), counts
        return _sparse(x, w, counts, columns)
    full = (counts >= w.n_in) & (bits == FULL_BITS)
    if full.all():
        return _dense(x, w, columns), np.full(len(counts), w.n_in, np.int32)
    plain = bits == FULL_BITS
    if plain.all() and not full.any():
        return _sparse(x, w, counts, columns)
    out = x.new_empty(x.shape[0], columns)
    rows_read = np.zeros(len(counts), np.int32)
    for chosen, run in ((full, _dense_rows), (plain & ~full, _sparse)):
        if chosen.any():
            index = torch.from_numpy(np.nonzero(chosen)[0])
            out[index], rows_read[chosen] = run(x[index], w, counts[chosen], columns)
    for b in np.unique(bits[~plain]):
        chosen = bits == b
        index = torch.from_numpy(np.nonzero(chosen)[0])
        out[index], rows_read[chosen] = _nested(x[index], w, counts[chosen], int(b), columns)
    return out, rows_read


def _dense(x: Tensor, w: ChannelMajor, columns: int) -> Tensor:
    weight = w.weight if columns == w.n_out else w.weight[:, :columns]
    if w.bias is None:
        return x @ weight
    return torch.addmm(w.bias[:columns], x, weight)


def _dense_rows(
    x: Tensor, w: ChannelMajor, counts: IntArray, columns: int
) -> tuple[Tensor, IntArray]:
    return _dense(x, w, columns), np.full(len(counts), w.n_in, np.int32)


def _sparse(x: Tensor, w: ChannelMajor, counts: IntArray, columns: int) -> tuple[Tensor, IntArray]:
    kernels = library()
    weight = w.weight
    if kernels is None or weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_cuda:
        return _sparse_torch(x, w, counts, columns)
    run = (
        kernels.vesicle_sparse_linear_f32
        if weight.dtype == torch.float32
        else kernels.vesicle_sparse_linear_bf16
    )
    x32 = x.float().contiguous()
    bias = None if w.bias is None else w.bias.float()
    out = torch.empty(x.shape[0], columns)
    counts = np.ascontiguousarray(counts, np.int32)
    rows_read = np.empty(len(counts), np.int32)
    run(
        x32.data_ptr(),
        counts.ctypes.data,
        x.shape[0],
        w.n_in,
        weight.data_ptr(),
        w.n_out,
        columns,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows_read.ctypes.data,
    )
    return out.to(x.dtype), rows_read


def chosen_channels(x: Tensor, count: int) -> Tensor:
    """The `count` channels of largest |x|, x (in,); ties go to the lower channel."""
    order = x.abs().argsort(descending=True, stable=True)
    return order[:count].sort().values


def _sparse_torch(
    x: Tensor, w: ChannelMajor, counts: IntArray, columns: int
) -> tuple[Tensor, IntArray]:
    out = x.new_empty(x.shape[0], columns)
    rows_read = np.empty(len(counts), np.int32)
    for t, count in enumerate(counts.tolist()):
        channels = chosen_channels(x[t], count)
        out[t] = x[t, channels] @ w.weight[channels, :columns]
        rows_read[t] = len(channels)
    if w.bias is not None:
        out += w.bias[:columns]
    return out, rows_read


def _nested(
    x: Tensor, w: ChannelMajor, counts: IntArray, bits: int, columns: int
) -> tuple[Tensor, IntArray]:
    if w.nested is None:
        w.nested = NestedWeight.quantize(w.weight)
    out = x.new_empty(x.shape[0], columns)
    rows_read = np.empty(len(counts), np.int32)
    for t, count in enumerate(counts.tolist()):
        channels = chosen_channels(x[t], count)
        rows = w.nested.dequantize(bits, channels)[:, :columns].to(x.dtype)
        out[t] = x[t, channels] @ rows
        rows_read[t] = len(channels)
    if w.bias is not None:
        out += w.bias[:columns]
    return out, rows_read


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """RMSNorm or LayerNorm of x (..., D)."""
    if rms:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
