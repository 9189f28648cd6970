"""What the cache holds of models: those of the catalogue, and conversions of the user's own files.

Hub ids lie in the hub's own cache, which its client lists and empties.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.files import (
    cache_root,
    folder_bytes,
    in_work,
    read_json,
    remove_leftovers,
    remove_whole,
)
from vesicle.models.catalogue import CATALOGUE, Entry
from vesicle.models.fetch import folder_of, gguf_of, is_ready, parts_of
from vesicle.models.gguf import MANIFEST, is_converted

_CONVERSION = re.compile("gguf-([0-9a-f]{16})")


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What there is of one model.

    Args:
        name: Of the catalogue, or the folder's.
        folder: The converted model's folder, which need not exist.
        ready: Whether the folder is whole, so that it is used as it is.
        source: The name of the user's file that it is from; None for one of the catalogue, and if
            the manifest does not say.
        folder_bytes: Size of the folder.
        gguf_bytes: Size of the GGUF file that is kept beside it.
        gguf_ready: Whether that is the pinned size; if not, the file is fetched anew.
        parts_bytes: Size of what is kept of a download that was interrupted.
    """

    name: str
    folder: Path
    ready: bool
    source: str | None = None
    folder_bytes: int
    gguf_bytes: int = 0
    gguf_ready: bool = False
    parts_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Size of all of it."""
        return self.folder_bytes + self.gguf_bytes + self.parts_bytes


def cached(entry: Entry) -> Cached:
    """What there is of a model of the catalogue; it may be nothing."""
    gguf_bytes = folder_bytes(gguf_of(entry))
    return Cached(
        name=entry.name,
        folder=folder_of(entry),
        ready=is_ready(entry),
        folder_bytes=folder_bytes(folder_of(entry)),
        gguf_bytes=gguf_bytes,
        gguf_ready=gguf_bytes == entry.gguf_bytes,
        parts_bytes=folder_bytes(parts_of(entry)),
    )


def conversions() -> list[Cached]:
    """The user's own GGUF files that were converted, also where a folder is damaged.

    Raises:
        VesicleError: The cache cannot be read.
    """
    models = cache_root() / "models"
    try:
        names = sorted(os.listdir(models))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VesicleError(f"cannot read {models}: {error.strerror or error}") from error
    return [_conversion(models / name) for name in names if _CONVERSION.fullmatch(name)]


def remove_cached(name: str) -> int:
    """Remove all that there is of one model, and what killed downloads left.

    Args:
        name: Of the catalogue, or of a conversion's folder.

    Returns:
        Bytes that are gone; 0 if there was nothing.

    Raises:
        ModelError: It is neither; the message names those that there are.
        VesicleError: Another process is at work on it, or it cannot be removed.
    """
    models = cache_root() / "models"
    if name in CATALOGUE:
        entry = CATALOGUE[name]
        paths = [folder_of(entry), gguf_of(entry), parts_of(entry)]
    elif _CONVERSION.fullmatch(name):
        paths = [models / name]
    else:
        allowed = ", ".join([*CATALOGUE, *(found.name for found in conversions())])
        raise ModelError(f"{name!r} is not a model of the cache; allowed: {allowed}")
    remove_leftovers(models)
    if in_work(models / name):
        raise VesicleError(
            f"{name} is in use: another process is fetching, converting or removing it; wait until "
            "it ends"
        )
    n_bytes = sum(folder_bytes(path) for path in paths)
    for path in paths:
        remove_whole(path)
    return n_bytes


def _conversion(folder: Path) -> Cached:
    source, ready = None, False
    # Anything may stand in a damaged manifest.
    with suppress(DataError, LookupError, TypeError, ValueError):
        manifest = read_json(folder / MANIFEST)
        source = manifest["source"] if isinstance(manifest["source"], str) else None
        sha256 = manifest["sha256"]
        ready = folder.name == f"gguf-{sha256[:16]}" and is_converted(folder, sha256)
    return Cached(
        name=folder.name,
        folder=folder,
        ready=ready,
        source=source,
        folder_bytes=folder_bytes(folder),
    )
