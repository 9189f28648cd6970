"""ItemStore: what was finished is there again, whatever a killed process left behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vesicle.errors import VesicleError
from vesicle.evaluation.report.results import Key
from vesicle.evaluation.run.store import ITEMS, LEVELS, ItemStore

HASH = "abc"
KEY: Key = ("squad", "learnt", 0.8)
OTHER: Key = ("squad", "uniform", 0.8)
RECORD: dict[str, Any] = {"output": {"text": "é\n\u2028"}, "statistics": {"f1": [0.1, 1.0]}}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Two items and settings of one row, an item of another, and one of another hash."""
    store = ItemStore(tmp_path)
    store.add_settings(HASH, KEY, {"target": 0.8, "dial": 0.25})
    store.add(HASH, KEY, "a", RECORD)
    store.add(HASH, KEY, "b", {"n": 2})
    store.add(HASH, OTHER, "a", {"n": 3})
    store.add("other", KEY, "a", {"n": 4})
    return tmp_path


def append(folder: Path, text: str) -> None:
    with (folder / ITEMS).open("a", encoding="utf-8") as file:
        file.write(text)


def cut(folder: Path, n_bytes: int) -> None:
    """Take bytes off the end, as a killed process would."""
    path = folder / ITEMS
    path.write_bytes(path.read_bytes()[:-n_bytes])


def test_what_was_added_is_there_at_once_and_again(filled: Path):
    for store in (ItemStore(filled), ItemStore(filled)):
        assert store.has(HASH, KEY, "a")
        assert store.get(HASH, KEY, "a") == RECORD
        assert store.get(HASH, KEY, "b") == {"n": 2}
        assert store.settings(HASH, KEY) == {"target": 0.8, "dial": 0.25}
        assert store.count(HASH, KEY) == 2
        assert store.count(HASH, OTHER) == 1


def test_what_was_not_added_is_not_there(filled: Path):
    store = ItemStore(filled)
    assert not store.has(HASH, KEY, "c")
    assert not store.has(HASH, ("squad", "learnt", 0.7), "a")
    assert not store.has(HASH, ("race", "learnt", 0.8), "a")
    assert store.count("none", KEY) == 0
    assert store.settings(HASH, OTHER) is None
    for key, item in ((KEY, "c"), (("race", "learnt", 0.8), "a")):
        with pytest.raises(KeyError):
            store.get(HASH, key, item)


def test_other_hashes_are_others(filled: Path):
    store = ItemStore(filled)
    assert store.get("other", KEY, "a") == {"n": 4}
    assert store.settings("other", KEY) is None
    store.add("third", KEY, "a", {"n": 5})
    again = ItemStore(filled)
    assert [again.get(h, KEY, "a") for h in (HASH, "other", "third")] == [
        RECORD,
        {"n": 4},
        {"n": 5},
    ]


def test_a_record_is_what_a_later_run_would_read(tmp_path: Path):
    """JSON knows no tuples: a run that goes on must not differ from one that does not."""
    store, given = ItemStore(tmp_path), {"spans": ((0, 1, 2),)}
    store.add(HASH, KEY, "a", given)
    given["spans"] = ()
    assert store.get(HASH, KEY, "a") == {"spans": [[0, 1, 2]]}
    assert ItemStore(tmp_path).get(HASH, KEY, "a") == store.get(HASH, KEY, "a")


def test_later_lines_replace_earlier_ones(filled: Path):
    store = ItemStore(filled)
    store.add(HASH, KEY, "a", {"n": 9})
    store.add_settings(HASH, KEY, {"target": 0.7})
    for found in (store, ItemStore(filled)):
        assert found.get(HASH, KEY, "a") == {"n": 9}
        assert found.settings(HASH, KEY) == {"target": 0.7}
        assert found.count(HASH, KEY) == 2


def test_forget_drops_one_row(filled: Path):
    store = ItemStore(filled)
    store.forget(HASH, KEY)
    for found in (store, ItemStore(filled)):
        assert found.count(HASH, KEY) == 0
        assert found.settings(HASH, KEY) is None
        assert found.has(HASH, OTHER, "a")
        assert found.has("other", KEY, "a")
    store.add(HASH, KEY, "b", {"n": 6})
    assert ItemStore(filled).get(HASH, KEY, "b") == {"n": 6}
    assert ItemStore(filled).count(HASH, KEY) == 1


def test_forgetting_what_is_not_there(tmp_path: Path):
    ItemStore(tmp_path).forget(HASH, KEY)
    assert ItemStore(tmp_path).count(HASH, KEY) == 0


def test_restart_forgets_everything(filled: Path):
    ItemStore(filled).save_levels("x", np.ones((2, 3, 5)))
    store = ItemStore(filled, restart=True)
    for found in (store, ItemStore(filled)):
        assert found.count(HASH, KEY) == found.count("other", KEY) == 0
        assert found.settings(HASH, KEY) is None
        assert not found.has_levels("x")


def test_restart_of_nothing(tmp_path: Path):
    store = ItemStore(tmp_path / "deep" / "er", restart=True)
    store.add(HASH, KEY, "a", RECORD)
    assert ItemStore(tmp_path / "deep" / "er").has(HASH, KEY, "a")


def test_a_line_torn_anywhere_costs_its_item_alone(tmp_path: Path):
    store = ItemStore(tmp_path / "whole")
    store.add(HASH, KEY, "a", {"n": 1})
    before = (tmp_path / "whole" / ITEMS).read_bytes()
    store.add(HASH, KEY, "b", RECORD)
    after = (tmp_path / "whole" / ITEMS).read_bytes()
    for length in range(len(before), len(after) + 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / ITEMS).write_bytes(after[:length])
        store = ItemStore(folder)
        assert store.get(HASH, KEY, "a") == {"n": 1}
        # Nothing is missing from a line that lacks its end alone.
        assert store.has(HASH, KEY, "b") == (length >= len(after) - 1)
        store.add(HASH, KEY, "c", {"n": 3})
        again = ItemStore(folder)
        assert again.get(HASH, KEY, "c") == {"n": 3}
        assert again.has(HASH, KEY, "b") == store.has(HASH, KEY, "b")
        assert again.get(HASH, KEY, "a") == {"n": 1}


def test_two_items_after_a_torn_line(filled: Path):
    """The line end that closes the torn line is written once."""
    cut(filled, 5)
    store = ItemStore(filled)
    store.add(HASH, KEY, "c", {"n": 1})
    store.add(HASH, KEY, "d", {"n": 2})
    assert ItemStore(filled).count(HASH, KEY) == 4
    assert "\n\n" not in (filled / ITEMS).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "12",
        '"text"',
        "[1, 2]",
        "{}",
        '{"hash": "abc"}',
        '{"hash": "abc", "key": ["squad", "learnt"], "item": "a", "record": {}}',
        '{"hash": "abc", "key": ["squad", "learnt", "much"], "item": "a", "record": {}}',
        '{"hash": "abc", "key": ["squad", "learnt", 0.8], "item": "z"}',
        '{"hash": "abc", "key": ["squad", "learnt", 0.8], "item": ["z"], "record": {}}',
        '{"hash": ["abc"], "key": ["squad", "learnt", 0.8], "item": "z", "record": {}}',
    ],
)
def test_lines_that_are_none_of_ours(filled: Path, line: str):
    append(filled, line + "\n")
    store = ItemStore(filled)
    assert store.count(HASH, KEY) == 2
    assert store.get(HASH, KEY, "a") == RECORD


def test_bytes_that_are_no_text(filled: Path):
    with (filled / ITEMS).open("ab") as file:
        file.write(b"\x00\xff\xfe\x80\n")
    store = ItemStore(filled)
    assert store.count(HASH, KEY) == 2
    store.add(HASH, KEY, "c", {})
    assert ItemStore(filled).count(HASH, KEY) == 3


def test_each_line_is_one_json_object(filled: Path):
    lines = (filled / ITEMS).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["hash"] for line in lines] == [HASH, HASH, HASH, HASH, "other"]


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(VesicleError, match=f"^cannot use {folder}: ") as caught:
            ItemStore(folder)
        assert "\n" not in str(caught.value)


def test_items_that_cannot_be_read(tmp_path: Path):
    (tmp_path / ITEMS).mkdir()
    with pytest.raises(VesicleError, match=f"^cannot use {tmp_path}: Is a directory$"):
        ItemStore(tmp_path)


def test_items_that_can_no_longer_be_written(tmp_path: Path):
    store = ItemStore(tmp_path)
    (tmp_path / ITEMS).mkdir()
    with pytest.raises(VesicleError, match=rf"^cannot write {tmp_path / ITEMS}: Is a directory$"):
        store.add(HASH, KEY, "a", RECORD)
    # What is not on disk does not count as done.
    assert not store.has(HASH, KEY, "a")


def test_levels_come_back(tmp_path: Path):
    levels = np.random.default_rng(0).random((7, 3, 5)).round(6)
    store = ItemStore(tmp_path)
    assert not store.has_levels("x")
    store.save_levels("x", levels)
    for found in (store, ItemStore(tmp_path)):
        assert found.has_levels("x")
        assert not found.has_levels("y")
        back = found.levels("x")
        assert back.dtype == np.float64
        np.testing.assert_array_equal(back, levels)
    store.save_levels("x", 1 - levels)
    np.testing.assert_array_equal(store.levels("x"), (1 - levels).round(6))
    assert [p.name for p in (tmp_path / LEVELS).iterdir()] == ["x.safetensors"]


def test_levels_that_are_missing(tmp_path: Path):
    with pytest.raises(VesicleError, match=r"^cannot read .*x\.safetensors: .*; delete it and run"):
        ItemStore(tmp_path).levels("x")


@pytest.mark.parametrize(
    "content", [b"", b"no tensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "]
)
def test_levels_that_are_damaged(tmp_path: Path, content: bytes):
    store = ItemStore(tmp_path)
    (tmp_path / LEVELS).mkdir()
    (tmp_path / LEVELS / "x.safetensors").write_bytes(content)
    with pytest.raises(VesicleError, match=r"^cannot read .*x\.safetensors: .*; delete it and run"):
        store.levels("x")


def test_levels_that_cannot_be_written(tmp_path: Path):
    store = ItemStore(tmp_path)
    (tmp_path / LEVELS).write_text("", encoding="utf-8")
    with pytest.raises(VesicleError, match="cannot write"):
        store.save_levels("x", np.ones((2, 3, 5)))


def test_what_could_not_be_run_is_told_until_it_is(filled: Path):
    store = ItemStore(filled)
    store.add_missing(HASH, KEY, "c", "too short")
    store.add_missing(HASH, KEY, "c", "too short")
    for found in (store, ItemStore(filled)):
        assert found.missing(HASH, KEY) == {"c": "too short"}
        assert found.missing(HASH, OTHER) == {}
        assert not found.has(HASH, KEY, "c")
        assert found.count(HASH, KEY) == 2
    assert (filled / ITEMS).read_text(encoding="utf-8").count("too short") == 1
    store.add(HASH, KEY, "c", {"n": 5})
    for found in (store, ItemStore(filled)):
        assert found.missing(HASH, KEY) == {}
        assert found.get(HASH, KEY, "c") == {"n": 5}
    store.add_missing(HASH, KEY, "c", "no longer")
    store.forget(HASH, KEY)
    for found in (store, ItemStore(filled)):
        assert found.missing(HASH, KEY) == {}


def test_items_of_other_code_are_counted_once_and_not_used(tmp_path: Path):
    store = ItemStore(tmp_path)
    for hash_, item in (("x", "a"), ("x-1", "a"), ("x-1", "b"), ("x-2", "c"), ("y-1", "d")):
        store.add(hash_, KEY, item, {})
    store.add("x-1", OTHER, "e", {})
    again = ItemStore(tmp_path)
    assert again.count_by_other_code("x-3", KEY) == 3
    assert again.count_by_other_code("x-2", KEY) == 2
    assert again.count_by_other_code("x-1", KEY) == 1
    assert again.count_by_other_code("z-1", KEY) == 0
    assert again.count("x-3", KEY) == 0
