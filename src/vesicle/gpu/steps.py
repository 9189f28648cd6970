"""Launches the kernels of a pass: on a few rows for decoding, or one row per token for prefill.

`Rows` is the device memory that a pass over n rows works in; `Gear` a method's equipment and
predictor there; `Steps` the launches. Nothing here knows of sequences.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.effectors import DopaminePrecision, GabaSparsity, SerotoninDepth
from vesicle.errors import VesicleError
from vesicle.gpu.cache import PagePool
from vesicle.gpu.weights import FORMATS, Packed, Weights
from vesicle.plan import BLOCK, FFN_BIG, FFN_SMALL
from vesicle.predictors.linear import LinearPredictor
from vesicle.standins import StandIns
from vesicle.transmitters import index

N_FIELDS, N_COUNTS = 7, 6
FFN, RUN, BLOCKS = 4, 5, 6
VISITED = 4
MOST_ROWS = 16
_FLEX_FROM = 128
"""Rows from which block-sparse prefill takes FlexAttention, which works on tiles of 128 queries."""


def load_kernels(device: torch.device | str | None) -> tuple[ModuleType, torch.device]:
    """The kernels, and the device they run on: the GPU, or the CPU in Triton's interpreter.

    Raises:
        VesicleError: If Triton is not installed, or there is no GPU and no interpreter.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise VesicleError(
            "the GPU engine needs Triton, which is not installed; pip install 'vesicle[gpu]'"
        ) from error
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device is None:
        device = "cpu" if interpreted or not torch.cuda.is_available() else "cuda"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise VesicleError(f"device is {str(device)!r}, but PyTorch sees no GPU")
    if device.type != "cuda" and not interpreted:
        raise VesicleError(
            "the GPU engine needs an NVIDIA GPU and PyTorch sees none "
            "(TRITON_INTERPRET=1 runs its kernels on the CPU, slowly, for tests)"
        )
    from vesicle.gpu import kernels

    return kernels, device


@dataclass(frozen=True, kw_only=True)
class Gear:
    """A method's stand-ins and linear predictor on the device.

    Attributes:
        ffn: Stand-in of skipped FFNs (down, up, bias), or None.
        attention: Of skipped attention layers.
        chooses: Whether any Plan may read fewer than all blocks.
        readout: (L, A, D) fp32; one number without a predictor.
        bias: (L, A, 3) fp64: offset, slope, place.
        settings: (9,) fp64, see `kernels._release`.
        columns: (A,) places among the five transmitters.
        released: Names of the A transmitters; empty without a predictor.
    """

    ffn: tuple[Tensor, Tensor, Tensor] | None
    attention: tuple[Tensor, Tensor, Tensor] | None
    chooses: bool
    readout: Tensor
    bias: Tensor
    settings: Tensor
    columns: Tensor
    released: tuple[str, ...]

    @classmethod
    def make(
        cls,
        ffn: StandIns | None,
        attention: StandIns | None,
        predictor: LinearPredictor | None,
        effectors: tuple[DopaminePrecision, SerotoninDepth, GabaSparsity],
        chooses: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Gear:
        """Copy to the device."""

        def standin(module: StandIns | None) -> tuple[Tensor, Tensor, Tensor] | None:
            if module is None:
                return None
            down, up, bias = (
                p.detach().to(device, dtype).contiguous()
                for p in (module.down, module.up, module.bias)
            )
            return down, up, bias

        dopamine, serotonin, gaba = effectors
        none = torch.zeros(1, dtype=torch.float64, device=device)
        readout, bias = none.float(), none
        if predictor is not None:
            readout = predictor.weight.detach().to(device, torch.float32).contiguous()
            offset, slope, place = (
                p.detach().double()
                for p in (predictor.offset, predictor.log_slope, predictor.position_weight)
            )
            bias = torch.stack([offset, slope.exp(), place], -1).to(device).contiguous()
        names = () if predictor is None else predictor.config.transmitters
        settings = [
            *dopamine.site_rates,
            dopamine.floor,
            serotonin.ffn_below,
            serotonin.attention_below,
            serotonin.bypass_below,
            gaba.least,
        ]
        return cls(
            ffn=standin(ffn),
            attention=standin(attention),
            chooses=chooses,
            readout=readout,
            bias=bias,
            settings=torch.tensor(settings, dtype=torch.float64, device=device),
            columns=torch.tensor([index(n) for n in names], dtype=torch.int32, device=device),
            released=names,
        )


class Rows:
    """Device memory of a pass over n rows.

    Attributes:
        plan: (S, n, L, 7) int32, rows of the Plan of S steps: given, or released as layers run.
        counts: (S, n, L, 6) int32.
        levels: (S, n, L, 5) fp64.
        step: (1,) which of the S steps is next.
        tokens: (n,) token ids to feed.
        drawn: (S, n) ids of the largest logit after each step.
        positions: (n,) int32.
        table: (n, most) pages of each row's sequence; one shared row in prefill.
        dial: (n,) fp64, log((1 - dial) / dial) of rows that release.
        released: (n,) 1 where a modulator decides.
        kind: (n,) how blocks are summarised: 0 mean, 1 bounds.
    """

    def __init__(
        self, weights: Weights, n: int, *, steps: int, most: int, wide: bool, device: torch.device
    ) -> None:
        """All zero.

        Args:
            weights: Of the decoder.
            n: Rows.
            steps: S.
            most: Most blocks that a row may see; a power of two.
            wide: Whether rows are the tokens of one sequence, for PyTorch's products.
            device: Where.
        """
        shape = weights.config.shape
        self.n, self.most, self.wide, self.n_steps = n, most, wide, steps
        self.device = device
        # Two waves of programs keep a GPU's memory busy. Elsewhere, two splits test the sums.
        self._programs = 0
        if device.type == "cuda":
            self._programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        layers, h, k = shape.n_layers, shape.n_heads, shape.head_size
        widest = max(shape.site_widths)
        packed = [weights.layers[0].attention_in, weights.layers[0].attention_out]
        packed += [weights.layers[0].ffn_in, weights.layers[0].ffn_out]
        room = max(self.splits(p) * p.n_out for p in packed)
        self.attention_splits = 1 if wide else self._attention_splits(shape.n_kv_heads)

        def make(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        i32 = torch.int32
        self.plan = make(steps, n, layers, N_FIELDS, dtype=i32)
        self.counts = make(steps, n, layers, N_COUNTS, dtype=i32)
        self.levels = torch.ones(steps, n, layers, 5, dtype=torch.float64, device=device)
        self.step = make(1, dtype=torch.int64)
        self.tokens = make(n, dtype=torch.int64)
        self.drawn = make(steps, n, dtype=torch.int64)
        self.positions = make(n, dtype=i32)
        self.table = make(1, most, dtype=i32).expand(n, most) if wide else make(n, most, dtype=i32)
        self.dial = make(n, dtype=torch.float64)
        self.released, self.kind = make(n, dtype=i32), make(n, dtype=i32)
        self.hidden, self.normed = make(n, shape.width), make(n, shape.width)
        self.standin = make(n, shape.width)
        self.inputs = make(n * widest)
        self.list, self.count = make(widest, dtype=i32), make(2, dtype=i32)
        self.parts = make(n * room)
        self.query = make(n, h, k)
        self.logits_of_blocks = make(n, h, most)
        self.blocks = make(n, shape.n_kv_heads, most, dtype=i32)
        self.mixed = make(n, h, self.attention_splits, k)
        self.norms = make(n, h, self.attention_splits, 2)
        self.logits = make(1 if wide else n, shape.vocabulary)

    def splits(self, packed: Packed) -> int:
        """Parts that a projection's input channels are cut into."""
        if self.wide:
            return 1
        if not self._programs:
            return 2
        tiles = -(-packed.n_out // block_outputs(packed))
        return max(1, min(self._programs // tiles, packed.n_in // 64, 16))

    def _attention_splits(self, n_kv_heads: int) -> int:
        if not self._programs:
            return 2
        return max(1, min(self._programs // (self.n * n_kv_heads), self.most // 4, 32))


def block_outputs(packed: Packed) -> int:
    """Outputs per program of `project`."""
    return 128 if packed.n_out >= 4096 else 64


def _cover(size: int, least: int = 16) -> int:
    """A power of two that covers an axis."""
    return max(least, 1 << (size - 1).bit_length())


def _warps(size: int) -> int:
    return 4 if size <= 1024 else 8 if size <= 4096 else 16


class Steps:
    """The launches of a decoder's passes, for one gear."""

    def __init__(
        self,
        kernels: ModuleType,
        weights: Weights,
        pool: PagePool,
        gear: Gear,
        rotation: tuple[Tensor, Tensor],
    ) -> None:
        """Bind.

        Args:
            kernels: From `load_kernels`.
            weights: The decoder.
            pool: Its cache.
            gear: Of the methods of the rows.
            rotation: (positions, K / 2) cosines and sines.
        """
        self._k: Any = kernels
        self.weights, self.pool, self.gear, self.rotation = weights, pool, gear, rotation
        self.shape = weights.config.shape
        self._scale = self.shape.head_size**-0.5
        self._grouped = FORMATS[weights.format] != 0
        self._precision = "ieee" if weights.format == "fp32" else "tf32"
        self._dtype = weights.embedding.dtype

    def decode(self, rows: Rows) -> None:
        """One step of n rows: feeds `tokens`, leaves `logits`, and moves on to the next step.

        Only device memory decides what happens: no launch depends on a value, so that the whole can
        be captured.
        """
        rows.hidden.copy_(self.weights.embedding[rows.tokens])
        for number in range(self.shape.n_layers):
            self.attention(rows, number)
            self._normalise(rows, number, add=1, site=2)
            self.ffn(rows, number)
        self.head(rows)
        self._project(rows, self.shape.n_layers, 4, self.weights.head, rows.logits)
        torch.argmax(rows.logits, -1, out=rows.tokens)
        rows.drawn.index_copy_(0, rows.step, rows.tokens[None])
        rows.positions.add_(1)
        rows.step.add_(1)

    def attention(self, rows: Rows, number: int) -> None:
        """From the residual stream to the attention's output, in `rows.parts`."""
        w, gear = self.weights.layers[number], self.gear
        self._normalise(rows, number, add=2 if number else 0, site=0)
        self._project(rows, number, 0, w.attention_in)
        if gear.attention:
            self._stand_in(rows, number, gear.attention, RUN, 0)
        self._append(rows, number)
        self._attend(rows, number)
        k, shape = self._k, self.shape
        width = _cover(shape.query_width, 32)
        k.combine[(rows.n,)](
            rows.mixed, rows.norms, rows.inputs, rows.list, rows.count,
            rows.plan, rows.counts, rows.step, number, rows.n,
            L=shape.n_layers, H=shape.n_heads, K=shape.head_size, P=width,
            SPLITS=rows.attention_splits, **self._listing(rows), num_warps=_warps(width),
        )  # fmt: skip
        self._project(rows, number, 1, w.attention_out)

    def settle(self, rows: Rows, number: int) -> None:
        """Add the attention's output to the residual stream, and no more."""
        self._normalise(rows, number, add=1, site=5)

    def ffn(self, rows: Rows, number: int, *, settled: bool = False) -> None:
        """From the chosen channels at ffn_in to the FFN's output, in `rows.parts`."""
        w, gear, shape = self.weights.layers[number], self.gear, self.shape
        if settled:
            self._normalise(rows, number, add=0, site=2)
        self._project(rows, number, 2, w.ffn_in)
        if gear.ffn:
            self._stand_in(rows, number, gear.ffn, FFN, FFN_SMALL)
        bias, width = w.ffn_in.bias, _cover(shape.ffn_width, 32)
        self._k.activate[(rows.n,)](
            rows.parts, rows.parts if bias is None else bias, rows.inputs, rows.list, rows.count,
            rows.plan, rows.counts, rows.step, number, rows.n,
            L=shape.n_layers, F=shape.ffn_width, P=width, SPLITS=rows.splits(w.ffn_in),
            BIAS=bias is not None, **self._listing(rows), num_warps=_warps(width),
        )  # fmt: skip
        self._project(rows, number, 3, w.ffn_out)

    def head(self, rows: Rows) -> None:
        """Add the last FFN's output, and normalise for the LM head."""
        self._normalise(rows, self.shape.n_layers, add=2, site=4)

    def logits(self, rows: Rows, which: slice) -> Tensor:
        """The LM head for some rows of a wide pass, after `head`: (number of them, V) fp32."""
        x = rows.inputs[: rows.n * self.shape.width].view(rows.n, -1)[which]
        out = (x.to(self._dtype) @ self.weights.head.dense(self._dtype)).float()
        return out if self.weights.head.bias is None else out + self.weights.head.bias

    def _listing(self, rows: Rows) -> dict[str, bool]:
        return {"ALONE": rows.n == 1 and not rows.wide, "GROUPED": self._grouped}

    def _normalise(self, rows: Rows, number: int, *, add: int, site: int) -> None:
        shape, gear, w = self.shape, self.gear, self.weights
        before = None
        if add:
            before = w.layers[number].attention_out if add == 1 else w.layers[number - 1].ffn_out
        gain = w.final_gain
        if site < 4:
            gain = w.layers[number].attention_gain if site == 0 else w.layers[number].ffn_gain
        bias = None if before is None else before.bias
        releases = site == 2
        names = gear.released if releases else ()
        places = {
            n: names.index(n) if n in names else -1 for n in ("dopamine", "serotonin", "gaba")
        }
        width = _cover(shape.width, 32)
        self._k.normalise[(rows.n,)](
            rows.hidden, rows.parts, rows.parts if bias is None else bias, rows.standin,
            gain, rows.normed, rows.inputs, rows.list, rows.count,
            rows.plan, rows.counts, rows.step, rows.positions,
            rows.levels, rows.dial, rows.released,
            gear.readout, gear.bias, gear.settings, gear.columns,
            number, rows.n, w.config.norm_eps,
            L=shape.n_layers, D=shape.width, Q=shape.query_width, F=shape.ffn_width, P=width,
            ADD=add, SPLITS=1 if before is None else rows.splits(before), BIAS=bias is not None,
            STANDIN=gear.ffn is not None or gear.attention is not None, SITE=site, A=len(names),
            DOPAMINE=places["dopamine"], SEROTONIN=places["serotonin"], GABA=places["gaba"],
            **self._listing(rows), num_warps=_warps(width),
        )  # fmt: skip

    def _stand_in(
        self, rows: Rows, number: int, maps: tuple[Tensor, Tensor, Tensor], field: int, value: int
    ) -> None:
        down, up, bias = maps
        rank = down.shape[1]
        self._k.stand_in[(rows.n,)](
            rows.normed, down, up, bias, rows.standin, rows.plan, rows.step, number, rows.n,
            L=self.shape.n_layers, D=self.shape.width, RANK=rank, PR=_cover(rank), TILE=64,
            FIELD=field, VALUE=value,
        )  # fmt: skip

    def _project(
        self, rows: Rows, number: int, site: int, packed: Packed, out: Tensor | None = None
    ) -> None:
        if rows.wide:
            self._product(rows, number, site, packed)
            return
        shape = self.shape
        if rows.n > 1:
            width = _cover(packed.n_in, 32)
            self._k.unite[(1,)](
                rows.inputs, rows.list, rows.count, rows.n,
                width=packed.n_in, P=width, GROUPED=self._grouped, num_warps=_warps(width),
            )  # fmt: skip
        # The head's logits have one reader, which takes whole sums.
        splits = 1 if site == 4 else rows.splits(packed)
        size = block_outputs(packed)
        self._k.project[(-(-packed.n_out // size), splits)](
            rows.inputs, rows.list, rows.count, packed.data, packed.scale, packed.low,
            rows.parts if out is None else out,
            rows.plan, rows.step, number, rows.n, 2 * shape.kv_width,
            L=shape.n_layers, C=packed.n_in, O=packed.n_out, FORMAT=FORMATS[packed.format],
            N=1 if rows.n == 1 else MOST_ROWS, BLOCK_C=32, BLOCK_O=size, SPLITS=splits,
            SKIPS=site == 0, PRECISION=self._precision,
        )  # fmt: skip
        if site == 4 and packed.bias is not None:
            rows.logits.add_(packed.bias)

    def _product(self, rows: Rows, number: int, site: int, packed: Packed) -> None:
        """`project` for many rows, by PyTorch; rows whose module does not run are left out."""
        x = rows.inputs[: rows.n * packed.n_in].view(rows.n, -1)
        out = rows.parts[: rows.n * packed.n_out].view(rows.n, -1)
        weight = packed.dense(self._dtype)
        if site == 0:
            out.copy_(x.to(self._dtype) @ weight)
            return
        plan = rows.plan[0, :, number]
        runs = plan[:, RUN] == 1 if site == 1 else plan[:, FFN] == FFN_BIG
        chosen = runs.nonzero()[:, 0]
        if len(chosen):
            out[chosen] = (x[chosen].to(self._dtype) @ weight).float()

    def _append(self, rows: Rows, number: int) -> None:
        shape, pool, w = self.shape, self.pool, self.weights.layers[number].attention_in
        self._k.append[(rows.n, 2 * shape.n_kv_heads + shape.n_heads)](
            rows.parts, rows.parts if w.bias is None else w.bias, *self.rotation, rows.query,
            pool.keys[number], pool.values[number], pool.summaries[number],
            rows.table, rows.kind, rows.plan, rows.step, rows.positions,
            number, rows.n, rows.table.stride(0),
            L=shape.n_layers, H=shape.n_heads, G=shape.n_kv_heads, K=shape.head_size,
            PK=_cover(shape.head_size), SPLITS=rows.splits(w), BIAS=w.bias is not None,
            ROTATES=self.weights.config.rotary_layers[number], SUMMARISE=not rows.wide,
            num_warps=1,
        )  # fmt: skip

    def summarise(self, number: int, pages: Tensor, kind: Tensor) -> None:
        """Summaries of complete blocks, by page, in one layer."""
        shape, pool = self.shape, self.pool
        if len(pages):
            self._k.summarise[(len(pages), shape.n_kv_heads)](
                pool.keys[number], pool.summaries[number], pages, kind,
                G=shape.n_kv_heads, K=shape.head_size, PK=_cover(shape.head_size), num_warps=1,
            )  # fmt: skip

    def _attend(self, rows: Rows, number: int) -> None:
        if not rows.wide:
            if self.gear.chooses:
                self._choose(rows, number)
            self._attend_blocks(rows, number)
            return
        # Blocks completed in this pass may be chosen by its later tokens.
        first = max(int(rows.positions[0]) // BLOCK - 1, 0)
        last = (int(rows.positions[-1]) + 1) // BLOCK
        self.summarise(number, rows.table[0, first:last].contiguous(), rows.kind)
        plan = rows.plan[0, :, number]
        runs = plan[:, RUN] == 1
        if bool((runs & (plan[:, BLOCKS] <= rows.positions // BLOCK)).any()):
            self._choose(rows, number)
            if rows.device.type == "cuda" and rows.n >= _FLEX_FROM:
                self.attend_flex(rows, number)
            else:
                self._attend_blocks(rows, number)
        elif bool(runs.any()):
            self._attend_dense(rows, number)

    def _choose(self, rows: Rows, number: int) -> None:
        shape, tile = self.shape, min(rows.most, 64)
        common = {
            "L": shape.n_layers,
            "H": shape.n_heads,
            "G": shape.n_kv_heads,
            "MOST": rows.most,
        }
        self._k.score_blocks[(rows.n, shape.n_kv_heads, -(-rows.most // tile))](
            rows.query, self.pool.summaries[number], rows.table, rows.kind, rows.logits_of_blocks,
            rows.plan, rows.step, rows.positions,
            number, rows.n, rows.table.stride(0), self._scale,
            K=shape.head_size, PK=_cover(shape.head_size), TILE=tile, **common,
        )  # fmt: skip
        self._k.choose_blocks[(rows.n, shape.n_kv_heads)](
            rows.logits_of_blocks, rows.blocks,
            rows.plan, rows.counts, rows.step, rows.positions, number, rows.n,
            P=rows.most, num_warps=_warps(rows.most), **common,
        )  # fmt: skip

    def _attend_blocks(self, rows: Rows, number: int) -> None:
        shape, pool = self.shape, self.pool
        self._k.attend[(rows.n, shape.n_kv_heads, rows.attention_splits)](
            rows.query, pool.keys[number], pool.values[number], rows.table, rows.blocks,
            rows.mixed, rows.norms, rows.plan, rows.counts, rows.step, rows.positions,
            number, rows.n, rows.table.stride(0), self._scale,
            L=shape.n_layers, H=shape.n_heads, G=shape.n_kv_heads, K=shape.head_size,
            PK=_cover(shape.head_size), M=_cover(shape.n_heads // shape.n_kv_heads),
            MOST=rows.most, SPLITS=rows.attention_splits, MANY=4, PRECISION=self._precision,
        )  # fmt: skip

    # Attention of many rows, by PyTorch ---------------------------------------------------------

    def _cached(self, rows: Rows, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (1, H, n, K), and keys and values (1, G, S, K) of whole blocks."""
        pages = rows.table[0, : int(rows.positions[-1]) // BLOCK + 1].long()
        keys, values = (
            cache[number][pages].transpose(0, 1).flatten(1, 2)[None]
            for cache in (self.pool.keys, self.pool.values)
        )
        return rows.query.transpose(0, 1)[None].to(keys.dtype), keys, values

    def _store(self, rows: Rows, number: int, out: Tensor, visited: Tensor) -> None:
        """Leave attention (1, H, n, K) where `combine` finds it, as one whole split."""
        rows.mixed[:, :, 0] = out[0].transpose(0, 1).float()
        rows.norms[..., 0], rows.norms[..., 1] = 0.0, 1.0
        plan = rows.plan[0, :, number]
        rows.counts[0, :, number, VISITED] = torch.where(plan[:, RUN] == 1, visited, 0).int()

    def _attend_dense(self, rows: Rows, number: int) -> None:
        query, keys, values = self._cached(rows, number)
        slots = torch.arange(keys.shape[2], device=rows.device)
        out = nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=slots <= rows.positions[:, None],
            scale=self._scale,
            enable_gqa=True,
        )
        self._store(rows, number, out, rows.positions + 1)

    def attend_flex(self, rows: Rows, number: int) -> None:
        """Attention over chosen blocks by FlexAttention, whose tiles no query chose are skipped."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        query, keys, values = self._cached(rows, number)
        g, n, blocks = self.shape.n_kv_heads, rows.n, keys.shape[2] // BLOCK
        ratio, positions = self.shape.n_heads // g, rows.positions
        visible = positions // BLOCK + 1
        wanted = rows.plan[0, :, number, BLOCKS].minimum(visible)
        place = torch.arange(rows.most, device=rows.device)
        listed = (place < wanted[:, None])[:, None]  # (n, 1, most)
        allowed = torch.zeros(n, g, blocks + 1, dtype=torch.bool, device=rows.device)
        allowed.scatter_(2, torch.where(listed, rows.blocks, blocks).long(), True)
        allowed |= (wanted == visible)[:, None, None]

        def mask(batch: Tensor, head: Tensor, q: Tensor, slot: Tensor) -> Tensor:
            return allowed[q, head // ratio, slot // BLOCK] & (slot <= positions[q])

        tiles = create_block_mask(
            mask, None, self.shape.n_heads, n, keys.shape[2], device=rows.device
        )
        run: Any = flex_attention
        if rows.device.type == "cuda":
            run = torch.compile(flex_attention)
        out = run(query, keys, values, block_mask=tiles, scale=self._scale, enable_gqa=True)
        self._store(rows, number, out, (wanted - 1) * BLOCK + positions % BLOCK + 1)
