"""What decides an evaluation's numbers beside its settings: code, versions, hardware, weights."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vesicle.processors import allowed, model_name

_CODE = {".py", ".cpp", ".inc", ".h", ".so", ".pyd", ".dylib"}


def versions() -> dict[str, str]:
    """Of this package and of what decides its numbers; `code` tells two states of one version."""
    import transformers

    from vesicle import __version__

    return {
        "vesicle": __version__,
        "code": code_digest(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
    }


@cache
def code_digest() -> str:
    """12 hex digits over this package's sources and compiled libraries, as they are installed."""
    root = Path(__file__).parents[2]
    whole = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in _CODE and p.is_file()):
        data = path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        whole.update(data)
    return whole.hexdigest()[:12]


def digest(values: Any) -> str:
    """SHA-256 of values as JSON writes them."""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def with_code(settings: Any, known: dict[str, str]) -> str:
    """The hash `BASE-CODE` of settings under these `versions()`.

    Finished work of the same base and other code answers the same questions, but other code
    answered them.
    """
    lasting = {name: version for name, version in known.items() if name != "code"}
    return f"{digest([settings, lasting])[:16]}-{known['code']}"


def base_of(hash_: str) -> str:
    """A hash without the code's part, which early ones do not have."""
    return hash_.rpartition("-")[0] or hash_


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, and torch's threads."""
    return {
        "cpu": model_name(),
        "cores": len(allowed()),
        "threads": torch.get_num_threads(),
    }


def fingerprint(module: nn.Module, samples: int = 4096) -> str:
    """SHA-256 over each tensor's name, shape and about `samples` values, evenly spread."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // samples)].to("cpu", torch.float64).numpy()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(values.tobytes())
    return whole.hexdigest()
