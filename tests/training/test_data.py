import gzip
import json
import subprocess
import sys

import pytest
import torch

from vesicle.errors import DataError
from vesicle.training.data import load_documents, token_windows


def rows(*texts, field="text"):
    return "".join(json.dumps({field: t}) + "\n" for t in texts)


def encode(text):
    return list(text.encode())


def test_each_kind_of_file_and_a_folder_of_them(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text(rows("three\u2028", "", "four"))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(rows("five"))
    (tmp_path / "notes.md").write_text("not data")
    assert load_documents(tmp_path / "a.txt") == ["one\ntwo"]
    assert load_documents(tmp_path / "b.jsonl") == ["three\u2028", "four"]
    assert load_documents(str(tmp_path)) == ["one\ntwo", "three\u2028", "four", "five"]
    assert load_documents(tmp_path, max_characters=8) == ["one\ntwo", "three\u2028"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Plain or packed, in lines or as it is."""
    for name, content in (("a.txt", "one"), ("a.jsonl", rows("one"))):
        marked = b"\xef\xbb\xbf" + content.encode()
        (tmp_path / name).write_bytes(marked)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(marked))
        assert load_documents(tmp_path / name) == ["one"]
        assert load_documents(tmp_path / f"{name}.gz") == ["one"]


def test_a_folder_with_splits_gives_the_wanted_one(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "test.txt").write_text("b")
    assert load_documents(tmp_path) == ["a"]
    assert load_documents(tmp_path, "test") == ["b"]


def test_rows_that_are_lines_are_one_document(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows("", " = Title = \n", "", " Text . \n"))
    assert load_documents(tmp_path / "a.jsonl") == [" = Title = \n Text . \n"]


def test_windows_are_in_order_and_do_not_overlap():
    windows = token_windows(["abc", "defg"], encode, 4)
    assert windows.dtype == torch.int64
    assert bytes(windows.flatten().tolist()) == b"abc\n\ndef"
    assert bytes(token_windows(["abc", "d"], encode, 2, "-").flatten().tolist()) == b"abc-"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "allowed files are .txt"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.txt", b"ok \xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "no field 'text'; its fields: body, id"),
        ("a.jsonl", b'{"text": 3}\n', "is not text but int"),
        ("a.jsonl", b"[1]\n", "not a JSON object"),
        ("a.jsonl", b"\xff\n", "not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud800b"}\n',
            r"line 2: .* holds \\ud800, half of a",
        ),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1 is not JSON: Exceeds"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: maximum recursion"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("a.txt", "a".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("a.txt.gz", b"not gzip", "is not a whole gzip file"),
        ("a.jsonl.gz", b"not gzip", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}', mtime=0), "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-6], "is not a whole gzip file"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_documents(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_missing_empty_and_too_short(tmp_path):
    with pytest.raises(DataError, match=r"no data at .*missing\.txt"):
        load_documents(tmp_path / "missing.txt")
    with pytest.raises(DataError, match=r"data/missing\.jsonl"):
        load_documents("data/missing.jsonl")
    with pytest.raises(DataError, match=r"holds no \.txt"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="has 2 tokens; one window needs 4"):
        token_windows(["ab"], encode, 4)
    with pytest.raises(ValueError, match="length is 1"):
        token_windows(["ab"], encode, 1)


def test_a_hub_that_cannot_be_reached_points_to_local_files(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(name, configuration, *, split, streaming):
        assert (name, configuration, split, streaming) == ("owner/name", "part", "test", True)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"from the hub: no route; a local \.txt") as raised:
        load_documents("owner/name:part", "test")
    assert "\n" not in str(raised.value)


def test_hub_rows_come_from_the_field(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: iter([{"body": "a"}, {"body": "b"}])
    )
    assert load_documents("owner/name", field="body") == ["a", "b"]
    with pytest.raises(DataError, match="row 1 has no field 'text'; its fields: body"):
        load_documents("owner/name")


def test_documents_are_read_without_torch():
    code = "import sys, vesicle.tasks.wikitext; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
