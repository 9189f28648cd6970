"""Packed weights: codes of 4 or 8 bits with fp16 scales, in the byte order that the kernels read.

Input channels go in groups of 32. Within its group g and output n a weight is
w = scale[g, n] code + low[g, n], both in fp16 (`encoding` chooses them). The codes lie in two
planes. `high` holds the leading four bits of every code and the scales and lows;
`trailing` holds the trailing four bits of 8-bit codes. Reading b < S bits of an S-bit code reads
`high` alone and takes the middle of the codes that share those bits,
code_b = (code >> (S - b) << (S - b)) + 2^(S - b) / 2.

Projections (`PackedWeight`) are cut in tiles of 128 outputs, the last one 64 wide where the
outputs, padded to a multiple of 64, ask for it. A tile holds its groups in order: 32 rows, one a
channel, of two outputs a byte, then the tile's scales and lows. So a channel that is not read is a
row that is not touched. The LM head (`PackedHead`) reads all its channels and is cut in tiles of 16
outputs.

Activations are rounded to 8 bits, per group of 32 and over the channels that are read: x = s c with
s = max|x| / 127. So y[n] is the sum over groups of s (scale[n] sum_k code[k, n] c[k] + low[n]
sum_k c[k]), with whole numbers in the inner sums. `multiply` does this in PyTorch, the kernels
natively.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.engine.encoding import GROUP, SLICE, Grid, Numbers, best, encode, groups_of
from vesicle.plan import IntArray

TILE, HALF_TILE = 128, 64
HEAD_TILE = 16


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A projection, or several that share their input side by side.

    Attributes:
        high: (bytes,) uint8: leading four bits, scales and lows.
        trailing: (bytes,) uint8: trailing four bits of 8-bit codes; None for 4-bit codes.
        bits: Of a code, 4 or 8.
        n_in: Input channels, without padding.
        n_out: Outputs, without padding.
        bias: (n_out,) fp32 or None.
        error: The largest difference between a weight that was packed and what is given back.
    """

    high: Tensor
    trailing: Tensor | None
    bits: int
    n_in: int
    n_out: int
    bias: Tensor | None
    error: float

    @classmethod
    def pack(
        cls, weight: Tensor, bits: int, bias: Tensor | None = None, grid: Grid | None = None
    ) -> PackedWeight:
        """Encode a row-major weight (out, in).

        Args:
            weight: (out, in).
            bits: Of a code.
            bias: (out,).
            grid: On which the weights lie, where it is known.

        Raises:
            ModelError: If a weight is not finite or too large for an fp16 scale.
            ValueError: If `bits` is not 4 or 8.
        """
        n_out, n_in = weight.shape
        padded, groups = -(-n_out // HALF_TILE) * HALF_TILE, groups_of(n_in)
        high = torch.empty(padded // HALF_TILE * groups * 1280, dtype=torch.uint8)
        trailing = (
            torch.empty(padded // 2 * groups * GROUP, dtype=torch.uint8) if bits == 8 else None
        )

        def fill(numbers: Numbers, kept: bool) -> float:
            return encode(
                weight, numbers, bits, _write_tiles, high if kept else None, trailing, head=False
            )

        error = best(weight, bits, grid, fill)
        return cls(
            high=high,
            trailing=trailing,
            bits=bits,
            n_in=n_in,
            n_out=n_out,
            bias=None if bias is None else bias.detach().to(torch.float32, copy=True),
            error=error,
        )

    @property
    def exact(self) -> bool:
        """Whether every weight that was packed is given back bit for bit."""
        return self.error == 0

    @classmethod
    def stack(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        bits: int,
        grid: Grid | None = None,
    ) -> PackedWeight:
        """Join row-major weights (out_i, in) and their biases (out_i,) side by side.

        Raises:
            ModelError: As `pack`.
        """
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [
                    torch.zeros(len(w)) if b is None else b.float()
                    for w, b in zip(weights, biases, strict=True)
                ]
            )
        joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        return cls.pack(joined, bits, bias, grid)

    @property
    def groups(self) -> int:
        """Groups of 32 input channels."""
        return groups_of(self.n_in)

    @property
    def padded_out(self) -> int:
        """Outputs, padded to a multiple of 64."""
        return -(-self.n_out // HALF_TILE) * HALF_TILE

    @property
    def bytes_held(self) -> int:
        """Bytes of both planes and the bias."""
        return _bytes(self.high, self.trailing, self.bias)

    def dequantize(
        self, bits: int, channels: Tensor | None = None, columns: int | None = None
    ) -> Tensor:
        """Weights (k, columns) fp32 at `bits` bits.

        Args:
            bits: As a Plan's; the stored bits at most are read.
            channels: (k,) rows to decode; all by default.
            columns: Decode the first `columns` outputs only; all by default.
        """
        columns = self.n_out if columns is None else columns
        out = []
        for first, tiles, tile in _cuts(self.padded_out):
            if first >= columns:
                break
            codes, scale, low = self._part(first, tiles, tile, bits)
            codes = _plain(codes, tile).reshape(tiles, -1, tile)  # (tiles, channels, tile)
            if channels is not None:
                codes = codes[:, channels]
                scale, low = scale[:, channels // GROUP], low[:, channels // GROUP]
                part = torch.addcmul(low, codes, scale)
            else:
                codes = codes.view(tiles, self.groups, GROUP, tile)
                part = torch.addcmul(low[:, :, None], codes, scale[:, :, None])
                part = part.view(tiles, -1, tile)[:, : self.n_in]
            out.append(part.transpose(0, 1).reshape(part.shape[1], tiles * tile))
        return torch.cat(out, dim=1)[:, :columns]

    def multiply(
        self, x: Tensor, counts: IntArray, bits: int, columns: int | None = None
    ) -> tuple[Tensor, IntArray]:
        """Multiply as the kernels do, in PyTorch.

        Args:
            x: (T, in) floats.
            counts: (T,) channels to read, those of largest |x|.
            bits: As a Plan's, the same for all tokens.
            columns: Compute the first `columns` outputs only; all by default.

        Returns:
            (T, columns) fp32 outputs, and (T,) the channels that were read.
        """
        columns = self.n_out if columns is None else columns
        rows_read = np.minimum(counts, self.n_in).astype(np.int32)
        kept = x.float()
        if (rows_read < self.n_in).any():
            kept = kept * _kept(kept, rows_read)
        code, step = quantize_activations(kept)  # (T, groups, 32), (T, groups)
        by_group, sums = code.transpose(0, 1), code.sum(-1)
        out = []
        for first, tiles, tile in _cuts(self.padded_out):
            if first >= columns:
                break
            codes, scale, low = self._part(first, tiles, tile, bits)
            dots = by_group @ codes.flatten(-2)  # (tiles, groups, T, tile), in byte order
            dots = _plain(dots.unflatten(-1, (2, tile // 2)), tile)
            part = torch.einsum("ngtw,ngw,tg->tnw", dots, scale, step)
            part += torch.einsum("tg,ngw->tnw", step * sums, low)
            out.append(part.flatten(1))
        result = torch.cat(out, dim=1)[:, :columns]
        return (result if self.bias is None else result + self.bias[:columns]), rows_read

    def _part(self, first: int, tiles: int, tile: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """One width of tiles: codes (tiles, groups, 32, 2, tile / 2) fp32 in byte order at `bits`.

        Scales and lows (tiles, groups, tile) fp32 in the order of outputs.
        """
        blob = _high_part(self.high, first, tiles, tile, self.groups)
        packed = blob[..., : GROUP * tile // 2]
        trailing = None
        if self.trailing is not None and bits >= self.bits:
            trailing = _trailing_part(self.trailing, first, tiles, tile, self.groups)
        codes = _codes(packed, trailing, self.bits, bits, tile // 2)
        scale, low = (
            blob[..., GROUP * tile // 2 :].contiguous().view(torch.float16).float().chunk(2, -1)
        )
        return codes, scale, low


@dataclass(frozen=True, kw_only=True)
class PackedPair:
    """Two projections of one input, so that a token may take the first alone.

    The first holds values and keys, the second queries: a token whose attention is skipped never
    touches the queries' tiles.
    """

    parts: tuple[PackedWeight, PackedWeight]

    @property
    def n_in(self) -> int:
        """Input channels, which both parts share, without padding."""
        return self.parts[0].n_in

    @property
    def n_out(self) -> int:
        """Outputs of both parts together, without padding."""
        return self.parts[0].n_out + self.parts[1].n_out

    @property
    def bits(self) -> int:
        """Bits of a code, 4 or 8, in both parts."""
        return self.parts[0].bits

    @property
    def bytes_held(self) -> int:
        """Bytes in memory of both parts."""
        return sum(part.bytes_held for part in self.parts)

    def dequantize(
        self, bits: int, channels: Tensor | None = None, columns: int | None = None
    ) -> Tensor:
        """As `PackedWeight.dequantize`."""
        return torch.cat(
            [part.dequantize(bits, channels, n) for part, n in self.split(columns)], dim=1
        )

    def split(self, columns: int | None) -> Iterator[tuple[PackedWeight, int]]:
        """The parts that the first `columns` outputs touch, and how many of each."""
        left = self.n_out if columns is None else columns
        for part in self.parts:
            if left > 0:
                yield part, min(left, part.n_out)
            left -= part.n_out


@dataclass(frozen=True, kw_only=True)
class PackedHead:
    """The LM head, and the embedding that is tied to it.

    Attributes:
        high: (bytes,) uint8: leading four bits, scales and lows.
        trailing: (bytes,) uint8: trailing four bits of 8-bit codes; None for 4-bit codes.
        bits: Of a code, 4 or 8.
        n_in: Input channels D, without padding.
        n_out: Outputs V, without padding.
        bias: (V,) fp32 or None.
        error: The largest difference between a weight that was packed and what is given back.
    """

    high: Tensor
    trailing: Tensor | None
    bits: int
    n_in: int
    n_out: int
    bias: Tensor | None
    error: float

    @classmethod
    def pack(
        cls, weight: Tensor, bits: int, bias: Tensor | None = None, grid: Grid | None = None
    ) -> PackedHead:
        """Encode a row-major weight (V, D), a slice of rows at a time; see `PackedWeight.pack`.

        Raises:
            ModelError: If a weight is not finite or too large for an fp16 scale.
            ValueError: If `bits` is not 4 or 8.
        """
        n_out, n_in = weight.shape
        groups, tiles = groups_of(n_in), -(-n_out // HEAD_TILE)
        high = torch.empty(tiles, groups, 320, dtype=torch.uint8)
        trailing = torch.empty(tiles, groups, 256, dtype=torch.uint8) if bits == 8 else None

        def fill(numbers: Numbers, kept: bool) -> float:
            return encode(
                weight, numbers, bits, _write_head, high if kept else None, trailing, head=True
            )

        error = best(weight, bits, grid, fill)
        return cls(
            high=high.flatten(),
            trailing=None if trailing is None else trailing.flatten(),
            bits=bits,
            n_in=n_in,
            n_out=n_out,
            bias=None if bias is None else bias.detach().to(torch.float32, copy=True),
            error=error,
        )

    @property
    def exact(self) -> bool:
        """Whether every weight that was packed is given back bit for bit."""
        return self.error == 0

    @property
    def groups(self) -> int:
        """Groups of 32 input channels."""
        return groups_of(self.n_in)

    @property
    def bytes_held(self) -> int:
        """Bytes of both planes and the bias."""
        return _bytes(self.high, self.trailing, self.bias)

    def rows(self, token_ids: Tensor, bits: int | None = None) -> Tensor:
        """Rows (T, D) fp32 of tokens (T,), such as their embeddings; all stored bits by default."""
        tile, within = token_ids // HEAD_TILE, token_ids % HEAD_TILE
        high = self.high.view(-1, self.groups, 320)
        picked = high[..., :256].unflatten(-1, (4, HEAD_TILE, 4))[tile, :, :, within]
        trailing = None
        bits = self.bits if bits is None else bits
        if self.trailing is not None and bits >= self.bits:
            trailing = self.trailing.view(-1, self.groups, 4, HEAD_TILE, 4)[tile, :, :, within]
        codes = _codes(picked, trailing, self.bits, bits, 4)  # (T, groups, 4, 2, 4)
        numbers = high[..., 256:].unflatten(-1, (2, HEAD_TILE, 2))[tile, :, :, within]
        scale, low = numbers.contiguous().view(torch.float16).float().squeeze(-1).unbind(-1)
        return torch.addcmul(low[..., None], codes.flatten(2), scale[..., None]).flatten(1)[
            :, : self.n_in
        ]

    def multiply(self, x: Tensor, bits: int | None = None) -> Tensor:
        """Logits (T, V) fp32 of x (T, D) on activations rounded to 8 bits, as the kernels do."""
        rounded, out = self.rounded(x), torch.empty(len(x), self.n_out)
        tiles = SLICE // HEAD_TILE
        for start in range(0, self.n_out, SLICE):
            part = out[:, start : start + SLICE]
            rows = self._tiles(start // HEAD_TILE, start // HEAD_TILE + tiles, bits)
            torch.matmul(rounded, rows[: part.shape[1]].t(), out=part)
        return out if self.bias is None else out.add_(self.bias)

    def _tiles(self, first: int, last: int, bits: int | None) -> Tensor:
        """Rows (16 (last - first), D) fp32 of some tiles, at `bits` bits."""
        bits = self.bits if bits is None else bits

        def by_output(plane: Tensor) -> Tensor:
            # Four codes move at a time: (tiles, groups, j, output) words to (tiles, output, ...).
            words = plane.contiguous().view(torch.int32).unflatten(-1, (4, HEAD_TILE))
            return words.permute(0, 3, 1, 2).contiguous().view(torch.uint8)

        high = self.high.view(-1, self.groups, 320)[first:last]
        trailing = None
        if self.trailing is not None and bits >= self.bits:
            trailing = by_output(self.trailing.view(-1, self.groups, 256)[first:last])
        codes = _codes(by_output(high[..., :256]), trailing, self.bits, bits, 4)
        numbers = high[..., 256:].contiguous().view(torch.float16).float()
        scale, low = numbers.unflatten(-1, (2, HEAD_TILE)).permute(2, 0, 3, 1)[..., None]
        rows = torch.addcmul(low, codes.reshape(*scale.shape[:3], GROUP), scale)
        return rows.flatten(2).flatten(0, 1)[:, : self.n_in]

    def rounded(self, x: Tensor) -> Tensor:
        """X (T, D) as activations of 8 bits stand for it, fp32."""
        code, step = quantize_activations(x.float())
        return (code * step[..., None]).flatten(1)[:, : self.n_in]

    def survivors(
        self, x: Tensor, count: int, screened: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two-stage head: screen all rows by their leading four bits, then rank the best.

        Args:
            x: (T, D), normed.
            count: Rows that the second stage reads whole.
            screened: (T, V) what the first stage found; by default it is computed here.

        Returns:
            (T, count) token ids, rising, and their exact logits.
        """
        count = min(count, self.n_out)
        screened = self.multiply(x, 4) if screened is None else screened
        ids = screened.topk(count, dim=-1).indices.sort(-1).values
        rounded = self.rounded(x)
        rows = self.rows(ids.flatten()).view(*ids.shape, self.n_in)
        logits = (rows @ rounded[..., None]).squeeze(-1)
        return ids, logits if self.bias is None else logits + self.bias[ids]


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x (T, in) fp32 to 8 bits in groups of 32; channels that are not read must hold 0.

    Returns:
        (T, groups, 32) whole numbers from -127 to 127, as floats, padded with zeros; (T, groups)
        the step that one unit stands for.
    """
    groups = groups_of(x.shape[1])
    padded = torch.nn.functional.pad(x, (0, groups * GROUP - x.shape[1])).unflatten(-1, (-1, GROUP))
    step = padded.abs().amax(-1) / 127
    divisor = torch.where(step > 0, step, torch.ones_like(step))
    return (padded / divisor[..., None]).round(), step


def _kept(x: Tensor, counts: IntArray) -> Tensor:
    """Which channels (T, in) are read: the counts[t] of largest |x|; ties go to the lower one."""
    order = x.abs().argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(x.shape[1]) < torch.from_numpy(counts)[:, None]
    return torch.zeros_like(first).scatter_(-1, order, first)


def _write_tiles(
    high: Tensor, trailing: Tensor | None, start: int, codes: Tensor, scale: Tensor, low: Tensor
) -> None:
    """Write outputs from `start` on: codes (groups, 32, N), scales and lows (groups, N)."""
    groups, _, n = codes.shape
    for first, tiles, tile in _cuts(n):
        columns = slice(first, first + tiles * tile)
        part = _tiled(codes[..., columns], tile)
        blob = _high_part(high, start + first, tiles, tile, groups)
        blob[..., : GROUP * tile // 2] = _nibbles(part if trailing is None else part >> 4)
        for place, numbers in enumerate((scale, low)):
            at = GROUP * tile // 2 + place * 2 * tile
            numbers = numbers[:, columns].reshape(groups, tiles, tile).transpose(0, 1)
            blob[..., at : at + 2 * tile] = numbers.contiguous().view(torch.uint8)
        if trailing is not None:
            _trailing_part(trailing, start + first, tiles, tile, groups)[:] = _nibbles(part & 15)


def _write_head(
    high: Tensor, trailing: Tensor | None, start: int, codes: Tensor, scale: Tensor, low: Tensor
) -> None:
    """The same for the head, whose planes are (tiles, groups, bytes of a group)."""
    groups, n = codes.shape[0], codes.shape[2] // HEAD_TILE
    # (groups, j, half, c, tiles, output) to (tiles, groups, j, output, half, c)
    codes = codes.view(groups, 4, 2, 4, n, HEAD_TILE).permute(4, 0, 1, 5, 2, 3).contiguous()
    at = slice(start // HEAD_TILE, start // HEAD_TILE + n)
    high[at, :, :256] = _joined(codes if trailing is None else codes >> 4, -2).flatten(2)
    for begin, numbers in ((256, scale), (288, low)):
        numbers = numbers.view(groups, n, HEAD_TILE).transpose(0, 1).contiguous()
        high[at, :, begin : begin + 32] = numbers.view(torch.uint8)
    if trailing is not None:
        trailing[at] = _joined(codes & 15, -2).flatten(2)


def _cuts(outputs: int) -> Iterator[tuple[int, int, int]]:
    """(first output, tiles, width of a tile) of padded outputs: whole tiles, then a half one."""
    whole = outputs // TILE
    if whole:
        yield 0, whole, TILE
    if outputs % TILE:
        yield whole * TILE, 1, HALF_TILE


def _high_part(high: Tensor, first: int, tiles: int, tile: int, groups: int) -> Tensor:
    """The tiles of one width, (tiles, groups, bytes of a group)."""
    size = tile * 20
    start = first * groups * 20
    return high[start : start + tiles * groups * size].view(tiles, groups, size)


def _trailing_part(trailing: Tensor, first: int, tiles: int, tile: int, groups: int) -> Tensor:
    size = tile // 2 * GROUP
    start = first // 2 * GROUP * groups
    return trailing[start : start + tiles * groups * size].view(tiles, groups, size)


def _tiled(codes: Tensor, tile: int) -> Tensor:
    """Codes (groups, 32, tiles tile) as (tiles, groups, 32, half, l, i, b), the order of bytes."""
    groups, _, outputs = codes.shape
    parts = codes.view(groups, GROUP, outputs // tile, 2, 4, tile // 32, 4)
    return parts.permute(2, 0, 1, 3, 5, 4, 6).contiguous()


def _plain(x: Tensor, tile: int) -> Tensor:
    """(..., half, tile / 2) in the order of bytes to (..., tile) in the order of outputs."""
    return x.unflatten(-1, (tile // 32, 4, 4)).transpose(-3, -2).flatten(-4)


def _nibbles(part: Tensor) -> Tensor:
    """Codes as `_tiled` gives them to bytes (tiles, groups, 32 tile / 2)."""
    return _joined(part, 3).flatten(2)


def _joined(codes: Tensor, half: int) -> Tensor:
    """Pairs of 4-bit codes along the axis `half` to bytes, the first one low."""
    low, high = codes.unbind(half)
    return low | (high << 4)


def _codes(high: Tensor, trailing: Tensor | None, stored: int, bits: int, run: int) -> Tensor:
    """Codes at `bits` bits, fp32, of bytes whose last axis splits in runs of `run`.

    (..., n) bytes to (..., n / run, 2, run): the low nibbles of a run, then its high ones.
    """
    nibbles = _split(high, run)
    if stored == 8:
        nibbles = nibbles * 16
    if bits >= stored:
        if trailing is not None:
            nibbles = nibbles + _split(trailing, run)
        return nibbles.float()
    drop = stored - bits
    return ((nibbles >> drop << drop) + (1 << drop) // 2).float()


def _split(packed: Tensor, run: int) -> Tensor:
    packed = packed.unflatten(-1, (-1, run))
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
