"""Documents whose membership is asked: rows of local files, each document once.

A document that stood in both halves of a set would be a member and none at once, so exact copies
are dropped. Near copies are not looked for: what they have in common is learnt with one of them,
and makes the other look like a member.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vesicle.errors import DataError
from vesicle.files import decode_json_lines, lone_surrogate, read_json_lines, read_text

FIELDS = ("text", "article", "document")
"""Of a row; the first of them that it has is the document."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
_SAMPLES = ("arxiv", "cnn_dailymail", "filler", "wikitext2")
"""Rows that come with Vesicle and have one of these fields."""


def read_documents(source: Path | str) -> list[str]:
    """Read documents: rows of JSON lines, or text files, each of which is one.

    Args:
        source: A file of one of `SUFFIXES`, a folder of those, or `sample` for 20 short texts that
            come with Vesicle.

    Returns:
        At least one; none is blank, and no two are equal.

    Raises:
        DataError: There are none, or a row is not an object with a text in one of `FIELDS`.
    """
    found: dict[str, None] = {}
    for place, text in _texts(source):
        if (half := lone_surrogate(text)) is not None:
            raise DataError(f"{place} has half of a surrogate pair, {half}")
        if text.strip():
            found.setdefault(text)
    if not found:
        raise DataError(f"{source} holds no text")
    return list(found)


def fingerprint(texts: Sequence[str]) -> str:
    """A name for texts in their order, by all that is in them."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    return digest.hexdigest()


def _texts(source: Path | str) -> Iterator[tuple[str, str]]:
    """Texts, each with a name for messages."""
    if str(source) == "sample":
        folder = resources.files("vesicle.tasks") / "samples"
        for name in _SAMPLES:
            lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
            yield from (_row(place, row) for place, row in decode_json_lines(lines, name))
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"no data at {source}; allowed: a file that ends in one of {', '.join(SUFFIXES)}, "
            "a folder of those, or sample"
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise DataError(f"{source} has no file that ends in one of {', '.join(SUFFIXES)}")
    for file in files:
        if file.name.endswith((".txt", ".txt.gz")):
            yield str(file), read_text(file)
        else:
            yield from (_row(place, row) for place, row in read_json_lines(file))


def _row(place: str, row: Any) -> tuple[str, str]:
    name = next((name for name in FIELDS if isinstance(row, dict) and name in row), None)
    if name is None:
        raise DataError(f"{place} has no document; allowed fields: {', '.join(FIELDS)}")
    if not isinstance(row[name], str):
        raise DataError(f"{place}: {name} is {type(row[name]).__name__}; allowed: a text")
    return place, row[name]
