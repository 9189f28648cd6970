"""Telling a path from a hub id, and fetching files of a hub id.

A mistyped path must not be asked of the hub: it would be told as a model that is not there, and the
name of somebody's folder would leave the machine.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vesicle.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that can run code when they are loaded."""
_FILES = (".gguf", ".safetensors", ".json", ".jsonl", ".txt", ".zip", ".tar", ".gz", *PICKLES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_LETTERS = 96


def local_path(spec: Path | str, *, lead: str, accepted: str, revision: str | None) -> Path | None:
    """The file or folder that a user names, or None if it is a hub id that is named.

    A name is a path if there is something at it, or if it looks like one: it is a `Path`, begins
    with `.`, `~` or `/`, has two slashes or a backslash, ends as files do, or its first part is a
    folder here (unless a revision says that a hub id is meant).

    Args:
        spec: What the user gave.
        lead: How messages begin.
        accepted: What is accepted, for messages.
        revision: Of a hub id, if one was given.

    Raises:
        ModelError: It looks like a path and nothing is there, it is neither path nor hub id, or a
            revision was given for a path.
    """
    text = str(spec)
    # Unlike those of Path, these take names that are too long or of no known user.
    name = os.path.expanduser(text)
    if os.path.exists(name):
        if revision is not None:
            raise ModelError(
                f"{text} is on this machine, and revision {revision!r} is given; "
                "a revision is of a hub id"
            )
        return Path(name)
    if (
        isinstance(spec, Path)
        or text.startswith((".", "~", "/", os.sep))
        or text.count("/") > 1
        or "\\" in text
        or ends_as_files(text)
    ):
        raise ModelError(f"{lead}: no such file or folder")
    first, slash, _ = text.partition("/")
    if slash and revision is None and os.path.isdir(first):
        raise ModelError(
            f"{lead}: no such file or folder; the hub is not asked, because there is a folder "
            f"{first!r} here"
        )
    if len(text) > _MOST_LETTERS or not _HUB_ID.fullmatch(text) or "--" in text or ".." in text:
        raise ModelError(f"{lead}: it is none of: {accepted}")
    return None


def ends_as_files(text: str) -> bool:
    """Whether a name ends as files of models do."""
    return text.lower().endswith(_FILES)


def fetch(
    spec: str,
    files: Sequence[str],
    *,
    lead: str,
    accepted: str,
    revision: str | None,
    token: str | bool | None,
) -> Path:
    """Fetch files of a hub id, or find them in the hub's cache.

    Args:
        spec: The id.
        files: Names or patterns; those of subfolders are left out.
        lead: How messages begin.
        accepted: What is accepted, for messages.
        revision: Branch, tag or commit; the main branch for None.
        token: For private and gated repositories; None for the one that the hub's client has saved.

    Returns:
        The folder with those that there are.

    Raises:
        ModelError: The hub does not have it, does not give it, or cannot be reached.
    """
    # Imported here because no other kind of model needs the hub's client, which loads slowly.
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            spec,
            revision=revision,
            token=token,
            allow_patterns=list(files),
            # Subfolders hold the same weights once more, in other formats.
            ignore_patterns=["*/*"],
        )
    except errors.HFValidationError as error:
        raise ModelError(f"{lead}: it is none of: {accepted}") from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{lead}: its owner grants access on request: ask on its page, then log in"
        ) from error
    except errors.RepositoryNotFoundError as error:
        # A name without an owner is hardly one of the hub's.
        hint = "" if "/" in spec else f"; accepted: {accepted}"
        raise ModelError(
            f"{lead}: no such folder, and no such model on the hub (or it is private){hint}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{lead}: the hub has it, but no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{lead}: no such folder, not in the hub's cache, and the hub cannot be "
            f"reached; accepted: {accepted}"
        ) from error
    except OSError as error:
        raise ModelError(f"{lead}: cannot fetch it from the hub: {error}") from error
    return Path(folder)


def commit_of(folder: Path, revision: str | None) -> str | None:
    """The commit that a fetched folder is of, so that more files are fetched of the same one."""
    return folder.name if _COMMIT.fullmatch(folder.name) else revision
