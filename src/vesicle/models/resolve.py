"""From what `--model` was given to a folder that holds a usable model.

Every problem that can be seen without loading weights is caught here, with one line that names it.
"""

import os
import re
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models.checks import NO_PICKLE, PICKLES, check_weights, read_config
from vesicle.models.default import DEFAULT_MODEL, ensure_default_model
from vesicle.models.gguf import convert_once

ACCEPTED = (
    "a model folder (config.json, tokenizer.json, *.safetensors), a .gguf file, "
    "or a Hugging Face id such as owner/name"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


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
    """Check that a folder holds a sane config and the weights it asks for, without loading them.

    Args:
        folder: The model's folder.

    Returns:
        The same folder.

    Raises:
        ModelError: A file is missing, malformed or truncated, the weights are pickled or not those
            that the config asks for, the family is not supported, or memory is too small.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds an adapter, which must be merged into its model first" if adapter else ""
        raise ModelError(f"{folder} is not a model: it has no config.json{hint}")
    check_weights(folder, read_config(folder))
    return folder


def _from_file(path: Path) -> Path:
    if path.suffix.lower() == ".gguf":
        return convert_once(path)
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path}: {NO_PICKLE}")
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
        or spec.lower().endswith((".gguf", ".safetensors", *PICKLES))
    )
