"""Checkpoints of a training run: tensors in safetensors, the rest in JSON, no pickle.

One folder a checkpoint, `step-<number>`, renamed into place once it is whole. Its JSON holds the
checksum of its tensors, so that a damaged checkpoint is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.files import atomic_folder, read_json, write_json

FORMAT = "vesicle-checkpoint-1"
_TENSORS, _FACTS = "state.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run at the end of a step.

    Attributes:
        step: Optimizer steps done.
        tensors: Parameters, optimizer moments, random state; names are the owner's.
        facts: Everything else, as JSON holds it.
    """

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """Write a checkpoint, all or nothing, and remove all but the newest `keep`.

    Raises:
        VesicleError: The folder cannot be written or the disk is full.
    """
    from safetensors.torch import save

    data = save({n: t.detach().cpu().contiguous() for n, t in checkpoint.tensors.items()})
    with atomic_folder(folder / f"step-{checkpoint.step:08d}", len(data)) as part:
        (part / _TENSORS).write_bytes(data)
        write_json(
            part / _FACTS,
            {
                "format": FORMAT,
                "step": checkpoint.step,
                "checksum": _checksum(data),
                "facts": checkpoint.facts,
            },
        )
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None."""
    for path in _folders(folder):
        checkpoint = _read(path)
        if checkpoint is not None:
            return checkpoint
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _read(path: Path) -> Checkpoint | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        values = read_json(path / _FACTS)
        data = (path / _TENSORS).read_bytes()
        if values["format"] != FORMAT or values["checksum"] != _checksum(data):
            return None
        return Checkpoint(step=int(values["step"]), tensors=load(data), facts=dict(values["facts"]))
    except (VesicleError, OSError, SafetensorError, LookupError, TypeError, ValueError):
        return None


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
