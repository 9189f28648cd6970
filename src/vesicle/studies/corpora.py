"""What small decoders are trained and judged on: running text, translation, long documents.

Texts come from a local folder (`DIR/NAME/SPLIT.jsonl.gz` or `.jsonl`, fields as `docs/tasks/` has
them), from the Hugging Face hub, or from the rows that come with Vesicle (`sample`), which are
enough to try a study.

- `lm`: WikiText-2, windows of running text; loss of every token.
- `translation`: Multi30k, English to German as one text: several captions, a mark, and the same in
  the other language, so that what is to be translated lies beyond a window of the newest tokens.
- `summary`: PubMed, the beginning of a paper, a mark, and its abstract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.errors import DataError
from vesicle.files import decode_json_lines, read_json_lines
from vesicle.tasks.base import HubSet
from vesicle.tasks.hub import hub_rows
from vesicle.training.data import load_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

TASKS = ("lm", "translation", "summary")
CAPTIONS = 8
"""Of a text of translation, unless told otherwise."""
_MARK = "\n=>\n"


@dataclass(frozen=True, kw_only=True)
class _Set:
    """Where a task's rows are.

    Attributes:
        folder: In a local folder of data sets.
        hub: On the hub.
        fields: Texts of a row: the source, and what follows it.
        sample: Rows that come with Vesicle and have these fields.
        splits: To train on, to set dials with, to judge by.
    """

    folder: str
    hub: HubSet
    fields: tuple[str, ...]
    sample: str
    splits: tuple[str, str, str] = ("train", "validation", "test")


_SETS = {
    "lm": _Set(
        folder="wikitext2",
        hub=HubSet(path="Salesforce/wikitext", configuration="wikitext-2-raw-v1"),
        fields=("text",),
        sample="wikitext2",
    ),
    "translation": _Set(
        folder="multi30k",
        hub=HubSet(path="bentrevett/multi30k"),
        fields=("en", "de"),
        sample="wmt14_en_de",
    ),
    "summary": _Set(
        folder="pubmed",
        hub=HubSet(path="ccdv/pubmed-summarization"),
        fields=("article", "abstract"),
        sample="arxiv",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of a task.

    Attributes:
        tokenizer: Learnt from its training texts.
        train: (N, T) ids.
        valid: (M, T).
        test: (M, T).
        scored: For the three, where each position is a target that counts, (N, T) booleans.
        prompts: Ids of each test text up to what is to be generated; () for `lm`.
        references: What that is.
    """

    tokenizer: Tokenizer
    train: Tensor
    valid: Tensor
    test: Tensor
    scored: tuple[Tensor, Tensor, Tensor]
    prompts: tuple[list[int], ...] = ()
    references: tuple[str, ...] = ()


def load_corpus(
    task: str,
    data: str | None,
    *,
    vocabulary: int,
    length: int,
    most_test: int,
    more: Sequence[str] = (),
) -> Corpus:
    """Read a task's texts, learn a vocabulary from those to train on, and cut windows.

    Args:
        task: One of `TASKS`.
        data: A local folder, `sample`, or None for the hub.
        vocabulary: Tokens.
        length: T.
        most_test: Most windows to judge by, and to set dials with.
        more: More running text to train on, for `lm`.

    Raises:
        DataError: There is no such data, a row lacks a field, or there is too little text.
    """
    return load_mixture(
        (task,), data, vocabulary=vocabulary, length=length, most_test=most_test, more=more
    )[task]


def load_mixture(
    tasks: Sequence[str],
    data: str | None,
    *,
    vocabulary: int,
    length: int,
    most_test: int,
    more: Sequence[str] = (),
    captions: int = CAPTIONS,
    told: float = 1.0,
) -> dict[str, Corpus]:
    """Several tasks in one vocabulary, learnt from the texts of all that are to be trained on.

    Args:
        tasks: Some of `TASKS`.
        data: A local folder, `sample`, or None for the hub.
        vocabulary: Tokens.
        length: T, of all tasks.
        most_test: Most windows of each to judge by, and to set dials with.
        more: More running text to train on, for `lm`.
        captions: Of a text of translation.
        told: Most of a text that may be its target, as a share: the rest is left to the source.

    Raises:
        DataError: There is no such data, a row lacks a field, or there is too little text.
    """
    from vesicle.scratch import learn_tokenizer

    rows = {task: _splits(task, data, more, captions) for task in tasks}
    learnt_from = [text for parts in rows.values() for row in parts[0] for text in row]
    tokenizer = learn_tokenizer(learnt_from, vocabulary)
    most = int(told * length)
    return {
        task: _cut(task, parts, tokenizer, length, most_test, most) for task, parts in rows.items()
    }


def _splits(
    task: str, data: str | None, more: Sequence[str], captions: int
) -> list[list[tuple[str, ...]]]:
    """Texts to train on, to set dials with, to judge by."""
    known = _SETS[task]
    parts = [_texts(known, data, split) for split in known.splits]
    if task == "lm":
        return [parts[0] + [(text,) for text in more], *parts[1:]]
    return [_pairs(task, rows, captions) for rows in parts]


def _cut(
    task: str,
    parts: list[list[tuple[str, ...]]],
    tokenizer: Tokenizer,
    length: int,
    most_test: int,
    most_told: int,
) -> Corpus:
    known = _SETS[task]
    made = [
        _windows(tokenizer, rows, length)
        if task == "lm"
        else _padded(tokenizer, rows, length, most_told)
        for rows in parts
    ]
    for split, (ids, _) in zip(known.splits, made, strict=True):
        if len(ids) == 0:
            raise DataError(f"{known.folder}/{split} has too little text for {length} tokens")
    prompts: tuple[list[int], ...] = ()
    references: tuple[str, ...] = ()
    if task != "lm":
        kept = parts[2][:most_test]
        prompts = tuple(_prompt(tokenizer, row[0], row[1], length, most_told)[0] for row in kept)
        references = tuple(target for _, target in kept)
    return Corpus(
        tokenizer=tokenizer,
        train=made[0][0],
        valid=made[1][0][:most_test],
        test=made[2][0][:most_test],
        scored=(made[0][1], made[1][1][:most_test], made[2][1][:most_test]),
        prompts=prompts,
        references=references,
    )


def fingerprint(task: str, data: str | None, text: str | None) -> str:
    """What texts a task would be given: a digest of files, or the name of their source.

    Raises:
        DataError: There is no such data.
    """
    known = _SETS[task]
    more = load_documents(text) if text is not None and task == "lm" else []
    own = data is not None and data != "sample"
    digest = hashlib.blake2b(digest_size=8)
    for split in known.splits if own else ():
        digest.update(_file(known, Path(str(data)), split).read_bytes())
    for document in more:
        digest.update(document.encode())
    if own:
        return digest.hexdigest()
    name = "sample" if data == "sample" else known.hub.path
    return f"{name}+{digest.hexdigest()}" if more else name


def _texts(known: _Set, data: str | None, split: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, Any]]
    if data == "sample":
        file = resources.files("vesicle.tasks") / "samples" / f"{known.sample}.jsonl"
        rows = list(decode_json_lines(file.read_text("utf-8").splitlines(), known.sample))
    elif data is not None:
        rows = list(read_json_lines(_file(known, Path(data), split)))
    else:
        there = f"{known.hub.path} {split}"
        instead = f"give a folder with {known.folder}/{split}.jsonl.gz in it, or `sample`"
        read = hub_rows(known.hub, split, there, instead)
        rows = [(f"{there}, row {i}", row) for i, row in enumerate(read, 1)]
    found = []
    for place, row in rows:
        for name in known.fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise DataError(f"{place}: no text in field {name!r}")
        found.append(tuple(row[name] for name in known.fields))
    return found


def _file(known: _Set, root: Path, split: str) -> Path:
    for suffix in (".jsonl.gz", ".jsonl"):
        path = root / known.folder / f"{split}{suffix}"
        if path.is_file():
            return path
    raise DataError(
        f"no {known.folder}/{split}.jsonl.gz or .jsonl in {root}; `sample` takes the rows that "
        "come with Vesicle"
    )


def _pairs(task: str, rows: list[tuple[str, ...]], captions: int) -> list[tuple[str, ...]]:
    """Source and target texts."""
    if task == "summary":
        return rows
    groups = [rows[i : i + captions] for i in range(0, len(rows) - captions + 1, captions)]
    groups = groups or [rows]
    return [tuple("\n".join(row[k] for row in group) for k in (0, 1)) for group in groups]


def _windows(
    tokenizer: Tokenizer, rows: list[tuple[str, ...]], length: int
) -> tuple[Tensor, Tensor]:
    """Running text in windows, of which every token counts."""
    import torch

    ids = [i for (text,) in rows for i in [*tokenizer.encode(text).ids, 0]]
    n = len(ids) // length
    tokens = torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def _padded(
    tokenizer: Tokenizer, rows: list[tuple[str, ...]], length: int, most_told: int
) -> tuple[Tensor, Tensor]:
    """One text a window, filled up with ends; of which the target counts."""
    import torch

    ids, scored = [], []
    for source, target in rows:
        asked, told = _prompt(tokenizer, source, target, length, most_told)
        left = length - len(asked) - len(told)
        ids.append([*asked, *told, *[0] * left])
        scored.append([len(asked) <= i < length - left for i in range(length)])
    return (
        torch.tensor(ids, dtype=torch.long).view(-1, length),
        torch.tensor(scored, dtype=torch.bool).view(-1, length),
    )


def _prompt(
    tokenizer: Tokenizer, source: str, target: str, length: int, most_told: int
) -> tuple[list[int], list[int]]:
    """Ids of source and mark, and of the target and its end; of the source as much as fits."""
    mark = tokenizer.encode(_MARK).ids
    told = [*tokenizer.encode(target).ids, 0][: min(length - len(mark) - 1, most_told)]
    source_ids = tokenizer.encode(source).ids[: length - len(mark) - len(told)]
    return [*source_ids, *mark], told
