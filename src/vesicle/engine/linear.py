"""Projections that read only what a Plan says: chosen input channels, fewer weight bits.

Weights are stored channel-major, (in, out), or packed (`packed`); either way the rows of channels
that are not read are never touched. Every call returns what it read, which is what the engine's
ledger counts.

Packed weights are multiplied in whole numbers, with activations rounded to 8 bits, by the core
where it is there; a token's product does not depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.engine import core
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
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
        """Input channels, the rows of `weight`."""
        return int(self.weight.shape[0])

    @property
    def n_out(self) -> int:
        """Outputs of all joined projections, the columns of `weight`."""
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


def chosen_channels(x: Tensor, count: int) -> Tensor:
    """The `count` channels of largest |x|, x (in,); ties go to the lower channel."""
    order = x.abs().argsort(descending=True, stable=True)
    return order[:count].sort().values


def _sparse(x: Tensor, w: ChannelMajor, counts: IntArray, columns: int) -> tuple[Tensor, IntArray]:
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
    out = torch.empty(x.shape[0], columns, dtype=x.dtype)
    for b in np.unique(read):
        chosen = read == b
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


def logits(x: Tensor, head: Tensor | PackedHead, bias: Tensor | None) -> Tensor:
    """Logits (T, V) of x (T, D) by the full LM head; a packed head has its own bias."""
    if isinstance(head, Tensor):
        return nn.functional.linear(x, head, bias)
    if not core.available():
        return head.multiply(x)
    out = torch.empty(len(x), head.n_out)
    core.head_multiply(x.float().contiguous(), head, head.bits, out)
    return out if head.bias is None else out.add_(head.bias)


def survivors(x: Tensor, head: PackedHead, count: int) -> tuple[Tensor, Tensor]:
    """The two-stage LM head on x (T, D), see `PackedHead.survivors`."""
    screened = None
    if core.available():
        screened = torch.empty(len(x), head.n_out)
        core.head_multiply(x.float().contiguous(), head, 4, screened)
        if head.bias is not None:
            screened += head.bias
    return head.survivors(x, count, screened)


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """RMSNorm or LayerNorm of x (..., D), in its dtype."""
    if rms and weight.dtype != x.dtype:  # Gemma's gains are fp32, and so are its sums
        wide = nn.functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)
        return wide.to(x.dtype)
    if rms:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
