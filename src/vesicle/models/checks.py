"""What can be told about a model folder from its config and its weights' headers alone.

Whoever loads weights asks here first: which tensors there are and where, whether they are the ones
that the config asks for, and whether the machine can hold them. PyTorch is imported when a check
runs, not with this file.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vesicle.errors import DataError, ModelError
from vesicle.files import read_json
from vesicle.models.finite import check_finite
from vesicle.models.hub import PICKLES
from vesicle.models.memory import check_memory
from vesicle.models.safetensors_header import StoredTensor, read_safetensors_header, shown

if TYPE_CHECKING:
    from torch import Tensor

    from vesicle.families import Family

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NO_PICKLE = (
    "pickled weights are not loaded, because they can run any code: convert them to safetensors"
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TIED = ("lm_head.weight", "embed_out.weight")
_LEAST_WEIGHT_BYTES = 0.5 + 4 / 32
"""The smallest store there is: 4 bits, and two 16-bit numbers for each group of 32."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ModelError: The file is missing, unreadable, or holds something else.
    """
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def read_config(folder: Path) -> Any:
    """Read the Hugging Face config of a model folder, and check what it says.

    Its settings mean what transformers' own class says. Importing transformers takes longer than
    reading a small model's weights, so a config that its class would leave as it is is taken as is.

    Args:
        folder: The model's folder.

    Returns:
        An object with the config's settings as attributes.

    Raises:
        ModelError: It is missing or damaged, of a family that is not supported, or absurd.
    """
    from vesicle.families import find_family
    from vesicle.families.settings import is_spelled_out, refuse_foreign

    path = folder / "config.json"
    values = read_object(path)
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path} names no model_type")
    config: Any = SimpleNamespace(**values)
    try:
        # Before transformers sees it, which offers to run code that an unknown type brings along.
        family = find_family(config)
        refuse_foreign(values)
        if not is_spelled_out(values):
            config = _standardised(folder)
        _check_config(config, family)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return config


def _standardised(folder: Path) -> Any:
    """What transformers' own class makes of a config, in whatever spelling and of whatever age."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers refuses a value by whatever exception it causes
        raise ModelError(f"transformers cannot read it: {error}") from error


def _check_config(config: Any, family: Family) -> None:
    from vesicle.families.checks import flag

    family.decoder_config(config)
    family.presence(config)
    flag(config, "tie_word_embeddings")


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Find every tensor of a model folder, and check the headers of its weight files.

    Args:
        folder: The model's folder.

    Returns:
        The tensors by name.

    Raises:
        ModelError: A file is missing, malformed or truncated, the weights are pickled, or a tensor
            is missing or there twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, promised in _weight_files(folder).items():
        found = read_safetensors_header(folder / name)
        if missing := promised - found.keys():
            raise ModelError(
                f"{folder / name} lacks the tensor {shown(min(missing))} that {INDEX} names"
            )
        if twice := tensors.keys() & found.keys():
            other = tensors[min(twice)].file.name
            raise ModelError(f"{folder / name} holds {shown(min(twice))}, and so does {other}")
        tensors |= found
    return tensors


def check_weights(
    folder: Path, config: Any, weight_bytes: float = _LEAST_WEIGHT_BYTES
) -> dict[str, StoredTensor]:
    """Check a model folder's weights against its config, reading headers and norms alone.

    Args:
        folder: The model's folder.
        config: What `read_config` gave for it.
        weight_bytes: Memory that one loaded weight takes; by default what the smallest store takes.

    Returns:
        Every tensor in the folder by the name that a causal LM has for it, those that no one asks
        for included. A base model saved alone has other names in its files (`StoredTensor.key`).

    Raises:
        ModelError: A tensor is missing, of the wrong shape, of no floating-point type, or not
            finite where that is checked (norms, biases); or the machine has too little memory.
    """
    import torch

    from vesicle.families import find_family
    from vesicle.families.checks import check_tensors, flag

    family, stored_tensors = find_family(config), read_tensors(folder)
    names = family.canonical_names(stored_tensors)
    tensors = {name: stored_tensors[key] for name, key in names.items()}
    used: dict[str, StoredTensor] = {}

    tied = flag(config, "tie_word_embeddings")

    def lookup(name: str) -> Tensor | None:
        stored = tensors.get(name)
        if stored is None or (tied and name in _TIED):
            return None
        if stored.dtype not in _DTYPES:
            raise ModelError(
                f"{stored.file}: {name} is stored as {stored.dtype}; allowed: {', '.join(_DTYPES)}"
            )
        used[name] = stored
        dtype = getattr(torch, _DTYPES[stored.dtype])
        return torch.empty(stored.shape, dtype=dtype, device="meta")

    try:
        check_tensors(family, config, lookup)
    except ModelError as error:
        layers = f"{family.prefix}layers."
        known = any(n.startswith(family.prefix) for n in stored_tensors)
        if tensors and not known and not any(n.startswith(layers) for n in tensors):
            raise ModelError(
                f"{folder} has no tensors named as a {config.model_type} model's, such as "
                f"'{layers}0...', but others, such as {shown(min(stored_tensors))}"
            ) from error
        raise ModelError(f"{folder}: {error}") from error
    n_weights = sum(prod(stored.shape) for stored in used.values())
    check_memory(int(n_weights * weight_bytes), f"loading {folder}")
    for name, stored in used.items():
        if len(stored.shape) == 1:
            _check_finite(name, stored)
    return tensors


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """Names of the folder's weight files, each with the tensors that must be in it."""
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    if (folder / INDEX).is_file():
        files = indexed_files(folder)
        for number, name in enumerate(sorted(files), 1):
            if not _is_file(folder / name):
                raise ModelError(
                    f"{folder} lacks {shown(name)}, weight file {number} of {len(files)}"
                )
        return files
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise ModelError(f"{folder / pickles[0]}: {NO_PICKLE}")
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    hint = f", only {other[0]}" if other else " (pickled weights such as .bin are not loaded)"
    raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}{hint}")


def indexed_files(folder: Path) -> dict[str, set[str]]:
    """Names of the weight files in a folder's index, each with the tensors that must be in it.

    Raises:
        ModelError: The index is malformed.
    """
    files: dict[str, set[str]] = {}
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ModelError(
                f"{folder / INDEX} places {shown(tensor)} in {shown(name)}: not a file name"
            )
        files.setdefault(name, set()).add(tensor)
    return files


def _is_file(path: Path) -> bool:
    """Like `Path.is_file`, for names that no file can have as well."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _check_finite(name: str, stored: StoredTensor) -> None:
    """Refuse a norm or bias with NaN or infinity, before the rest is read."""
    import torch

    with stored.file.open("rb") as file:
        file.seek(stored.start)
        raw = bytearray(file.read(stored.n_bytes))
    values = torch.frombuffer(raw, dtype=getattr(torch, _DTYPES[stored.dtype]))
    check_finite(name, values, stored.file)
