"""One bad row among good ones is named with its line, and the others are asked, on every task."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.rows import LOCAL, SETTINGS
from vesicle.errors import DataError
from vesicle.tasks.registry import find_task, task_names
from vesicle.tasks.sources import Loaded, load_items

FILLER = "Walls are thick. Doors are wide. The roof is high above the hall. Windows let light in."
ROWS: dict[str, dict[str, Any]] = {
    **{name: rows[0] for name, rows in LOCAL.items()},
    **{name: {"text": FILLER} for name in ("needle", "ruler", "briefing", "instructions")},
}
HALF = "half \ud800"

# What is wrong, the line in the file, and a part of what is said of it.
LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{oops", "is not JSON: Expecting property name"),
    "cut short": (b'{"text": "a', "is not JSON: Invalid control character"),
    "not UTF-8": (b'{"text": "\xff"}', "is not UTF-8 text: byte 0xff at offset 10"),
    "a list": (b"[1]", "is not a JSON object but a list"),
    "a text": (b'"row"', "is not a JSON object but text"),
    "null": (b"null", "is not a JSON object but null"),
    "too deep": (b'{"text": ' + b"[" * 100_000, "is not JSON: maximum recursion depth"),
    "a huge number": (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "an empty object": (b"{}", "has no field"),
}


def with_field(row: dict[str, Any], name: str, value: Any) -> bytes:
    return json.dumps({**row, name: value}).encode()


def of_fields(task: str) -> dict[str, tuple[bytes, str]]:
    """Each field of a task missing, null, of other types, and broken."""
    row, found = ROWS[task], {}
    for name, kind in find_task(task).fields.items():
        rest = {key: value for key, value in row.items() if key != name}
        found[f"no {name}"] = json.dumps(rest).encode(), f"has no field '{name}'"
        wrong: dict[str, Any] = {"null": None, "an object": {}, "true": True, "infinite": 1e999}
        wrong |= {"a number": 3} if kind is not int else {"a text": "3"}
        wrong |= {"mixed": ["a", 3], "nested": [["a"]]} if kind is list else {"a list": ["a"]}
        for what, value in wrong.items():
            found[f"{name} is {what}"] = with_field(row, name, value), f"field '{name}' is "
        if kind is not int:
            half = HALF if kind is str else ["fine", HALF]
            line = with_field(row, name, half)
            found[f"{name} with half a surrogate"] = line, f"field '{name}' holds \\ud800, half of"
    for name in find_task(task).optional:
        line = with_field(row, name, HALF if name != "all_classes" else [HALF])
        found[f"{name} with half a surrogate"] = line, f"field '{name}' holds \\ud800, half of"
    return found


def own(task: str, name: str, value: Any, fault: str) -> tuple[str, str, tuple[bytes, str]]:
    return task, f"{name}={value!r:.20}", (with_field(ROWS[task], name, value), fault)


CASES = [(task, what, case) for task in ROWS for what, case in LINES.items()]
CASES += [(task, what, case) for task in ROWS for what, case in of_fields(task).items()]
CASES += [
    own("squad", "answers", [], "field 'answers' is empty"),
    own("squad", "answers", ["", " \n"], "field 'answers' is empty"),
    own("squad", "id", {"deep": []}, "field 'id' is an object; allowed: text"),
    own("race", "answer", 4, "has the answer 4 to 4 options"),
    own("race", "answer", -1, "has the answer -1 to 4 options"),
    own("race", "answer", 10**4000, "has the answer of a great many digits to 4 options"),
    own("race", "options", [], "has the answer 2 to 0 options"),
    own("race", "options", ["a", " ", "b", "c"], "has an option without text"),
    own("cnn_dailymail", "highlights", " \n", "field 'highlights' is empty"),
    own("arxiv", "abstract", "", "field 'abstract' is empty"),
    own("wmt14_en_de", "de", " ", "field 'de' is empty"),
    own("longbench", "answers", [], "field 'answers' is empty"),
    own("longbench", "dataset", "gsm8k", "is of the data set 'gsm8k'; allowed: narrativeqa"),
    own("longbench", "all_classes", 3, "field 'all_classes' is no list of texts"),
    own("longbench", "all_classes", [3], "field 'all_classes' is no list of texts"),
]


def load(task: str, root: Path, lines: list[bytes], packed: bool = False) -> Loaded:
    found = find_task(task)
    name = f"{found.default_split}.jsonl{'.gz' if packed else ''}"
    file = root / found.folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(line + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content) if packed else content)
    settings = replace(SETTINGS, lengths=(400,), per_cell=1, encode=lambda text: text.split())  # type: ignore[arg-type, return-value]  # tokens are only counted
    return load_items(found, data=str(root), split=None, settings=settings, limit=None)


def test_every_task_is_covered():
    assert set(ROWS) == set(task_names())


@pytest.mark.parametrize(
    ("task", "case"), [pytest.param(t, c, id=f"{t}-{what}") for t, what, c in CASES]
)
def test_a_bad_row_among_good_ones(task: str, case: tuple[bytes, str], tmp_path: Path):
    bad, fault = case
    row = ROWS[task]
    good = [json.dumps({**row, "id": f"g{n}", "_id": f"g{n}"}).encode() for n in range(9)]
    whole = load(task, tmp_path / "whole", good)
    found = load(task, tmp_path / "mixed", [*good[:3], bad, *good[3:]])
    (missing,) = found.missing
    assert missing.item == "line 4"
    assert fault in missing.reason
    assert str(missing).encode()  # any file can hold it
    assert "\n" not in str(missing)
    assert (found.n_rows, whole.n_rows) == (10, 9)
    assert found.items == whole.items
    assert found.sha256 == whole.sha256
    assert str(tmp_path) not in repr(found)
    assert found.place.startswith(str(tmp_path))
    with pytest.raises(DataError) as raised:
        load(task, tmp_path / "alone", [bad, bad])
    assert f"{find_task(task).default_split}.jsonl line 1" in str(raised.value)
    assert fault in str(raised.value)
    assert str(raised.value).endswith("; nor can any of its 2 rows be used")


@pytest.mark.parametrize("task", ROWS)
def test_a_byte_order_mark_is_no_fault(task: str, tmp_path: Path):
    """The same items from a marked file, packed or not, as from a plain one."""
    line = json.dumps(ROWS[task]).encode()
    plain = load(task, tmp_path / "plain", [line])
    for packed in (False, True):
        found = load(task, tmp_path / str(packed), [b"\xef\xbb\xbf" + line], packed)
        assert found.items == plain.items
        assert not found.missing


def test_other_fields_may_hold_anything(tmp_path: Path):
    line = json.dumps({**ROWS["squad"], "note": HALF, "more": [1e999, {"deep": [[]]}]}).encode()
    assert not load("squad", tmp_path, [line]).missing


def test_rows_without_an_id_keep_their_number_beside_a_bad_one(tmp_path: Path):
    bare = {name: value for name, value in ROWS["squad"].items() if name != "id"}
    lines = [json.dumps(bare).encode()] * 3
    found = load("squad", tmp_path, [lines[0], b"{}", lines[1]])
    assert [item.id for item in found.items] == ["0", "2"]


def test_a_bad_row_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    """A row that does not convert, as one that does and is wrong."""
    good = {
        "example_id": "high7.txt",
        "article": "Ann reads.",
        "answer": "C",
        "question": "Who?",
        "options": ["a", "b", "c", "d"],
    }
    rows = [good, {**good, "answer": "E"}, {**good, "article": None}, good]
    monkeypatch.setattr("vesicle.tasks.sources.hub_rows", lambda *_: iter(rows))
    settings = SETTINGS
    found = load_items(find_task("race"), data=None, split=None, settings=settings, limit=None)
    assert [m.item for m in found.missing] == ["row 2", "row 3"]
    assert "has another form than race knows (ValueError" in found.missing[0].reason
    assert "field 'article' is null" in found.missing[1].reason
    assert len(found.items) == 2
