"""From what `--model` was given to a folder that holds a usable model.

Every problem that can be seen without loading weights is caught here, with one line that names it.
"""

import json
import os
import re
import struct
from pathlib import Path

from vesicle.errors import DataError, ModelError
from vesicle.files import read_json
from vesicle.models.default import DEFAULT_MODEL, ensure_default_model
from vesicle.models.gguf import convert_once

ACCEPTED = (
    "a model folder (config.json, tokenizer.json, *.safetensors), a .gguf file, "
    "or a Hugging Face id such as owner/name"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLE = (
    "pickled weights are not loaded, because they can run any code: convert them to safetensors"
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The limit that the safetensors library itself sets.
_MAX_HEADER_BYTES = 100_000_000


def resolve_model(spec: str | None, progress: bool = True) -> Path:
    """Find the model a user means, fetching or converting it if need be, and check it.

    Args:
        spec: None or the default model's name, a folder, a `.gguf` file, or a hub id.
        progress: Show the progress of the default model's download.

    Returns:
        A folder with `config.json` and whole safetensors weights.

    Raises:
        ModelError: There is no such model, or it is damaged or of a kind that is not supported.
        VesicleError: The cache cannot be written or the disk is full.
    """
    if spec is None:
        return ensure_default_model(progress)
    # Unlike those of Path, these take names that are too long or of no known user.
    name = os.path.expanduser(spec)
    if os.path.isdir(name):
        return check_folder(Path(name))
    if os.path.isfile(name):
        return _from_file(Path(name))
    if spec == DEFAULT_MODEL:
        return ensure_default_model(progress)
    if _looks_like_path(spec):
        raise ModelError(f"--model {spec}: no such file or folder")
    if len(spec) > 96 or not _HUB_ID.fullmatch(spec) or "--" in spec or ".." in spec:
        raise ModelError(f"--model {spec!r} is none of: {ACCEPTED}")
    return check_folder(_from_hub(spec))


def check_folder(folder: Path) -> Path:
    """Check that a folder holds a config and whole safetensors weights, without loading them.

    Args:
        folder: The model's folder.

    Returns:
        The same folder.

    Raises:
        ModelError: A file is missing, malformed or truncated, or the weights are pickled.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds an adapter, which must be merged into its model first" if adapter else ""
        raise ModelError(f"{folder} is not a model: it has no config.json{hint}")
    config = _read_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} names no model_type")
    for name, tensors in _weight_files(folder).items():
        missing = tensors - check_safetensors(folder / name)
        if missing:
            raise ModelError(f"{folder / name} lacks the tensor {min(missing)} that {_INDEX} names")
    return folder


def check_safetensors(path: Path) -> set[str]:
    """Check a safetensors file's header against the file's size.

    Args:
        path: The file.

    Returns:
        The names of its tensors.

    Raises:
        ModelError: It cannot be read, is no safetensors file, or is shorter than it should be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path} ({size:,} bytes) is not a safetensors file{_lfs_hint(prefix)}"
                )
            header = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if len(header) < length:
        raise _truncated(path, size, 8 + length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header is damaged") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise _truncated(path, size, expected)
    if size > expected:
        raise ModelError(f"{path} is damaged: it has {size:,} bytes instead of {expected:,}")
    return set(entries)


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """Names of the folder's weight files, each with the tensors that must be in it."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: set()}
    if (folder / _INDEX).is_file():
        files: dict[str, set[str]] = {}
        weight_map = _read_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / _INDEX} has no weight_map")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{folder / _INDEX} places {tensor} in {name!r}: not a file name")
            files.setdefault(name, set()).add(tensor)
        for number, name in enumerate(sorted(files), 1):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks {name}, weight file {number} of {len(files)}")
        return files
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise ModelError(f"{folder / pickles[0]}: {_NO_PICKLE}")
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    hint = f", only {other[0]}" if other else " (pickled weights such as .bin are not loaded)"
    raise ModelError(f"{folder} has no {_SINGLE} and no {_INDEX}{hint}")


def _from_file(path: Path) -> Path:
    if path.suffix.lower() == ".gguf":
        return convert_once(path)
    if path.suffix.lower() in _PICKLES:
        raise ModelError(f"{path}: {_NO_PICKLE}")
    if path.suffix.lower() == ".safetensors" or path.name == "config.json":
        raise ModelError(f"{path} is one file of a model: name the folder {path.absolute().parent}")
    raise ModelError(f"--model {path} is a file, but not a .gguf file; accepted: {ACCEPTED}")


def _from_hub(spec: str) -> Path:
    """Fetch a repository's safetensors, JSON and tokenizer files, or find them in the cache."""
    # Imported here because no other kind of model needs the hub's client, which loads slowly.
    from huggingface_hub import errors, snapshot_download

    try:
        # Subfolders hold the same weights once more, in other formats.
        folder = snapshot_download(spec, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except errors.HFValidationError as error:
        raise ModelError(f"--model {spec!r} is none of: {ACCEPTED}") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"--model {spec}: its owner grants access on request: ask on its page, then log in"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"--model {spec}: no such folder, and no such model on the hub (or it is private)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"--model {spec}: no such folder, not in the hub's cache, and the hub cannot be "
            f"reached; accepted: {ACCEPTED}"
        ) from error
    except OSError as error:
        raise ModelError(f"--model {spec}: cannot fetch it from the hub: {error}") from error
    return Path(folder)


def _looks_like_path(spec: str) -> bool:
    """Tell a path that does not exist from a hub id."""
    return (
        spec.startswith((".", "~", os.sep))
        or spec.count("/") > 1
        or "\\" in spec
        or spec.lower().endswith((".gguf", ".safetensors", *_PICKLES))
    )


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _truncated(path: Path, size: int, expected: int) -> ModelError:
    return ModelError(
        f"{path} is truncated: it has {size:,} bytes of {expected:,}; download or copy it again"
    )


def _lfs_hint(prefix: bytes) -> str:
    return ", but a Git LFS pointer: run git lfs pull" if prefix == b"version " else ""
