"""Loads the native libraries, once; says whether they are there, and why not.

They are built at installation by `setup.py`. Where one is missing (no compiler, another platform)
every caller has a PyTorch path with the same results.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # loaded first: its OpenMP runtime resolves the library's symbols

Signatures = dict[str, tuple[Any, list[Any]]]
"""Result and arguments of each function of a library."""

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LINEAR = [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE] + [_POINTER] * 3
_SIGNATURES: Signatures = {
    "vesicle_sparse_linear_f32": (None, _LINEAR),
    "vesicle_sparse_linear_bf16": (None, _LINEAR),
    "vesicle_choose_blocks_f32": (
        None,
        [_POINTER] * 4 + [_SIZE] * 7 + [_FLOAT] + [_POINTER] * 2,
    ),
    "vesicle_block_attention_f32": (
        None,
        [_POINTER] * 6 + [_SIZE] * 6 + [_FLOAT] + [_POINTER] * 2,
    ),
}
DISABLE = "VESICLE_NO_NATIVE"
"""Environment variable that, set to 1, forces the PyTorch path."""
REQUIRE = "VESICLE_REQUIRE_NATIVE"
"""Environment variable that, set to 1, makes missing native code an error: of an installation, and
of the tests."""
LIBRARIES = "VESICLE_LIBRARIES"
"""Environment variable: a folder with other builds of the native libraries, checked ones say."""


def folder() -> Path:
    """Where the native libraries are looked for."""
    return Path(os.environ.get(LIBRARIES) or Path(__file__).parent)


def disabled() -> bool:
    """Whether native code is not wanted."""
    return os.environ.get(DISABLE) == "1"


def open_library(stem: str, signatures: Signatures) -> tuple[ctypes.CDLL | None, str]:
    """Load a library and declare its functions.

    Args:
        stem: What its file's name begins with.
        signatures: Of its functions.

    Returns:
        The library, or None and the reason.
    """
    if disabled():
        return None, f"{DISABLE} is 1"
    reason = _not_built(stem)
    for path in sorted(folder().glob(f"{stem}*.so")):
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except OSError as error:
            reason = f"{path} cannot be loaded: {error}"
        except AttributeError as error:
            reason = f"{path} is of another version: {error}"
        else:
            return library, ""
    return None, reason


def _not_built(stem: str) -> str:
    """Why there is no such file, as far as the installation has left word."""
    try:
        cause = (folder() / f"{stem}.failed.txt").read_text(encoding="utf-8").strip()
    except OSError:
        cause = "was there no C++ compiler at installation?"
    else:
        cause = f"its build failed at installation: {cause}"
    return f"{folder()} has no {stem}*.so; {cause}"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they are absent or disabled."""
    found, _ = open_library("_native", _SIGNATURES)
    line = fallback() if found is None else None
    if line is not None and not disabled():
        warnings.warn(line, stacklevel=2)
    return found


def fallback() -> str | None:
    """What to tell where there are no kernels, in one line; None where there are."""
    found, reason = open_library("_native", _SIGNATURES)
    if found is not None:
        return None
    return f"the native kernels are missing: {reason}; prompts below rest run in PyTorch, slower"
