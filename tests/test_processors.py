"""How many processors a process may use, by its affinity and its container's quota."""

from pathlib import Path

import pytest
import torch

from tests.models.tiny_folder import write_folder
from vesicle import processors
from vesicle.engine import Engine


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "self"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2), ("150000 100000\n", 1.5), ("max 100000\n", None), ("junk", None)],
)
def test_a_group_of_version_2(tmp_path: Path, text: str, expected: float | None):
    group(tmp_path / "cgroup" / "pod", {"cpu.max": text})
    assert processors.quota(tmp_path / "cgroup", own(tmp_path, "0::/pod\n")) == expected


def test_parents_limit_too(tmp_path: Path):
    root = tmp_path / "cgroup"
    group(root / "pod", {"cpu.max": "300000 100000"})
    group(root / "pod" / "box", {"cpu.max": "max 100000"})
    assert processors.quota(root, own(tmp_path, "0::/pod/box\n")) == 3
    group(root / "pod" / "box", {"cpu.max": "50000 100000"})
    assert processors.quota(root, own(tmp_path, "0::/pod/box\n")) == 0.5


def test_inside_a_container_the_root_is_its_own_group(tmp_path: Path):
    group(tmp_path / "cgroup", {"cpu.max": "100000 100000"})
    assert processors.quota(tmp_path / "cgroup", own(tmp_path, "0::/elsewhere/box\n")) == 1


@pytest.mark.parametrize(("spent", "expected"), [("400000", 4), ("-1", None)])
def test_a_group_of_version_1(tmp_path: Path, spent: str, expected: float | None):
    files = {"cpu.cfs_quota_us": spent, "cpu.cfs_period_us": "100000"}
    group(tmp_path / "cgroup" / "cpu,cpuacct" / "box", files)
    listed = own(tmp_path, "5:memory:/box\n4:cpuacct,cpu:/box\n")
    assert processors.quota(tmp_path / "cgroup", listed) == expected


def test_a_path_from_outside_is_nobodys(tmp_path: Path):
    group(tmp_path / "cgroup" / "b", {"cpu.max": "100000 100000"})
    assert processors.quota(tmp_path / "cgroup", own(tmp_path, "0::/../b\n")) is None


def test_without_a_list_the_root_counts(tmp_path: Path):
    group(tmp_path, {"cpu.max": "100000 100000"})
    assert processors.quota(tmp_path, tmp_path / "missing") == 1


def test_nothing_known(tmp_path: Path):
    assert processors.quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 8), (2.0, 2), (1.5, 1), (0.2, 1), (64.0, 8)]
)
def test_usable(monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int):
    monkeypatch.setattr(processors, "allowed", lambda: list(range(8)))
    monkeypatch.setattr(processors, "quota", lambda: limit)
    assert processors.usable() == expected


def test_an_engine_keeps_to_it_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, before = write_folder(tmp_path / "model"), torch.get_num_threads()
    monkeypatch.setattr(processors, "usable", lambda: 3)
    try:
        monkeypatch.setenv(processors.THREADS, "8")
        torch.set_num_threads(8)
        Engine.from_pretrained(folder)
        assert torch.get_num_threads() == 8
        monkeypatch.delenv(processors.THREADS)
        Engine.from_pretrained(folder, threads=5)
        assert torch.get_num_threads() == 5
        Engine.from_pretrained(folder)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        Engine.from_pretrained(folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
