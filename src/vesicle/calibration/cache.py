"""Keys under which measurements are kept, so that measuring the same again is instant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.files import read_json, write_json


def fingerprint(tensors: Iterable[Tensor], settings: object = None) -> str:
    """A name for tensors, by all their values, and for settings that JSON can hold."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
        # NumPy has no bfloat16, and a cast to single precision loses nothing of it.
        number = plain.float() if plain.is_floating_point() else plain
        digest.update(number.numpy().tobytes())
    return digest.hexdigest()


def sample_key(model: nn.Module) -> str:
    """A name for a model, by the first 256 numbers of each of its parameters."""
    return fingerprint(_sample(model))


def _sample(model: nn.Module) -> list[Tensor]:
    return [p.detach().reshape(-1)[:256] for p in model.parameters()]


def measurement_key(
    model: nn.Module, windows: Tensor, parts: Iterable[Tensor], settings: object
) -> str:
    """A name for a measurement of `model` on `windows`, with further tensors and settings.

    Of the model's parameters the first 256 numbers each are read.
    """
    return fingerprint([*_sample(model), windows, *parts], settings)


def recall(path: Path | None, key: str) -> Any | None:
    """What was kept in a JSON file under `key`; None if nothing."""
    if path is None or not path.exists():
        return None
    try:
        values = read_json(path)
        return values["result"] if values["key"] == key else None
    except (VesicleError, LookupError, TypeError):
        return None


def keep(path: Path | None, key: str, result: Any) -> None:
    """Keep a result in a JSON file under `key`, in place of what is there."""
    if path is not None:
        write_json(path, {"key": key, "result": result})
