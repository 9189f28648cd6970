"""Rows of data sets on the Hugging Face hub, by the package datasets or from a zip file there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vesicle.errors import DataError
from vesicle.files import decode_json_lines
from vesicle.tasks.base import HubSet, Row


@dataclass(frozen=True, kw_only=True)
class HubArchive(HubSet):
    """A data set that lies on the hub as a zip of JSON Lines, which no loader of rows reads.

    Attributes:
        file: The zip's path in the repository.
        members: Paths inside the zip, in the order they are read.
    """

    file: str
    members: tuple[str, ...]


def hub_rows(hub: HubSet, split: str, name: str, instead: str) -> Iterator[Row]:
    """Read a split, row by row, in the hub's format.

    Args:
        hub: Where it lies.
        split: The hub's name for it; an archive has one split.
        name: What messages call it.
        instead: What to do without the hub, for messages.

    Yields:
        Rows as they are.

    Raises:
        DataError: Whatever goes wrong on the way, told in one line.
    """
    try:
        yield from _archive_rows(hub) if isinstance(hub, HubArchive) else _streamed_rows(hub, split)
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"reading {name} from the Hugging Face hub needs the package datasets: "
            f"pip install 'vesicle[eval]', or {instead}"
        ) from error
    # The libraries raise a great many kinds of error, their own and those of the network below.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"cannot read {name} from the Hugging Face hub: {reason}; {instead}"
        ) from error


def _streamed_rows(hub: HubSet, split: str) -> Iterator[Row]:
    import datasets

    _reach(hub)
    # Streaming fetches the wanted split; without it, all splits would be fetched first.
    yield from datasets.load_dataset(hub.path, hub.configuration, split=split, streaming=True)


def _archive_rows(hub: HubArchive) -> Iterator[Row]:
    import zipfile

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        file = hf_hub_download(hub.path, hub.file, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        _reach(hub)
        file = hf_hub_download(hub.path, hub.file, repo_type="dataset")
    with zipfile.ZipFile(file) as archive:
        for member in hub.members:
            with archive.open(member) as lines:
                for _, row in decode_json_lines(lines, f"{hub.path} {member}"):
                    yield row


def _reach(hub: HubSet) -> None:
    """Fail at once if there is no such data set or no network.

    The libraries would try again for half a minute, and report each time on standard error.
    """
    from huggingface_hub import HfApi

    HfApi().dataset_info(hub.path, timeout=30)
