import errno
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vesicle import files
from vesicle.errors import BudgetError, DataError, ModelError, VesicleError

Writer = Callable[[Path], AbstractContextManager[Path]]


def write_then_fail(writing: AbstractContextManager[Path], error: BaseException) -> None:
    with writing as part:
        (part / "x" if part.is_dir() else part).write_bytes(bytes(2_000_000))
        raise error


def test_errors_are_one_line_and_told_apart():
    assert str(ModelError("first\n   second")) == "first second"
    assert issubclass(BudgetError, ValueError)
    assert issubclass(DataError, VesicleError)


def test_atomic_path_replaces_only_at_the_end(tmp_path: Path):
    target = tmp_path / "new" / "result.txt"
    with files.atomic_path(target) as part:
        part.write_text("first")
        assert part.parent == target.parent
        assert part.suffix == ".txt"
        assert not target.exists()
    assert target.read_text() == "first"
    with files.atomic_path(target) as part:
        part.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert os.listdir(target.parent) == ["result.txt"]


def test_a_file_can_be_read_by_whom_others_can(tmp_path: Path):
    """Some libraries open what they write for its owner alone."""
    usual, target = tmp_path / "usual", tmp_path / "target"
    usual.touch()
    with files.atomic_path(target) as part:
        part.touch(mode=0o600)
    assert target.stat().st_mode == usual.stat().st_mode


def test_atomic_folder_replaces_whole(tmp_path: Path):
    target = tmp_path / "model"
    for name in ("old", "new"):
        with files.atomic_folder(target) as part:
            (part / name).write_text(name)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("writer", [files.atomic_path, files.atomic_folder, files.scratch_folder])
def test_failure_leaves_nothing(tmp_path: Path, writer: Writer, failure: type[BaseException]):
    with pytest.raises(failure):
        write_then_fail(writer(tmp_path / "sub" / "target"), failure())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "sub" / "target").is_file()


@pytest.mark.parametrize("writer", [files.atomic_path, files.atomic_folder])
def test_full_disk_is_one_clear_line(tmp_path: Path, writer: Writer):
    errors = (
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("os: No space left on device"),
    )
    for error in errors:
        with pytest.raises(VesicleError, match=r"no space left in .* needs 2 MB or more"):
            write_then_fail(writer(tmp_path / "target"), error)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_told_before_writing(tmp_path: Path):
    with pytest.raises(VesicleError, match=r"needs 1000000000000 MB"):
        with files.atomic_folder(tmp_path / "target", needs_bytes=10**18):
            pytest.fail("the body ran")
    assert os.listdir(tmp_path) == []


def test_scratch_folder_is_always_deleted(tmp_path: Path):
    with files.scratch_folder(tmp_path / "cache") as work:
        (work / "x").write_text("x")
        assert files.folder_bytes(work) == 1
    assert os.listdir(tmp_path / "cache") == []


def test_a_folder_that_vanishes_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As those of pip do, whose size is looked at while it works."""
    (tmp_path / "gone").mkdir()
    (tmp_path / "x").write_text("x")
    scandir = os.scandir

    def vanishing(path: str | os.PathLike[str]) -> object:
        if Path(path).name == "gone":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert files.folder_bytes(tmp_path) == 1
    assert files.folder_bytes(tmp_path / "x") == 1
    assert files.folder_bytes(tmp_path / "none") == 0


def test_remove_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    (folder / "sub").mkdir(parents=True)
    file.write_text("x")
    link.symlink_to(folder, target_is_directory=True)
    files.remove_whole(link)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    files.remove_whole(file)
    files.remove_whole(tmp_path / "none")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
        files.remove_whole(folder)
    assert not folder.exists()
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    folder.mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(VesicleError, match=r"cannot remove .*folder: Permission denied"):
        files.remove_whole(folder)
    assert folder.is_dir()


def test_left_overs_of_killed_processes_are_removed(tmp_path: Path):
    old, young = (tmp_path / f".vesicle-tmp-{age}-model" for age in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    with files.atomic_folder(tmp_path / "model"):
        pass
    assert sorted(os.listdir(tmp_path)) == [young.name, "model"]


WRITER = """
import sys, time
from vesicle import files
with files.{writer}(sys.argv[1]) as part:
    (part / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(target: Path, writer: str) -> subprocess.Popen[str]:
    """A process that is in the middle of writing."""
    code = WRITER.format(writer=writer)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("writer", ["atomic_folder", "scratch_folder"])
def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path, writer: str):
    """And what a living one is writing stays, whatever its name."""
    shared = tmp_path / "models"
    target = shared / "model" if writer == "atomic_folder" else shared
    killed, living = start_writer(target, writer), start_writer(target, writer)
    try:
        assert len(os.listdir(shared)) == 2
        killed.kill()
        killed.communicate()
        files.remove_leftovers(shared)
        (left,) = shared.iterdir()
        assert (left / "half").read_text() == "half"
        with files.atomic_folder(shared / "another"):
            pass
        assert left.is_dir()
    finally:
        living.kill()
        living.communicate()
    with files.atomic_folder(shared / "another"):
        pass
    assert os.listdir(shared) == ["another"]
    files.remove_leftovers(tmp_path / "none")


def test_a_leftover_is_never_taken_from_who_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between making a folder and locking it, another process may remove it: one more is made."""
    lock, left = files._lock, [2]

    def removed_before(folder: Path) -> int | None:
        if left[0]:
            left[0] -= 1
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(files, "_lock", removed_before)
    with files.atomic_folder(tmp_path / "model") as part:
        assert part.is_dir()
    assert left == [0]
    assert os.listdir(tmp_path) == ["model"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_lock", lambda folder: None)
    (tmp_path / ".vesicle-tmp-locked-1-model").mkdir()
    for _ in range(2):
        with files.atomic_folder(tmp_path / "model") as part:
            (part / "x").write_text("x")
    assert sorted(os.listdir(tmp_path)) == [".vesicle-tmp-locked-1-model", "model"]


def test_wrong_kinds_of_target(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VesicleError, match="it is a folder"), files.atomic_path(tmp_path):
        pass
    with pytest.raises(VesicleError, match="it is a file"), files.atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(VesicleError, match="cannot write"):
        files.write_json(tmp_path / "file" / "below.json", 1)
    with files.atomic_path(os.devnull) as part:
        assert part == Path(os.devnull)
    assert Path(os.devnull).is_char_device()


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with files.atomic_path(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("folder", [False, True])
def test_a_target_is_tried_and_nothing_stays(tmp_path: Path, folder: bool):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    files.check_target(tmp_path / ("folder" if folder else "file"), folder=folder)
    files.check_target(tmp_path / "new" / "deep" / "target", folder=folder)
    for bad, why in {
        "file" if folder else "folder": "is needed",
        "file/x": "Not a directory",
        "file/x/y": "Not a directory",
        "x" * 300: "File name too long",
        "/proc/x": "cannot write",
    }.items():
        with pytest.raises(VesicleError, match=f"cannot write .*{why}|{why}"):
            files.check_target(tmp_path / bad, folder=folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_a_device_is_written_to_and_its_errors_are_told():
    files.check_target("/dev/full")
    with (
        pytest.raises(VesicleError, match="cannot write /dev/full: No space left"),
        files.atomic_path("/dev/full") as part,
    ):
        part.write_text("x")


def test_a_part_of_a_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.read_some(tmp_path / "x", 2) == b"ab"
    assert files.read_some(tmp_path / "x", -1) == b"abc"
    assert files.read_some("/dev/zero", 5) == bytes(5)


def test_errors_of_the_body_pass_through(tmp_path: Path):
    with pytest.raises(FileNotFoundError), files.atomic_path(tmp_path / "x"):
        (tmp_path / "other").read_text()


def test_json_round_trip(tmp_path: Path):
    value = {"text": "naïve 🙂 \udc80", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "x.json", value)
    assert "🙂" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "x.json") == value


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "x.json"
    files.write_json(path, 1)
    with pytest.raises(VesicleError, match="NaN or infinity"):
        files.write_json(path, {"loss": math.nan})
    assert json.loads(path.read_text()) == 1


def test_json_that_is_none(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(DataError, match=r"x.json is not valid JSON: .* line 2 column 7"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="deep"):
        files.read_json(tmp_path / "deep.json")


def test_text(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert files.read_text(path) == "naïve\r\n"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"byte 0xff at offset 3"):
        files.read_text(path)
    with pytest.raises(DataError, match="No such file"):
        files.read_text(tmp_path / "none")
    with pytest.raises(DataError, match="directory"):
        files.read_text(tmp_path)


def test_json_lines_are_named_and_kept_whole(tmp_path: Path):
    content = '{"a": "b\u2028c\x85d"}\r\n \r\n[3]\n'.encode()
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(content))
        assert list(files.read_json_lines(path)) == [
            (f"{path} line 1", {"a": "b\u2028c\x85d"}),
            (f"{path} line 3", [3]),
        ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    assert len(list(files.read_json_lines(str(tmp_path / "a.jsonl")))) == 2


def test_json_lines_that_cannot_be_read(tmp_path: Path):
    whole = gzip.compress(b"[1]\n[2]\n")
    for name, content, message in (
        ("a.jsonl", b"[1]\n\n{oops", "a.jsonl line 3 is not JSON: Expecting property name"),
        ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("a.jsonl", b"\xff", "not UTF-8 text: byte 0xff at offset 0"),
        ("a.jsonl.gz", gzip.compress(b"[1]\n{oops"), "a.jsonl.gz line 2 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b"\xff"), "not UTF-8 text: byte 0xff at offset 0"),
        ("a.jsonl.gz", b"[1]\n", "is not a whole gzip file: Not a gzipped file"),
        ("a.jsonl.gz", whole[:-6], "is not a whole gzip file: Compressed file ended"),
        ("a.jsonl.gz", whole[:10] + b"\xff" + whole[11:], "is not a whole gzip file: Error -3"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as raised:
            list(files.read_json_lines(tmp_path / name))
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    for name in ("none.jsonl", "none.jsonl.gz"):
        with pytest.raises(DataError, match=rf"cannot read .*{name}: No such file"):
            list(files.read_json_lines(tmp_path / name))


@pytest.mark.parametrize("packed", [False, True])
def test_one_reader_for_plain_and_packed_files(tmp_path: Path, packed: bool):
    """The same text, mark or not, and the same complaints, whatever the name ends in."""
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    bom = b"\xef\xbb\xbf"
    lines, text, value = (tmp_path / f"a.{kind}{end}" for kind in ("jsonl", "txt", "json"))
    # Two marked files that were joined leave a mark inside.
    lines.write_bytes(pack(bom + b'{"a": 1}\n' + bom + b'{"a": 2}\r\n\xef\xbb\xbf\n'))
    assert [row for _, row in files.read_json_lines(lines)] == [{"a": 1}, {"a": 2}]
    text.write_bytes(pack(bom + "naïve\r\n".encode()))
    assert files.read_text(text) == "naïve\r\n"
    value.write_bytes(pack(bom + b"[1]"))
    assert files.read_json(value) == [1]
    for encoding in ("utf-16", "utf-32"):
        for path in (lines, text, value):
            path.write_bytes(pack('{"a": 1}\n'.encode(encoding)))
        for read in (files.read_text, files.read_json, lambda p: list(files.read_json_lines(p))):
            with pytest.raises(DataError, match=f"it is {encoding.upper()}; save it as UTF-8"):
                read(lines)


BAD_LINES = {
    "no JSON": (b"{oops", "is not JSON: Expecting property name"),
    "no UTF-8": (b'"a\xff"', "is not UTF-8 text: byte 0xff at offset 2 (invalid start byte)"),
    "a surrogate in bytes": (b'"\xed\xa0\x80"', "is not UTF-8 text"),
    "too deep": (b"[" * 200_000, "is not JSON: maximum recursion depth"),
    "too long a number": (b"1" * 5000, "is not JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_does_not_hide_the_others(name: str):
    bad, fault = BAD_LINES[name]
    found = list(files.try_json_lines([b"[1]\n", bad + b"\n", b"\n", b"[2]\n"]))
    assert [found[0], found[2]] == [(1, [1], ""), (4, [2], "")]
    assert found[1][:2] == (2, None)
    assert found[1][2].startswith(fault)
    with pytest.raises(DataError, match=r"^a\.jsonl line 2 is not"):
        list(files.decode_json_lines([b"[1]\n", bad], "a.jsonl"))


def test_json_with_too_long_a_number(tmp_path: Path):
    (tmp_path / "x.json").write_text("1" * 5000)
    with pytest.raises(DataError, match=r"x\.json is not usable JSON: Exceeds the limit"):
        files.read_json(tmp_path / "x.json")


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / "own"
    monkeypatch.setenv("VESICLE_CACHE", "")
    assert files.cache_root() == tmp_path / "xdg" / "vesicle"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.cache_root() == tmp_path / ".cache" / "vesicle"
