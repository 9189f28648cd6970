"""The same sentences in several languages, read and checked.

A folder of data sets holds `flores200/test.jsonl.gz` (NLLB team 2022), one sentence a row with a
field for each language, named by language and script such as `deu_Latn`. The sample has five
languages. Pairs to tune on are another set, `multi30k/train.jsonl.gz` (Elliott et al. 2016):
FLORES-200 is for evaluation alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vesicle.errors import DataError
from vesicle.files import decode_json_lines, lone_surrogate, read_json_lines

SAMPLE = "sample"
PAIRS = {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn", "cs": "ces_Latn"}
"""Fields of the pairs, and the same languages as FLORES-200 names them."""
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Sentences.

    Attributes:
        languages: K of them.
        read: By language, the sentences by which neurons are found.
        judged: By language, others, by which lesions are judged.
    """

    languages: tuple[str, ...]
    read: tuple[tuple[str, ...], ...]
    judged: tuple[tuple[str, ...], ...]


def read_parallel(
    data: str, languages: Sequence[str] | None, sentences: int, judged: int
) -> Parallel:
    """Read sentences, in a random order that is always the same.

    Args:
        data: A folder of data sets, or `sample`.
        languages: Which; all that the data have if None.
        sentences: To find neurons by.
        judged: Others, to judge lesions by.

    Raises:
        DataError: A file is missing, a row has the wrong form, there is no such language, or there
            are too few sentences or languages.
    """
    if data == SAMPLE:
        file = resources.files("vesicle.neurons") / "samples" / "languages.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")
        rows = list(decode_json_lines(lines, "the sample, languages.jsonl"))
    else:
        rows = list(read_json_lines(_file(Path(data).expanduser() / "flores200", "test")))
    there = _languages(rows)
    for language in languages or ():
        if language not in there:
            raise DataError(f"there is no language {language!r}; allowed: {', '.join(there)}")
    chosen = tuple(there if languages is None else dict.fromkeys(languages))
    if len(chosen) < 2:
        raise DataError(f"--languages names {len(chosen)}; allowed: 2 languages and more")
    if len(rows) < sentences + judged:
        raise DataError(
            f"the data have {len(rows)} sentences; --sentences {sentences} and --judged {judged} "
            f"need {sentences + judged}"
        )
    texts = [tuple(_text(row, language, place) for language in chosen) for place, row in rows]
    random.Random(0).shuffle(texts)
    by_language = tuple(zip(*texts, strict=True))
    return Parallel(
        languages=chosen,
        read=tuple(own[:sentences] for own in by_language),
        judged=tuple(own[sentences : sentences + judged] for own in by_language),
    )


def read_pairs(data: str) -> list[dict[str, str]]:
    """Sentences to tune on, each by language as `PAIRS` names them, in a random order.

    Raises:
        DataError: There are none, or a row has the wrong form.
    """
    if data == SAMPLE:
        raise DataError("--data is sample, which has no pairs to tune on; allowed: a folder")
    rows = list(read_json_lines(_file(Path(data).expanduser() / "multi30k", "train")))
    pairs = [
        {language: _text(row, field, place) for field, language in PAIRS.items()}
        for place, row in rows
    ]
    if not pairs:
        raise DataError("the pairs to tune on hold no sentence")
    random.Random(0).shuffle(pairs)
    return pairs


def _file(folder: Path, split: str) -> Path:
    for suffix in _SUFFIXES:
        if (path := folder / (split + suffix)).is_file():
            return path
    raise DataError(f"{folder} holds no {split}{_SUFFIXES[0]}, with or without .gz")


def _languages(rows: Iterable[tuple[str, Any]]) -> list[str]:
    """Languages of the first row."""
    place, row = next(iter(rows), ("the data", None))
    found = [name for name in row if _LANGUAGE.fullmatch(name)] if isinstance(row, dict) else []
    if not found:
        raise DataError(f"{place} has no language; allowed: fields such as deu_Latn")
    return found


def _text(row: Any, field: str, place: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        told = "missing" if value is None else repr(value)[:40]
        raise DataError(f"{place}: {field} is {told}; allowed: a text")
    if half := lone_surrogate(value):
        raise DataError(f"{place}: {field} holds {half}, half of a surrogate pair")
    return value.strip()
