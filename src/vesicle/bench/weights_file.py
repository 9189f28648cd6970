"""The same weights as rivals read them: a GGUF file, or converted for ONNX."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vesicle.bench.contenders import READ_GGUF, REQUANTISED, RIVALS
from vesicle.errors import ModelError
from vesicle.files import atomic_folder, atomic_path, cache_root, folder_fingerprint
from vesicle.models.catalogue import CATALOGUE, DEFAULT_MODEL
from vesicle.models.fetch import ensure_gguf, folder_of
from vesicle.models.gguf import sha256_file
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
    if model is None:
        return ensure_gguf(DEFAULT_MODEL)
    # A folder of the user's own may have a name of the catalogue.
    if model in CATALOGUE and folder == folder_of(CATALOGUE[model]):
        return ensure_gguf(model)
    raise ModelError(
        f"{model} is needed as a GGUF file as well, for --against: name it with --gguf"
    )


def files_for(
    against: tuple[str, ...], gguf: Path, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Path]:
    """The file of each rival that reads one: as it is, or requantised by llama.cpp and cached.

    Args:
        against: Names from `RIVALS`.
        gguf: The model's own file.
        tell: Takes a line where a file is made, which takes a while.

    Raises:
        ModelError: llama.cpp refuses to requantise it.
    """
    found = dict[str, Path]()
    for name in against:
        if name in REQUANTISED:
            found[name] = _requantised(gguf, REQUANTISED[name], tell)
        elif RIVALS[name] in READ_GGUF:
            found[name] = gguf
    return found


def converted_to_onnx(folder: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The model as ONNX Runtime GenAI's own builder converts it, weights in 4 bits; cached.

    Raises:
        ModelError: The builder cannot convert it.
    """
    target = cache_root() / "bench" / f"onnx-{folder_fingerprint(folder)[:16]}"
    if target.is_dir():
        return target
    tell(f"converting {folder.name} for ONNX Runtime, once")
    with atomic_folder(target) as part:
        words = ("-m", folder.name, "-i", folder, "-o", part, "-p", "int4", "-e", "cpu")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if done.returncode != 0 or not (part / "genai_config.json").is_file():
            said = done.stderr.decode("utf-8", "replace").strip() or "no message"
            line = said.splitlines()[-1]
            raise ModelError(f"ONNX Runtime GenAI cannot convert {folder.name}: {line}")
    return target


def _requantised(gguf: Path, name: str, tell: Callable[[str], None]) -> Path:
    """From a file that is quantised already: llama.cpp goes through fp32, nothing is added."""
    target = cache_root() / "bench" / f"{gguf.stem}-{sha256_file(gguf)[:12]}-{name}.gguf"
    if target.is_file():
        return target
    tell(f"requantising {gguf.name} to {name}, once")
    with atomic_path(target) as part:
        # Its library may abort, and prints: in a process of its own.
        done = subprocess.run(
            [sys.executable, "-P", "-c", _REQUANTISE, str(gguf), str(part), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip() or "no message"
            raise ModelError(
                f"llama.cpp cannot requantise {gguf} to {name}: {said.splitlines()[-1]}"
            )
    return target


_REQUANTISE = """
import sys
import llama_cpp.llama_cpp as native
source, target, name = sys.argv[1:]
native.llama_backend_init()
settings = native.llama_model_quantize_default_params()
settings.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{name}")
settings.allow_requantize = True
sys.exit(native.llama_model_quantize(source.encode(), target.encode(), settings))
"""
