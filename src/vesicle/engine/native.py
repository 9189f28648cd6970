"""Loads the native kernels, once; says whether they are there.

The library is built at installation by `setup.py`. Where it is missing (no compiler, another
platform) every caller has a PyTorch path with the same results.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # loaded first: its OpenMP runtime resolves the library's symbols

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "vesicle_sparse_linear_f32": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE]
    + [_POINTER] * 3,
    "vesicle_sparse_linear_bf16": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE]
    + [_POINTER] * 3,
    "vesicle_choose_blocks_f32": [_POINTER] * 4 + [_SIZE] * 7 + [_FLOAT] + [_POINTER] * 2,
    "vesicle_block_attention_f32": [_POINTER] * 6 + [_SIZE] * 6 + [_FLOAT] + [_POINTER] * 2,
}
DISABLE = "VESICLE_NO_NATIVE"
"""Environment variable that, set to 1, forces the PyTorch path."""
LIBRARIES = "VESICLE_LIBRARIES"
"""Environment variable: a folder with other builds of the native libraries, checked ones say."""


def folder() -> Path:
    """Where the native libraries are looked for."""
    return Path(os.environ.get(LIBRARIES) or Path(__file__).parent)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they are absent or disabled."""
    if os.environ.get(DISABLE) == "1":
        return None
    for path in sorted(folder().glob("_native*.so")):
        try:
            kernels = ctypes.CDLL(str(path))
            for name, arguments in _SIGNATURES.items():
                function = getattr(kernels, name)
                function.argtypes = arguments
                function.restype = None
        except (OSError, AttributeError):
            continue
        return kernels
    return None
