"""Small FFNs of a pretrained model on disk: `small_ffns.safetensors`, and `small_ffns.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vesicle.errors import VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.models.finite import check_finite
from vesicle.shapes import ModelShape
from vesicle.small_modules import SmallModule, of_size

FORMAT = "vesicle-small-ffns-1"
_WEIGHTS, _CONFIG = "small_ffns.safetensors", "small_ffns.json"


def save_small_ffns(
    small: SmallModule, folder: Path, *, model: ModelShape, trained: dict[str, Any]
) -> None:
    """Write small FFNs to a folder, each file atomically; weights in bf16, as modulators have them.

    Args:
        small: Of every layer.
        folder: Where to.
        model: Whose FFNs they stand in for.
        trained: How they were made (JSON).

    Raises:
        VesicleError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in small.state_dict().items()}
    with atomic_path(folder / _WEIGHTS) as part:
        save_file(tensors, part)
    values = {"format": FORMAT, "size": small.size, "model": model.fingerprint()}
    write_json(folder / _CONFIG, {**values, "trained": trained})


def load_small_ffns(folder: Path, model: ModelShape) -> SmallModule:
    """Read what `save_small_ffns` wrote.

    Args:
        folder: That holds it.
        model: Whose FFNs they are to stand in for.

    Raises:
        VesicleError: There are none, they cannot be read, or they are of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _CONFIG
    if not path.is_file():
        raise VesicleError(f"{folder} holds no {_CONFIG}; vesicle distil writes one")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise VesicleError(f"{path} is not a {FORMAT} file")
    if values.get("model") != model.fingerprint():
        raise VesicleError(f"{folder} holds small FFNs of another model")
    try:
        small = of_size(values["size"], model.n_layers, model.width)
        tensors = load_file(folder / _WEIGHTS)
        small.load_state_dict({name: t.float() for name, t in tensors.items()})
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise VesicleError(f"cannot read {folder}: {' '.join(str(error).split())}") from error
    for name, tensor in tensors.items():
        check_finite(name, tensor, folder / _WEIGHTS)
    return small
