"""The fast path of decoding: one token of one sequence, each half of a layer in one native call.

It runs the layers that the kernels know (RMSNorm, rotary over the whole head, SiLU-gated FFN, fp32,
stored weights) where the Plan runs them in full or by channels and blocks; the engine takes its
general path for anything else: stand-ins, fewer bits, other families. Both paths count alike.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vesicle.engine.cache import LayerCache
from vesicle.engine.counters import Counters
from vesicle.engine.native import library
from vesicle.engine.weights import Weights
from vesicle.plan import BLOCK, FULL_BITS, AttentionDecision, FfnDecision

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


class _Step(ctypes.Structure):
    """Mirrors `Step` in native.cpp."""

    _fields_ = [
        *((name, _LONG) for name in ("position", "capacity", "room", "vectors")),
        ("channels", _INT * 2),
        ("n_blocks", _INT),
        ("rows_read", _INT * 2),
        ("visited", _INT),
        ("compared", _INT),
        *(
            (name, _POINTER)
            for name in ("hidden", "cosine", "sine", "summaries", "keys", "values", "after")
        ),
    ]


class Stepper:
    """Runs halves of layers natively for one token."""

    def __init__(self, weights: Weights, kernels: ctypes.CDLL, scale: float) -> None:
        """Use `build`."""
        shape = weights.config.shape
        self._kernels, self._weights, self._shape = kernels, weights, shape
        self._layers = []
        for w in weights.layers:
            pointers = {
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
            self._layers.append(
                _Layer(
                    width=shape.width,
                    heads=shape.n_heads,
                    kv_heads=shape.n_kv_heads,
                    size=shape.head_size,
                    ffn_width=shape.ffn_width,
                    eps=weights.config.norm_eps,
                    scale=scale,
                    **{name: None if t is None else t.data_ptr() for name, t in pointers.items()},
                )
            )
        self._step = _Step()

    @classmethod
    def build(cls, weights: Weights, scale: float) -> Stepper | None:
        """A stepper for these weights, or None where the kernels do not cover them."""
        config, kernels = weights.config, library()
        covered = (
            kernels is not None
            and weights.embedding.dtype == torch.float32
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
        return cls(weights, kernels, scale) if covered and kernels is not None else None

    def attention(
        self,
        number: int,
        hidden: Tensor,
        cache: LayerCache,
        decision: AttentionDecision,
        rotation: tuple[Tensor, Tensor],
        summary: str,
        counters: Counters,
    ) -> Tensor | None:
        """The residual stream (1, D) after attention, or None if it needs the general path."""
        bits = decision.bits[0]
        if decision.run[0] != 1 or bits[0] != FULL_BITS or bits[1] != FULL_BITS:
            return None
        step, position = self._step, cache.length
        n_blocks = int(decision.kv_blocks[0])
        vectors = 0
        if n_blocks <= position // BLOCK:
            summaries = cache.summaries(summary)
            vectors = int(summaries.shape[2])
            step.room = summaries.stride(0) // (vectors * self._shape.head_size)
            step.vectors, step.summaries = vectors, summaries.data_ptr()
        cache.grow(position + 1)
        after = torch.empty_like(hidden)
        step.position, step.capacity = position, cache.keys.shape[1]
        step.channels[0], step.channels[1] = decision.channels[0].tolist()
        step.n_blocks = n_blocks
        step.hidden, step.after = hidden.data_ptr(), after.data_ptr()
        rotates = self._weights.config.rotary_layers[number]
        step.cosine = rotation[0].data_ptr() if rotates else None
        step.sine = rotation[1].data_ptr() if rotates else None
        step.keys, step.values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._kernels.vesicle_attention_step_f32(
            ctypes.byref(self._layers[number]), ctypes.byref(step)
        )
        cache.length += 1
        outputs = self._shape.site_outputs
        counters.one_token(number, 0, step.rows_read[0], outputs[0])
        counters.one_token(number, 1, step.rows_read[1], outputs[1])
        counters.one_query(number, step.visited, step.compared * vectors)
        return after

    def ffn(
        self, number: int, hidden: Tensor, decision: FfnDecision, counters: Counters
    ) -> Tensor | None:
        """The residual stream (1, D) after the FFN, or None if it needs the general path."""
        bits = decision.bits[0]
        if decision.module[0] != 2 or bits[0] != FULL_BITS or bits[1] != FULL_BITS:
            return None
        step = self._step
        after = torch.empty_like(hidden)
        step.channels[0], step.channels[1] = decision.channels[0].tolist()
        step.hidden, step.after = hidden.data_ptr(), after.data_ptr()
        self._kernels.vesicle_ffn_step_f32(ctypes.byref(self._layers[number]), ctypes.byref(step))
        outputs = self._shape.site_outputs
        counters.one_token(number, 2, step.rows_read[0], outputs[2])
        counters.one_token(number, 3, step.rows_read[1], outputs[3])
        return after
