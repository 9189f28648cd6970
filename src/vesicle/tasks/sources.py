"""Where a task's rows come from: the hub, a local folder, or the sample that is shipped.

Rows are checked against the fields that the task names. Those that cannot be asked are listed with
what is wrong with them; of the others the task makes items, and a limit draws some at random. Which
ones depends on the seed, on nothing else, and a smaller limit draws a part of what a larger one
draws. The items' SHA-256 tells whether two runs had the same questions.

The local format is JSON Lines, one file a split: `DIR/FOLDER/SPLIT.jsonl.gz` or `.jsonl`
(`docs/tasks/local_data.md`).
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vesicle.errors import DataError
from vesicle.files import lone_surrogate, read_lines, try_json_lines
from vesicle.tasks.base import HubSet, Row, Settings, Task
from vesicle.tasks.hub import hub_rows
from vesicle.tasks.items import Item, Missing

SAMPLE = "sample"
SUFFIXES = (".jsonl.gz", ".jsonl")
_HELP = "docs/tasks/local_data.md"
_IDS = ("id", "_id", "level")
_JSON_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The items of one run of a task.

    Attributes:
        items: In the order of their source.
        available: How many there were to draw from.
        split: The split they are from.
        origin: What kind of source it was.
        description: The source in a few words, without the names of this machine's folders.
        sha256: Of the items' content, as canonical JSON, one line an item.
        missing: Rows that cannot be asked, in order; none of them is drawn.
        n_rows: How many rows there were, those included.
        place: The source as messages name it, which no record keeps.
    """

    items: tuple[Item, ...]
    available: int
    split: str
    origin: Literal["hub", "local", "sample"]
    description: str
    sha256: str
    missing: tuple[Missing, ...] = ()
    n_rows: int = 0
    place: str = field(default="", repr=False, compare=False)


def load_items(
    task: Task,
    *,
    data: str | None,
    split: str | None,
    settings: Settings,
    limit: int | None,
) -> Loaded:
    """Read a task's rows, make items of them and draw some.

    Args:
        task: The task.
        data: None for the hub (or the filler that is shipped, if the task needs nothing from
            there), `sample` for the rows that are shipped, else a local folder.
        split: None for the task's own choice.
        settings: Seed of the draw, and what generated tasks need.
        limit: Most items to draw, None for all. Documents of tasks of kind `loss` are not limited.

    Returns:
        At least one item.

    Raises:
        DataError: The source is missing, unreachable or empty, or no row of it can be asked.
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; allowed: 1 and above")
    split = split or task.default_split
    source = _source(task, data, split)
    rows = _Checked(source, task)
    items = _with_unique_ids(task.items(rows, settings))
    chosen, available = _draw(items, None if task.kind == "loss" else limit, settings.seed)
    if not chosen:
        raise DataError(f"{source.name} holds nothing to ask: it gave no items for {task.name}")
    return Loaded(
        items=chosen,
        available=available,
        split=split,
        origin=source.origin,
        description=source.description,
        sha256=_digest(chosen),
        missing=tuple(rows.missing),
        n_rows=rows.count,
        place=source.name,
    )


# Sources ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Rows, each with its place and what is wrong with it, and names for where they come from."""

    rows: Iterable[tuple[str, Any, str]]  # such as `line 3`, the row, "" if nothing is wrong
    name: str  # in messages
    origin: Literal["hub", "local", "sample"]
    description: str  # in results


def _source(task: Task, data: str | None, split: str) -> _Source:
    if data is not None and data != SAMPLE:
        return _local(task, Path(data).expanduser(), split)
    if split not in task.splits:
        raise DataError(f"{task.name} has no split {split!r}; allowed: {', '.join(task.splits)}")
    if data == SAMPLE or task.hub is None:
        return _shipped(task)
    return _hub(task, task.hub, split)


def _shipped(task: Task) -> _Source:
    """The sample of the task's own, or filler for a task that has none. One for all splits."""
    folder = resources.files("vesicle.tasks") / "samples"
    own = folder / f"{task.folder}.jsonl"
    file = own if own.is_file() else folder / "filler.jsonl"
    kind = "the sample" if own.is_file() else "the filler text"
    lines = file.read_text(encoding="utf-8").split("\n")
    description = f"{kind} that comes with Vesicle, {file.name}"
    return _Source(_decoded(lines), description, "sample", description)


def _local(task: Task, root: Path, split: str) -> _Source:
    folder = _local_folder(task, root)
    there = {suffix: folder / f"{split}{suffix}" for suffix in SUFFIXES}
    file = next((path for path in there.values() if path.is_file()), None)
    if file is None:
        raise DataError(
            f"no split {split!r} of {task.name} in {folder}: looked for "
            f"{' and '.join(path.name for path in there.values())}; "
            f"splits there: {_listed(_splits(folder))}"
        )
    description = f"{task.folder}/{file.name} of a local folder"
    return _Source(_decoded(read_lines(file)), str(file), "local", description)


def _local_folder(task: Task, root: Path) -> Path:
    """The folder with the task's splits: `root/FOLDER`, `root/NAME`, or `root` itself."""
    if not root.is_dir():
        fault = "is a file, and a folder is needed" if root.exists() else "does not exist"
        raise DataError(
            f"the data folder {root} {fault}; inside, {task.name} would be {task.folder}/, "
            f"see {_HELP}; --data {SAMPLE} takes the rows that come with Vesicle"
        )
    # The name first: WikiText-103 may have a folder, and shares WikiText-2's otherwise.
    names = list(dict.fromkeys((task.name, task.folder)))
    for folder in (*(root / name for name in names), root):
        if _splits(folder):
            return folder
    others = sorted(path.name for path in root.iterdir() if path.is_dir() and _splits(path))
    raise DataError(
        f"no data for {task.name} in {root}: looked for {'/ and '.join(names)}/ with "
        f"SPLIT{' or SPLIT'.join(SUFFIXES)} files; folders there: {_listed(others)}; see {_HELP}"
    )


def _splits(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        files = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    return sorted({n.removesuffix(s) for n in files for s in SUFFIXES if n.endswith(s)})


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def _hub(task: Task, hub: HubSet, split: str) -> _Source:
    there = hub.splits.get(split, split)
    name = " ".join(filter(None, (hub.path, hub.configuration, there)))
    instead = (
        f"use --data {SAMPLE} (comes with Vesicle), or "
        f"--data DIR with {task.folder}/{split}{SUFFIXES[0]} in it ({_HELP})"
    )
    rows = _converted(hub_rows(hub, there, name, instead), task)
    return _Source(rows, name, "hub", f"{name} of the Hugging Face hub")


def _decoded(lines: Iterable[str | bytes]) -> Iterator[tuple[str, Any, str]]:
    for number, value, fault in try_json_lines(lines):
        yield f"line {number}", value, fault


def _converted(rows: Iterable[Row], task: Task) -> Iterator[tuple[str, Any, str]]:
    """Rows of the hub's format in the local one."""
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        try:
            local = list(task.from_hub(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            fault = (
                f"has another form than {task.name} knows "
                f"({type(error).__name__}: {error}); fields there: {_listed(sorted(row))}"
            )
            yield where, None, fault
            continue
        yield from ((where, one, "") for one in local)


# Rows -------------------------------------------------------------------------------------------


class _Checked:
    """Rows that can be asked, with an id each, once; the others are listed as they come.

    Attributes:
        missing: The others.
        count: Rows so far, of both kinds.
    """

    def __init__(self, source: _Source, task: Task) -> None:
        self._source, self._task = source, task
        self.missing: list[Missing] = []
        self.count = 0

    def __iter__(self) -> Iterator[Row]:
        """The rows.

        Raises:
            DataError: At the end, if there were none.
        """
        for where, row, fault in self._source.rows:
            number, self.count = self.count, self.count + 1
            fault = fault or _fault(row, self._task)
            if fault:
                self.missing.append(Missing(item=where, reason=fault))
            else:
                yield {"id": str(number), **row}
        name = self._source.name
        if not self.count:
            raise DataError(f"{name} holds no rows")
        if len(self.missing) == self.count:
            first = self.missing[0]
            others = f"; nor can any of its {self.count} rows be used" if self.count > 1 else ""
            raise DataError(f"{name} {first}{others}")


def _fault(row: Any, task: Task) -> str:
    """What keeps a row from being asked; "" if nothing."""
    if not isinstance(row, dict):
        return f"is not a JSON object but {_told(row)}"
    for name, kind in task.fields.items():
        if name not in row:
            return (
                f"has no field {name!r}; fields there: {_listed(sorted(row))}; "
                f"{task.name} needs: {', '.join(task.fields)}"
            )
        if not _is(row[name], kind):
            return f"field {name!r} is {_told(row[name])}; allowed: {_JSON_NAMES[kind]}"
    for name in (*task.fields, *task.optional):
        value = row.get(name)
        if name not in task.fields and isinstance(value, dict | list) and name in _IDS:
            return f"field {name!r} is {_told(value)}; allowed: {_JSON_NAMES[str]}"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (half := lone_surrogate(text)):
                return f"field {name!r} holds {half}, half of a surrogate pair"
    return task.check(row)


def _is(value: object, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    # True is an int to Python.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _told(value: object) -> str:
    """A value's type in JSON's words."""
    if isinstance(value, list) and not _is(value, list):
        return "a list with other things than text"
    return _JSON_NAMES.get(type(value), type(value).__name__)


# Items ------------------------------------------------------------------------------------------


def _draw(items: Iterable[Item], limit: int | None, seed: int) -> tuple[tuple[Item, ...], int]:
    """Draw `limit` items without replacement, kept in order; and how many there were.

    Every item gets a random number, and those with the smallest are kept: one pass, no more than
    `limit` items in memory. `random.Random.random` promises the same numbers in every version.
    """
    if limit is None:
        everything = tuple(items)
        return everything, len(everything)
    draw, count = random.Random(seed), 0
    kept: list[tuple[float, int, Item]] = []
    for item in items:
        # Negative, because the heap's first is its smallest. The position settles ties.
        entry = (-draw.random(), count, item)
        count += 1
        if len(kept) < limit:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    return tuple(item for _, _, item in sorted(kept, key=lambda entry: entry[1])), count


def _with_unique_ids(items: Iterable[Item]) -> Iterator[Item]:
    """Items with `#2`, `#3` and so on behind ids that came before (RACE repeats its passages')."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.id] += 1
        times = seen[item.id]
        yield item if times == 1 else replace(item, id=f"{item.id}#{times}")


def _digest(items: tuple[Item, ...]) -> str:
    digest = sha256()
    for item in items:
        line = json.dumps(asdict(item), sort_keys=True, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
