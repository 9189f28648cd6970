"""The native core: packed products and whole passes in C++, loaded with ctypes.

The library is built at installation by `setup.py`, from this folder. It is not compiled against
PyTorch, brings its own threads, and chooses among the processor's instruction sets when it is
loaded. Where it is missing (no compiler, another platform) every caller has a PyTorch path with the
same results, and one line says so, and why.

The structures mirror `interface.h`; their sizes, and the fields of a Plan's row, are compared when
the library is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.engine.core import library
from vesicle.engine.packed import PackedHead, PackedWeight
from vesicle.plan import IntArray
from vesicle.plan.layout import digest

MOST_TOKENS = 128
"""Tokens that one pass takes."""
MOST_ROTARIES = 2
"""Rotary phases that layers of a model may have."""
INSTRUCTIONS = "VESICLE_INSTRUCTIONS"
"""Environment variable that limits the instruction set: generic, avx2, avx512, neon."""
_INSTRUCTIONS = ("generic", "neon", "avx2", "avx512")
DENSE32, DENSE_BF16, PACKED4, PACKED8 = range(4)
ACTIVATIONS = {
    "silu": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
}
KV_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Projection(ctypes.Structure):
    """Mirrors `VesicleProjection`."""

    _fields_ = [
        *_fields(_POINTER, "data", "trailing", "bias"),
        *_fields(_LONG, "n_in", "n_out", "stride", "format"),
    ]


class Norm(ctypes.Structure):
    """Mirrors `VesicleNorm`."""

    _fields_ = _fields(_POINTER, "gain", "bias")


class Layer(ctypes.Structure):
    """Mirrors `VesicleLayer`."""

    _fields_ = [
        *_fields(Projection, "value_key", "query", "attention_out", "ffn_in", "ffn_out"),
        *_fields(Norm, "attention_norm", "ffn_norm", "query_norm", "key_norm"),
        *_fields(Norm, "attention_post_norm", "ffn_post_norm"),
        *_fields(_LONG, "rotates", "window"),
    ]


class Small(ctypes.Structure):
    """Mirrors `VesicleSmall`."""

    _fields_ = [
        *_fields(_POINTER, "down", "up", "bias"),
        ("rank", _LONG),
        *_fields(_POINTER, "in_", "out"),
        ("inner", _LONG),
    ]


PHASES = ("joint in", "attention", "attention out", "ffn in", "ffn out", "head")
"""What a pass spends its time on, as `VesiclePhase`."""


class Model(ctypes.Structure):
    """Mirrors `VesicleModel`."""

    _fields_ = [
        *_fields(_LONG, "n_layers", "width", "heads", "kv_heads", "size", "ffn_width"),
        *_fields(_LONG, "vocabulary"),
        *_fields(_FLOAT, "eps", "scale", "embedding_scale"),
        *_fields(_LONG, "rms", "parallel", "gated", "activation", "rotated"),
        ("layers", _POINTER),
        ("final_norm", Norm),
        *_fields(Projection, "embedding", "head"),
        ("screen", _POINTER),
        *_fields(_POINTER, "keys", "values", "key_scales", "value_scales"),
        *_fields(_LONG, "kv_format", "summary_format", "page_stride"),
        ("seconds", _POINTER),
    ]


class Rule(ctypes.Structure):
    """Mirrors `VesicleRule`."""

    _fields_ = [
        *_fields(_INT, "number", "transmitter", "next", "last"),
        *_fields(_LONG, "width", "least"),
        *_fields(_DOUBLE, "rate", "floor"),
        ("steps", _LONG),
        ("levels", _DOUBLE * 8),
        ("values", _INT * 8),
        *_fields(_INT, "below", "unused"),
    ]


class ModulatorParts(ctypes.Structure):
    """Mirrors `VesicleModulator`."""

    _fields_ = [
        *_fields(_POINTER, "weight", "offset", "log_slope", "place_weight"),
        ("released", _LONG),
        ("logit", _DOUBLE),
        ("rules", _POINTER),
        ("n_rules", _LONG),
        ("most", _POINTER),
        ("columns", _INT * 8),
    ]


class Screen(ctypes.Structure):
    """Mirrors `VesicleScreen`."""

    _fields_ = [
        *_fields(_POINTER, "directions", "products", "norms"),
        ("k", _LONG),
        *_fields(ctypes.c_float, "slack", "offset"),
    ]


class Preview(ctypes.Structure):
    """Mirrors `VesiclePreview`."""

    _fields_ = [("down", _POINTER), ("words", Projection)]


class Chunk(ctypes.Structure):
    """Mirrors `VesicleChunk`."""

    _fields_ = [
        ("ids", _POINTER),
        *_fields(
            _LONG, "n", "position", "room", "vectors", "room_summaries", "nearest", "recorded"
        ),
        *_fields(_POINTER * MOST_ROTARIES, "cosine", "sine"),
        *_fields(_POINTER, "tables", "starts", "held", "summaries", "spread"),
        *_fields(_POINTER, "modulator", "acting", "small_ffn", "small_attention", "preview"),
        *_fields(_POINTER, "plan", "levels"),
        *_fields(_POINTER, "rows", "outputs", "visited", "compared", "small", "coded"),
        ("received", _POINTER),
        ("room_received", _LONG),
        *_fields(_POINTER, "summed", "queries"),
        ("room_queries", _LONG),
        *_fields(_POINTER, "hidden", "logits", "states", "noise"),
        *_fields(_LONG, "wants", "likeliest", "scored", "lost"),
    ]


class Encoding(ctypes.Structure):
    """Mirrors `VesicleEncoding`."""

    _fields_ = [
        ("weight", _POINTER),
        *_fields(_LONG, "first", "rows", "n_in", "n_out"),
        *_fields(_POINTER, "inverse", "origin", "scales", "lows"),
        *_fields(_FLOAT, "top", "multiplier"),
        *_fields(_LONG, "bits", "head"),
        *_fields(_POINTER, "high", "trailing"),
    ]


_MIRRORS = (
    Projection,
    Norm,
    Layer,
    Small,
    Model,
    Rule,
    ModulatorParts,
    Screen,
    Preview,
    Chunk,
    Encoding,
)
_SIGNATURES: library.Signatures = {
    "vesicle_sizes": (_LONG, [_LONG]),
    "vesicle_plan_layout": (ctypes.c_uint64, []),
    "vesicle_instructions": (ctypes.c_char_p, [ctypes.c_char_p]),
    "vesicle_open": (_POINTER, []),
    "vesicle_close": (None, [_POINTER]),
    "vesicle_pass": (None, [_POINTER] * 3 + [_LONG] * 4),
    "vesicle_encode": (ctypes.c_float, [_POINTER, _LONG]),
    "vesicle_summarise": (None, [_POINTER, _POINTER, _LONG]),
    "vesicle_multiply": (None, [_POINTER] * 4 + [_LONG, _POINTER, _POINTER, _LONG]),
    "vesicle_screen": (ctypes.c_float, [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG]),
    "vesicle_head": (None, [_POINTER, _POINTER, _LONG, _INT, _POINTER, _LONG]),
}


def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    core, reason = library.open_library("_core", _SIGNATURES)
    if core is None:
        return None, reason
    sizes = [core.vesicle_sizes(i) for i in range(len(_MIRRORS))]
    for mirror, size in zip(_MIRRORS, sizes, strict=True):
        if size != ctypes.sizeof(mirror):
            return None, (
                f"{core._name} is of another version: its {mirror.__name__} takes {size} bytes, "
                f"not {ctypes.sizeof(mirror)}; install again"
            )
    if core.vesicle_plan_layout() != digest():
        return None, f"{core._name} is of another version: its Plan has other fields; install again"
    return core, ""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The loaded library, or None where it is absent, disabled or of another version."""
    core, _ = _open()
    if core is None:
        if not library.disabled():
            warnings.warn(str(fallback()), stacklevel=2)
        return None
    wanted = os.environ.get(INSTRUCTIONS)
    if core.vesicle_instructions(wanted.encode() if wanted else None) is None:
        best = core.vesicle_instructions(None).decode()
        warnings.warn(
            f"{INSTRUCTIONS} is {wanted!r}, which this processor or build does not have; "
            f"using {best}, the best there is",
            stacklevel=2,
        )
    return core


def fallback() -> str | None:
    """What to tell where there is no native core, in one line; None where there is."""
    core, reason = _open()
    if core is not None:
        return None
    return f"the native core is missing: {reason}; running in PyTorch, slower"


def available() -> bool:
    """Whether the native core is there."""
    return load() is not None


def instructions() -> str | None:
    """Name of the instruction set in use; None without the core."""
    core = load()
    if core is None:
        return None
    wanted = os.environ.get(INSTRUCTIONS)
    name = core.vesicle_instructions(wanted.encode() if wanted else None)
    return (name or core.vesicle_instructions(None)).decode()


def instruction_sets() -> list[str]:
    """Names of those that this processor and build have, the best last; none without the core."""
    core = load()
    if core is None:
        return []
    names = [name for name in _INSTRUCTIONS if core.vesicle_instructions(name.encode())]
    instructions()  # asking has chosen
    return names


def threads() -> int:
    """Threads that the core runs on: as many as PyTorch's operations."""
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int | None:
    """Of a tensor's first number; None for none."""
    return None if tensor is None else tensor.data_ptr()


def describe(weight: PackedWeight | PackedHead) -> Projection:
    """The structure of a packed weight, which must outlive it."""
    return Projection(
        data=weight.high.data_ptr(),
        trailing=address(weight.trailing),
        bias=address(weight.bias),
        n_in=weight.n_in,
        n_out=weight.n_out,
        stride=0,
        format=PACKED4 if weight.bits == 4 else PACKED8,
    )


def rows_of(head: Tensor | PackedHead) -> Projection:
    """The structure of a head's rows, which must outlive it; without a dense one's bias."""
    if isinstance(head, PackedHead):
        return describe(head)
    return Projection(
        data=head.data_ptr(),
        n_in=head.shape[1],
        n_out=head.shape[0],
        stride=head.shape[1],
        format=DENSE_BF16 if head.dtype == torch.bfloat16 else DENSE32,
    )


def packed_multiply(
    x: Tensor, weight: PackedWeight, counts: IntArray, bits: int, columns: int, out: Tensor
) -> None:
    """Products of tokens with a packed weight, on activations rounded to 8 bits.

    Args:
        x: (T, in) fp32, contiguous.
        weight: The weight.
        counts: (T,) channels to read, those of largest |x|.
        bits: As a Plan's, for all tokens.
        columns: Leading outputs wanted.
        out: (T, columns) fp32, contiguous, written.
    """
    core = load()
    assert core is not None
    n = len(x)
    whole = out if columns == weight.n_out else torch.empty(n, weight.n_out)
    counts = np.ascontiguousarray(counts, np.int32)
    each, read = np.full(n, bits, np.int32), np.empty(n, np.int32)
    core.vesicle_multiply(
        ctypes.byref(describe(weight)),
        x.data_ptr(),
        counts.ctypes.data,
        each.ctypes.data,
        n,
        whole.data_ptr(),
        read.ctypes.data,
        threads(),
    )
    if whole is not out:
        out.copy_(whole[:, :columns])


def head_multiply(x: Tensor, head: PackedHead, bits: int, out: Tensor) -> None:
    """Logits (T, V) of x (T, D) fp32, without the head's bias, written to `out`."""
    core = load()
    assert core is not None
    core.vesicle_head(
        ctypes.byref(describe(head)), x.data_ptr(), len(x), bits, out.data_ptr(), threads()
    )
