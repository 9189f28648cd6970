"""The same weights as a GGUF file, for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models import DEFAULT_MODEL, ensure_default_gguf
from vesicle.models.gguf_header import check_magic


def find_gguf(model: str | None, folder: Path, given: Path | None) -> Path:
    """The GGUF file of a model.

    Args:
        model: What `--model` was given.
        folder: What that resolved to.
        given: What `--gguf` was given.

    Raises:
        ModelError: There is none, or it is no GGUF file, or it cannot be downloaded.
    """
    if given is not None:
        check_magic(given)
        return given
    if model is not None and model.lower().endswith(".gguf"):
        return Path(model).expanduser()
    inside = sorted(folder.glob("*.gguf"))
    if inside:
        return inside[0]
    if model not in (None, DEFAULT_MODEL):
        raise ModelError(
            f"--against llamacpp needs {model} as a GGUF file as well: name it with --gguf"
        )
    return ensure_default_gguf()
