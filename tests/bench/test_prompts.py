"""The text read: long enough, different in every row, the same for everyone."""

from pathlib import Path

import pytest

from vesicle.bench.prompts import TEXT, Stream, read_stream
from vesicle.errors import DataError
from vesicle.models import Text


@pytest.fixture(scope="module")
def text(bench_model: Path) -> Text:
    return Text.from_folder(bench_model)


def test_stream_is_long_enough_for_every_row(text: Text):
    stream = read_stream(text, None, longest=9000, rows=20)
    rows = stream.rows(0, 20, 9000)
    assert [len(row) for row in rows] == [9000] * 20
    assert len({tuple(row[:16]) for row in rows}) == 20  # no shared beginning to reuse


def test_stream_is_the_same_every_time(text: Text):
    assert read_stream(text, None, 5000, 3) == read_stream(text, None, 5000, 3)


def test_repeats_put_sentences_in_another_order(text: Text):
    once = len(text.encode(TEXT))
    ids = read_stream(text, None, 3 * once, 1).ids
    assert ids[:200] != ids[once : once + 200]


def test_text_from_a_file(text: Text, tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("One sentence. And another one.")
    stream = read_stream(text, path, 400, 2)
    assert stream.description == "own.txt"
    assert text.decode(list(stream.ids[:30])) == "One sentence. And another one."
    assert len(stream.rows(1, 1, 400)[0]) == 400


def test_empty_text_is_refused(text: Text, tmp_path: Path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(DataError, match="has no text"):
        read_stream(text, path, 10, 1)


def test_rows_of_later_rounds_differ():
    stream = Stream(ids=tuple(range(2000)), description="", sha256="")
    assert stream.rows(0, 1, 50) != stream.rows(1, 1, 50)
    assert stream.rows(0, 2, 50)[1] == stream.rows(1, 1, 50)[0]
