"""Text to tokens: documents from local files or the Hugging Face hub, and windows of equal length.

A source is

- a `.txt` or `.txt.gz` file: one document;
- a `.jsonl` or `.jsonl.gz` file: one document a line, taken from one field;
- a folder: its files of these kinds, in the order of their names. If some names begin with the
  wanted split (`train-00.jsonl`, `test.txt`), only those are read, and if some begin with another
  one's alone, none is; local files have no other notion of a split;
- a hub data set, `owner/name` or `owner/name:configuration`, streamed.

Some data sets (WikiText among them) hold one *line* a row, line end included. If every row that is
not empty ends in a newline, the rows are lines of one document and are joined without anything
between; else each row is a document, and `token_windows` puts a separator after each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.errors import DataError
from vesicle.files import lone_surrogate, read_json_lines, read_text

if TYPE_CHECKING:
    from torch import Tensor

_SPLITS = ("train", "valid", "dev", "test")
_LISTED = 12
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def load_documents(
    source: str | Path,
    split: str = "train",
    field: str = "text",
    *,
    max_characters: int = 100_000_000,
) -> list[str]:
    """Read the documents of a source, as the module docstring tells.

    Args:
        source: A file, a folder or a hub data set.
        split: Which part of a hub data set, or which files of a folder that has such files.
        field: The field that holds the text in JSON lines and hub data sets.
        max_characters: Reading stops after the document that reaches this many.

    Returns:
        At least one document; none is blank.

    Raises:
        DataError: The source is missing, empty, unreachable or malformed, or has no such field or
            split.
    """
    path = Path(source).expanduser()
    if path.exists():
        rows: Iterable[str] = chain.from_iterable(
            _read_file(file, field) for file in _files(path, split)
        )
    elif _HUB_ID.fullmatch(str(source)) and not str(source).endswith(SUFFIXES):
        rows = _read_hub(str(source), split, field)
    else:
        raise DataError(
            f"no data at {source}: give a .txt, .jsonl or .jsonl.gz file, a folder of those, "
            "or a Hugging Face data set such as owner/name:configuration"
        )
    documents = joined(_first(rows, max_characters))
    if not documents:
        raise DataError(f"{source} holds no text")
    return documents


def joined(rows: Sequence[str]) -> list[str]:
    """Rows as documents: one, if each that is not blank ends its line, else one a row.

    Args:
        rows: Texts. Lines are joined as they are, blank ones included.

    Returns:
        The documents; none is blank.
    """
    filled = [row for row in rows if row.strip()]
    if len(filled) > 1 and all(row.endswith("\n") for row in filled):
        return ["".join(rows)]
    return filled


def token_windows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    length: int,
    separator: str = "\n\n",
) -> Tensor:
    """Cut documents into windows of equal length that do not overlap.

    Each document is encoded with the separator behind it, the tokens are joined in order, and what
    is left over at the end is dropped. The same documents give the same windows.

    Args:
        documents: Texts.
        encode: Text to token ids.
        length: Tokens in a window.
        separator: Put after each document but the last.

    Returns:
        (N, length) int64 token ids, N at least 1.

    Raises:
        DataError: There are too few tokens for one window.
        ValueError: If `length` is below 2.
    """
    import torch

    if length < 2:
        raise ValueError(f"length is {length}; allowed: 2 and above")
    last = len(documents) - 1
    parts = [
        torch.tensor(encode(text + (separator if i < last else "")), dtype=torch.long)
        for i, text in enumerate(documents)
    ]
    tokens = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"the text has {len(tokens)} tokens; one window needs {length}: give more text or "
            "a shorter sequence length"
        )
    return tokens[: count * length].view(count, length)


def _first(rows: Iterable[str], max_characters: int) -> list[str]:
    taken: list[str] = []
    size = 0
    for row in rows:
        taken.append(row)
        size += len(row)
        if size >= max_characters:
            break
    return taken


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"cannot read {path}: allowed files are {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file")
    wanted = [f for f in files if f.name.startswith(split)]
    # What is named after splits is of splits: a misspelt one must not mix them.
    if not wanted and any(f.name.startswith(_SPLITS) for f in files):
        raise DataError(
            f"{path} has no file of the split {split!r}; files there: "
            f"{', '.join(f.name for f in files[:_LISTED])}"
        )
    return wanted or files


def _read_file(path: Path, field: str) -> Iterator[str]:
    if path.name.endswith((".txt", ".txt.gz")):
        # A text file is one document whatever its line ends are.
        yield read_text(path).rstrip("\n")
        return
    for where, row in read_json_lines(path):
        yield _text(row, field, where)


def _text(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object with a field {field!r}")
    if field not in row:
        known = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{where} has no field {field!r}; its fields: {known}")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} is not text but {type(row[field]).__name__}")
    if half := lone_surrogate(row[field]):
        raise DataError(f"{where}: field {field!r} holds {half}, half of a surrogate pair")
    return str(row[field])


def _read_hub(source: str, split: str, field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {source} from the hub needs the package datasets: "
            "install vesicle[train], or give a local file"
        ) from error
    name, _, configuration = source.partition(":")
    # The library raises a great many kinds of error, its own and those of the network below it.
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _text(row, field, f"{source} {split} row {number}")
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot read {source} (split {split!r}) from the hub: {reason}; "
            "a local .txt or .jsonl file can be given instead"
        ) from error
