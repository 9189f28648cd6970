"""From what `--model` was given to a folder that holds a usable model.

Every problem that can be seen without loading weights is caught here, with one line that names it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from vesicle.errors import ModelError
from vesicle.models.catalogue import CATALOGUE, DEFAULT_MODEL, near_name
from vesicle.models.checks import (
    INDEX,
    NO_PICKLE,
    SINGLE,
    check_weights,
    indexed_files,
    read_config,
)
from vesicle.models.fetch import ensure_model
from vesicle.models.gguf import convert_once
from vesicle.models.gguf_header import is_gguf
from vesicle.models.hub import PICKLES, commit_of, ends_as_files, fetch, local_path

ACCEPTED = (
    "a model folder (config.json, tokenizer.json, *.safetensors), a .gguf file, a Hugging Face id "
    f"such as owner/name, or a name of the catalogue ({', '.join(CATALOGUE)})"
)
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")


def resolve_model(
    spec: Path | str | None,
    progress: bool = True,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: bool = True,
    option: str = "--model",
) -> Path:
    """Find the model a user means, fetching or converting it if need be, and check it.

    Args:
        spec: None for the default model, a name of the catalogue, a folder, a `.gguf` file, or a
            hub id.
        progress: Show the progress of downloading a model of the catalogue.
        revision: Branch, tag or commit of a hub id; its main branch by default.
        token: For private and gated models on the hub; by default what its client has saved.
        weights: Whether weights are needed; without them a hub id's are not fetched, and those of
            a folder are not checked.
        option: What takes it, for messages.

    Returns:
        A folder with `config.json` and, if they are needed, whole safetensors weights.

    Raises:
        ModelError: There is no such model, or it is damaged or of a kind that is not supported, or
            a revision is given for what is no hub id.
        VesicleError: The cache cannot be written or the disk is full.
    """
    lead = f"{option} {_quoted(str(spec))}"
    path = None
    if spec is not None:
        if isinstance(spec, str) and revision is None and not os.path.exists(spec):
            _refuse_near(spec, lead)
        path = local_path(spec, lead=lead, accepted=ACCEPTED, revision=revision)
    if path is not None:
        try:
            return _from_path(path, lead, weights)
        except ModelError as error:
            if str(spec) not in CATALOGUE:
                raise
            raise ModelError(
                f"{error}; it hides the model of the catalogue that has its name: rename it, or "
                "work in another folder"
            ) from error
    name = DEFAULT_MODEL if spec is None else str(spec)
    if name in CATALOGUE:
        if revision is not None:
            raise ModelError(
                f"{'the default model' if name == DEFAULT_MODEL else name} has no revisions, and "
                f"revision {revision!r} is given; a revision is of a hub id"
            )
        return ensure_model(name, progress)
    return _from_hub(name, lead, revision, token, weights)


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
    _need_config(folder)
    check_weights(folder, read_config(folder))
    return folder


def _need_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds an adapter, which must be merged into its model first" if adapter else ""
        raise ModelError(f"{folder} is not a model: it has no config.json{hint}")


def _refuse_near(spec: str, lead: str) -> None:
    """Refuse a mistyped name of the catalogue, before the hub is asked for it.

    Models of the hub that have no owner are few and old, and none is called so.
    """
    is_path = "/" in spec or "\\" in spec or spec.startswith((".", "~")) or ends_as_files(spec)
    near = None if is_path or spec in CATALOGUE else near_name(spec)
    if near is not None:
        raise ModelError(f"{lead}: did you mean {near}? Accepted: {ACCEPTED}")


def _from_path(path: Path, lead: str, weights: bool) -> Path:
    if not path.is_dir():
        return _from_file(path, lead)
    if weights:
        return check_folder(path)
    _need_config(path)
    return path


def _from_file(path: Path, lead: str) -> Path:
    if path.suffix.lower() == ".gguf":
        return convert_once(path)
    if is_gguf(path):
        raise ModelError(f"{path} is a GGUF file, and its name must end in .gguf: rename it")
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path}: {NO_PICKLE}")
    if path.suffix.lower() == ".safetensors" or path.name == "config.json":
        raise ModelError(f"{path} is one file of a model: name the folder {path.absolute().parent}")
    raise ModelError(f"{lead} is a file, but not a .gguf file; accepted: {ACCEPTED}")


def _quoted(spec: str) -> str:
    """What was given, in quotes where it would not be seen whole without."""
    return spec if spec.split() == [spec] and spec.isprintable() else repr(spec)


def _from_hub(
    spec: str, lead: str, revision: str | None, token: str | bool | None, weights: bool
) -> Path:
    """Fetch what is small, refuse what is not supported, and then fetch the weights alone."""

    def fetched(files: Sequence[str], revision: str | None) -> Path:
        return fetch(
            spec,
            files,
            lead=lead,
            accepted=ACCEPTED,
            revision=revision,
            token=token,
        )

    folder = fetched(_SMALL_FILES, revision)
    _need_config(folder)
    read_config(folder)
    if not weights:
        return folder
    indexed = (folder / INDEX).is_file()
    files = sorted(indexed_files(folder)) if indexed else [SINGLE]
    return check_folder(fetched(files, commit_of(folder, revision)))
