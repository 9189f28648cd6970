"""Projections that read only what a Plan says: chosen input channels, fewer weight bits.

Weights are stored channel-major, (in, out), or packed (`packed`); either way the rows of channels
that are not read are never touched. Every call returns what it read, which is what the engine's
ledger counts.

Packed weights have two routes. Few tokens, or tokens that read a part, take whole-number arithmetic
on activations rounded to 8 bits, natively or in PyTorch. Many tokens that read everything share one
decoding of the weight and one matrix product of unrounded activations, in bfloat16 where the
processor multiplies it in hardware.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.engine import core
from vesicle.engine.native import load as library
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
from vesicle.nested import NestedWeight
from vesicle.plan import FULL_BITS, IntArray

MANY = 32
"""Tokens from which decoding a whole packed weight once costs less than reading its codes for each.
"""


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

    @property
    def bytes_held(self) -> int:
        """Bytes of the weight, its bias and its nested store."""
        held = [self.weight, self.bias]
        if self.nested is not None:
            held += [self.nested.codes, self.nested.low, self.nested.span]
        return sum(t.numel() * t.element_size() for t in held if t is not None)


Projection = ChannelMajor | PackedWeight | PackedPair
"""Anything that `project` multiplies by."""


def project(
    x: Tensor, w: Projection, counts: IntArray, bits: IntArray, columns: int | None = None
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
    if not isinstance(w, ChannelMajor):
        return _packed(x, w, counts, bits, columns)
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


def _packed(
    x: Tensor, w: PackedWeight | PackedPair, counts: IntArray, bits: IntArray, columns: int
) -> tuple[Tensor, IntArray]:
    parts = [(w, columns)] if isinstance(w, PackedWeight) else list(w.split(columns))
    read = np.minimum(bits, w.bits)  # at 4 bits, 16 and 8 are the same execution
    full = (counts >= w.n_in) & (read == w.bits)
    if full.sum() < MANY:
        full[:] = False
    if full.all():
        return _decoded(x, parts).to(x.dtype), np.full(len(x), w.n_in, np.int32)
    out = torch.empty(x.shape[0], columns, dtype=x.dtype)
    if full.any():
        index = torch.from_numpy(np.nonzero(full)[0])
        out[index] = _decoded(x[index], parts).to(x.dtype)
    for b in np.unique(read[~full]):
        chosen = (read == b) & ~full
        rows: slice | Tensor = slice(None)
        if not chosen.all():
            rows = torch.from_numpy(np.nonzero(chosen)[0])
        products = [_by_codes(x[rows], part, counts[chosen], int(b), n) for part, n in parts]
        out[rows] = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return out, np.minimum(counts, w.n_in).astype(np.int32)


def _by_codes(x: Tensor, w: PackedWeight, counts: IntArray, bits: int, columns: int) -> Tensor:
    """(T, columns) on 8-bit activations, `counts` (T,) channels each."""
    if not core.available():
        return w.multiply(x, counts, bits, columns)[0]
    out = torch.empty(len(x), columns)
    counts = np.ascontiguousarray(counts, np.int32)
    core.packed_multiply(x.float().contiguous(), w, counts, bits, columns, out)
    return out


def _decoded(x: Tensor, parts: list[tuple[PackedWeight, int]]) -> Tensor:
    """(T, columns) at the stored bits, every channel, by one matrix product in `bulk_dtype`."""
    dtype = bulk_dtype()
    widths = [part.n_out for part, _ in parts]
    weight = _SCRATCH.take(dtype, parts[0][0].n_in, sum(widths))
    for (part, _), place in zip(parts, weight.split(widths, dim=1), strict=True):
        if core.available():
            core.unpack(part, place)
        else:
            place.copy_(part.unpack())
    # Only the last part may be wanted in part, so the wanted columns lie side by side.
    columns = sum(n for _, n in parts)
    out = x.to(dtype) @ weight[:, :columns]
    for (part, n), place in zip(parts, out.split([n for _, n in parts], dim=1), strict=True):
        if part.bias is not None:
            place += part.bias[:n]
    return out


def logits(x: Tensor, head: Tensor | PackedHead, bias: Tensor | None) -> Tensor:
    """Logits (T, V) of x (T, D) by the full LM head; a packed head has its own bias."""
    if isinstance(head, Tensor):
        return nn.functional.linear(x, head, bias)
    if len(x) < MANY:
        if not core.available():
            return head.multiply(x)
        out = torch.empty(len(x), head.n_out)
        core.head_multiply(x.float().contiguous(), head, head.bits, out)
        return out if head.bias is None else out.add_(head.bias)
    return head.product(x.float())  # in fp32: bfloat16 logits are too coarse to score with


def survivors(x: Tensor, head: PackedHead, count: int) -> tuple[Tensor, Tensor]:
    """The two-stage LM head on x (T, D), see `PackedHead.survivors`."""
    screened = None
    if core.available():
        screened = torch.empty(len(x), head.n_out)
        core.head_multiply(x.float().contiguous(), head, 4, screened)
        if head.bias is not None:
            screened += head.bias
    return head.survivors(x, count, screened)


@functools.cache
def bulk_dtype() -> torch.dtype:
    """What this processor multiplies fastest: bfloat16 where its instructions do."""
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class _Scratch(threading.local):
    """Room for one decoded weight in each thread, used again for every layer."""

    def __init__(self) -> None:
        self._room: dict[torch.dtype, Tensor] = {}

    def take(self, dtype: torch.dtype, n_in: int, n_out: int) -> Tensor:
        """Uninitialised (n_in, n_out), valid until the next call."""
        room = self._room.get(dtype)
        if room is None or len(room) < n_in * n_out:
            with torch.inference_mode(False):  # may be written to outside inference mode later
                room = self._room[dtype] = torch.empty(n_in * n_out, dtype=dtype)
        return room[: n_in * n_out].view(n_in, n_out)


_SCRATCH = _Scratch()


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """RMSNorm or LayerNorm of x (..., D)."""
    if rms:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
