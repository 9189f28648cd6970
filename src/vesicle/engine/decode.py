"""The fast path of decoding: one token of one sequence through all layers in one native call.

The kernel knows RMSNorm, rotary over the whole head, SiLU-gated FFNs and fp32 weights; it releases
levels with the linear predictor and decides as the effectors do. Where a Plan sends the token to a
stand-in the kernel returns, the engine's general path runs that half of the layer, and the kernel
goes on. Everything else - other predictors and families, fewer bits, several tokens - takes the
general path throughout. Both count alike, and a test holds their Plans and logits equal.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.engine.cache import LayerCache
from vesicle.engine.counters import Counters
from vesicle.engine.native import library
from vesicle.engine.weights import Weights
from vesicle.modulator import ModulatorAuthor
from vesicle.plan import (
    BLOCK,
    FFN_BIG,
    FULL_BITS,
    AttentionDecision,
    Author,
    FfnDecision,
    IntArray,
    PlanBuilder,
)
from vesicle.predictors.linear import LinearPredictor
from vesicle.shapes import Overhead
from vesicle.transmitters import NAMES, index

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Layer(ctypes.Structure):
    """Mirrors `Layer` in native.cpp."""

    _fields_ = [
        *((name, _LONG) for name in ("width", "heads", "kv_heads", "size", "ffn_width")),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
        *(
            (name, _POINTER)
            for name in (
                "attention_gain",
                "attention_in",
                "attention_in_bias",
                "attention_out",
                "attention_out_bias",
                "ffn_gain",
                "ffn_in",
                "ffn_in_bias",
                "ffn_out",
                "ffn_out_bias",
            )
        ),
    ]


class _Token(ctypes.Structure):
    """Mirrors `Token` in native.cpp."""

    _fields_ = [
        *((n, _LONG) for n in ("n_layers", "layer", "half", "position", "vectors", "released")),
        *(
            (name, _POINTER)
            for name in (
                "layers",
                "keys",
                "values",
                "capacities",
                "summaries",
                "rooms",
                "rotates",
                "cosine",
                "sine",
                "hidden",
                "after",
                "channels",
                "module",
                "run",
                "kv_blocks",
                "levels",
                "rows",
                "outputs",
                "visited",
                "compared",
                "weight",
                "offset",
                "log_slope",
                "place_weight",
            )
        ),
        ("pressure", ctypes.c_double),
        ("place", ctypes.c_double),
        ("rates", ctypes.c_double * 4),
        *((n, ctypes.c_double) for n in ("floor", "ffn_below", "attention_below", "bypass_below")),
        ("least", _LONG),
        ("columns", _INT * 8),
    ]


@dataclass(frozen=True, kw_only=True)
class General:
    """The engine's general path for one half of a layer, for the token at hand.

    Attributes:
        attention: (layer, hidden (1, D), decision) to attention's contribution (1, D).
        ffn: (layer, residual stream (1, D), decision) to the FFN's contribution (1, D).
    """

    attention: Callable[[int, Tensor, AttentionDecision], Tensor]
    ffn: Callable[[int, Tensor, FfnDecision], Tensor]


class CachePointers:
    """Addresses of one sequence's caches, renewed when a cache has moved or a block is complete."""

    def __init__(self, caches: list[LayerCache]) -> None:
        """For the caches of all layers."""
        n = len(caches)
        self.caches = caches
        self._keys_at, self._block = 0, -1
        self.keys, self.values, self.summaries = (np.zeros(n, np.uint64) for _ in range(3))
        self.capacities, self.rooms = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.vectors = 0

    def renew(self, position: int, summary: str | None) -> None:
        """Make room for `position`; with a summary, bring the summaries of blocks up to date."""
        if self.caches[0].keys.data_ptr() != self._keys_at or position >= self.capacities[0]:
            for i, cache in enumerate(self.caches):
                cache.grow(position + 1)
                self.keys[i], self.values[i] = cache.keys.data_ptr(), cache.values.data_ptr()
                self.capacities[i] = cache.keys.shape[1]
            self._keys_at = self.caches[0].keys.data_ptr()
        if summary is not None and self._block != position // BLOCK:
            for i, cache in enumerate(self.caches):
                blocks = cache.summaries(summary)
                self.vectors = int(blocks.shape[2])
                self.rooms[i] = blocks.stride(0) // (self.vectors * blocks.shape[3])
                self.summaries[i] = blocks.data_ptr()
            self._block = position // BLOCK


class Decoder:
    """Runs single tokens natively."""

    def __init__(self, weights: Weights, kernels: ctypes.CDLL, scale: float) -> None:
        """Use `build`."""
        shape, config = weights.config.shape, weights.config
        self._kernels, self._shape, self._weights = kernels, shape, weights
        layers = (_Layer * shape.n_layers)()
        for layer, w in zip(layers, weights.layers, strict=True):
            layer.width, layer.heads, layer.kv_heads = shape.width, shape.n_heads, shape.n_kv_heads
            layer.size, layer.ffn_width = shape.head_size, shape.ffn_width
            layer.eps, layer.scale = config.norm_eps, scale
            tensors = {
                "attention_gain": w.attention_norm.weight,
                "attention_in": w.attention_in.weight,
                "attention_in_bias": w.attention_in.bias,
                "attention_out": w.attention_out.weight,
                "attention_out_bias": w.attention_out.bias,
                "ffn_gain": w.ffn_norm.weight,
                "ffn_in": w.ffn_in.weight,
                "ffn_in_bias": w.ffn_in.bias,
                "ffn_out": w.ffn_out.weight,
                "ffn_out_bias": w.ffn_out.bias,
            }
            for name, tensor in tensors.items():
                setattr(layer, name, None if tensor is None else tensor.data_ptr())
        self._layers = layers
        self._rotates = np.array(config.rotary_layers, np.int64)
        self._widths = np.array(shape.site_widths, np.int32)

    @classmethod
    def build(cls, weights: Weights, scale: float) -> Decoder | None:
        """A decoder for these weights, or None where the kernel does not cover them."""
        config, kernels = weights.config, library()
        if kernels is None:
            return None
        covered = (
            weights.embedding.dtype == torch.float32
            and weights.embedding.device.type == "cpu"
            and config.rms_norm
            and not config.parallel_residual
            and config.activation == "silu"
            and config.shape.gated
            and 2 * len(config.rotary_frequencies) == config.shape.head_size
            and all(w.query_norm is None and w.key_norm is None for w in weights.layers)
            and all(
                p.weight.is_contiguous()
                for w in weights.layers
                for p in (w.attention_norm, w.ffn_norm)
            )
        )
        return cls(weights, kernels, scale) if covered else None

    def covers(self, author: Author) -> bool:
        """Whether the kernel can decide as this author does."""
        if not isinstance(author, ModulatorAuthor):
            return author.rests
        modulator = author.modulator
        return author.rests or (
            isinstance(modulator.predictor, LinearPredictor)
            and all(bits == FULL_BITS for _, bits in modulator.dopamine.bits_ladder)
        )

    def token(
        self,
        hidden: Tensor,
        position: int,
        author: Author,
        builder: PlanBuilder,
        pointers: CachePointers,
        rotation: tuple[Tensor, Tensor],
        counters: Counters,
        overhead: Overhead,
        general: General,
    ) -> Tensor:
        """Run a token through all layers.

        Args:
            hidden: (1, D) its embedding.
            position: In its sequence.
            author: Covered by `covers`; levels are left with it.
            builder: Whose newest chunk, of one token, takes the decisions.
            pointers: Of the sequence's caches, which take the token's keys and values.
            rotation: Cosines and sines of the position.
            counters: Of this pass.
            overhead: Of the sequence's method.
            general: Runs what the kernel does not.

        Returns:
            (1, D) the residual stream after the last layer.
        """
        n_layers = self._shape.n_layers
        rows = builder.newest
        rows["channels"][:] = self._widths
        rows["bits"][:] = FULL_BITS
        rows["ffn"][:] = FFN_BIG
        rows["attention"][:] = 1
        rows["kv_blocks"][:] = position // BLOCK + 1
        levels = np.ones((1, n_layers, len(NAMES)))
        hidden, after = hidden.clone(), torch.empty_like(hidden)
        token = _Token(
            n_layers=n_layers,
            position=position,
            layers=ctypes.addressof(self._layers),
            rotates=self._rotates.ctypes.data,
            cosine=rotation[0].data_ptr(),
            sine=rotation[1].data_ptr(),
            hidden=hidden.data_ptr(),
            after=after.data_ptr(),
            channels=rows["channels"].ctypes.data,
            module=rows["ffn"].ctypes.data,
            run=rows["attention"].ctypes.data,
            kv_blocks=rows["kv_blocks"].ctypes.data,
            levels=levels.ctypes.data,
        )
        counters.expose(token)
        summary = None
        if isinstance(author, ModulatorAuthor) and not author.rests:
            summary = self._release_with(token, author, position)
            counters.released(overhead, n_layers)
        pointers.renew(position, summary)
        token.keys, token.values = pointers.keys.ctypes.data, pointers.values.ctypes.data
        token.capacities = pointers.capacities.ctypes.data
        token.summaries, token.rooms = pointers.summaries.ctypes.data, pointers.rooms.ctypes.data
        token.vectors = pointers.vectors
        caches = pointers.caches
        done = 0
        while self._kernels.vesicle_decode_token_f32(ctypes.byref(token)):
            layer = token.layer
            for cache in caches[done:layer]:
                cache.length = position + 1
            if token.half == 0:
                after.copy_(hidden + general.attention(layer, hidden, _attention(rows, layer)))
                token.half, done = 1, layer + 1
            else:
                caches[layer].length, done = position + 1, layer + 1
                hidden.copy_(after + general.ffn(layer, after, _ffn(rows, layer)))
                token.half, token.layer = 0, layer + 1
        for cache in caches[done:]:
            cache.length = position + 1
        if isinstance(author, ModulatorAuthor):
            author.adopt(levels)
        return hidden

    def _release_with(self, token: _Token, author: ModulatorAuthor, position: int) -> str | None:
        """Set the token's modulator; returns the block summary if blocks may have to be chosen."""
        modulator, dial = author.modulator, author.dial
        predictor = modulator.predictor
        assert isinstance(predictor, LinearPredictor)
        token.weight, token.offset = predictor.weight.data_ptr(), predictor.offset.data_ptr()
        token.log_slope = predictor.log_slope.data_ptr()
        token.place_weight = predictor.position_weight.data_ptr()
        token.pressure = math.log((1 - dial) / dial)
        token.place = math.log2((position + 1) / 16) / 8
        names = predictor.config.transmitters
        token.released = len(names)
        for i, name in enumerate(names):
            token.columns[i] = index(name)
        dopamine, serotonin, gaba = modulator.dopamine, modulator.serotonin, modulator.gaba
        for i, rate in enumerate(dopamine.site_rates):
            token.rates[i] = rate
        token.floor, token.least = dopamine.floor, gaba.least
        token.ffn_below, token.attention_below = serotonin.ffn_below, serotonin.attention_below
        token.bypass_below = serotonin.bypass_below
        chooses = "gaba" in names and position // BLOCK + 1 > gaba.least
        return gaba.summary if chooses else None


def _attention(rows: dict[str, IntArray], layer: int) -> AttentionDecision:
    return AttentionDecision(
        channels=rows["channels"][:, layer, :2],
        bits=rows["bits"][:, layer, :2],
        run=rows["attention"][:, layer],
        kv_blocks=rows["kv_blocks"][:, layer],
        rest=False,
    )


def _ffn(rows: dict[str, IntArray], layer: int) -> FfnDecision:
    return FfnDecision(
        channels=rows["channels"][:, layer, 2:],
        bits=rows["bits"][:, layer, 2:],
        module=rows["ffn"][:, layer],
        rest=False,
    )
