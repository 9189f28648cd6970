"""Finds the native library; says whether it is there, and why not."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

Signatures = dict[str, tuple[Any, list[Any]]]
"""Result and arguments of each function of a library."""

DISABLE = "VESICLE_NO_NATIVE"
"""Environment variable that, set to 1, forces the PyTorch path."""
REQUIRE = "VESICLE_REQUIRE_NATIVE"
"""Environment variable that, set to 1, makes missing native code an error: of an installation, and
of the tests."""
LIBRARIES = "VESICLE_LIBRARIES"
"""Environment variable: a folder with another build of the native library, a checked one say."""


def folder() -> Path:
    """Where the native library is looked for."""
    return Path(os.environ.get(LIBRARIES) or Path(__file__).parent.parent)


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
