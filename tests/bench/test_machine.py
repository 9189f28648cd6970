"""Facts about the machine, and how busy it is."""

import time
from pathlib import Path

import pytest

from vesicle.bench import bandwidth, machine

LINUX = Path("/proc/stat").exists()


def test_hardware_and_versions():
    hardware = machine.hardware()
    assert hardware["cpu"]
    assert 1 <= hardware["usable_cores"] <= hardware["cores"]
    assert set(hardware["flags"]) <= set(machine.FLAGS)
    assert {"vesicle", "python", "torch"} <= set(machine.versions())


@pytest.mark.skipif(not LINUX, reason="counts from /proc/stat")
def test_work_is_seen():
    before, cpu = machine.busy_core_seconds(), time.process_time()
    while time.process_time() - cpu < 0.2:
        pass
    after = machine.busy_core_seconds()
    assert before is not None
    assert after is not None
    assert after - before > 0.1


def test_idle_share_is_a_share():
    idle = machine.idle_share(0.05)
    assert idle is None or 0 <= idle <= 1


@pytest.mark.parametrize("gone", ["/proc/stat", "/proc/self/status", "/proc/meminfo"])
def test_missing_counters_are_told(monkeypatch: pytest.MonkeyPatch, gone: str):
    class Nowhere:
        def __init__(self, *_: object) -> None:
            pass

        def read_text(self, **_: object) -> str:
            raise FileNotFoundError(gone)

    monkeypatch.setattr(machine, "Path", Nowhere)
    assert machine.busy_core_seconds() is None
    assert machine.idle_share(0.01) is None
    assert machine.resident_bytes() is None
    assert machine.memory_bytes("MemTotal") is None


def test_energy_of_all_packages(tmp_path: Path):
    def domain(folder: str, name: str, shown: int) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        for file, text in (("name", name), ("energy_uj", shown), ("max_energy_range_uj", 10**9)):
            (tmp_path / folder / file).write_text(f"{text}\n")

    assert machine.energy_j(tmp_path) is None
    domain("intel-rapl:0", "package-0", 5_000_000)
    domain("intel-rapl:1", "package-1", 999_000_000)
    domain("intel-rapl:0:0", "core", 1_000_000)  # part of its package
    before = machine.energy_j(tmp_path)
    assert before == {"intel-rapl:0": (5.0, 1000.0), "intel-rapl:1": (999.0, 1000.0)}
    domain("intel-rapl:0", "package-0", 8_000_000)
    domain("intel-rapl:1", "package-1", 2_000_000)  # the counter went round
    assert machine.energy_between(before, machine.energy_j(tmp_path)) == pytest.approx(6)
    assert machine.energy_between(None, before) is None
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # not to this user
    assert machine.energy_j(tmp_path) is None


def test_bandwidth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bandwidth, "buffer_bytes", lambda: 8 << 20)
    import torch

    threads = torch.get_num_threads()
    try:
        found = bandwidth.measure_bandwidth(1, 2)
    finally:
        torch.set_num_threads(threads)
    assert found["read_gb_per_s"] > 0.1
    assert found["small_read_gb_per_s"] > 0.1


def test_the_buffer_is_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bandwidth, "last_cache_bytes", lambda: 3 << 30)
    monkeypatch.setattr(bandwidth, "memory_bytes", lambda field: 100 << 30)
    assert bandwidth.buffer_bytes() == 6 << 30
    monkeypatch.setattr(bandwidth, "memory_bytes", lambda field: 4 << 30)
    assert bandwidth.buffer_bytes() == 1 << 30
