"""`vesicle bench` from the outside: what it prints, writes and refuses."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.conftest import FakeWorker, Workshop
from vesicle.bench import process, schedule
from vesicle.bench.results import Report
from vesicle.cli import INTERRUPTED, main

QUICK = ("--quick", "--prompt", "16", "--new", "2", "--allow-busy", "--threads", "1")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch, workshop: Workshop):
    """Fake workers on an idle machine."""
    for name in ("PAUSE_S", "SAMPLE_S", "PATIENCE_S"):
        monkeypatch.setattr(schedule, name, 0.0)
    monkeypatch.setattr(schedule.machine, "idle_share", lambda sample_s: 1.0)
    monkeypatch.setattr(schedule.machine, "busy_core_seconds", lambda: 0.0)
    monkeypatch.setitem(schedule.run_bench.__kwdefaults__, "start", workshop.start)


def test_end_to_end_with_real_workers(
    bench_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = ["bench", *QUICK, "--model", str(bench_model), "--against", "hf", "--out", str(out)]
    assert main(words) == 0
    report = Report.load(out / "bench.json")
    assert report.names == ["rest", "hf"]
    assert report.missing == []
    assert report.finished
    assert report.bandwidth["begin"]["read_gb_per_s"] > 0.1
    assert report.contenders["hf"]["facts"]["dtype"] == "float32"
    for row in report.rows:
        assert row.decode_ms_per_step.median > 0
        assert row.peak_memory_bytes is None or row.peak_memory_bytes > 1_000_000
    assert str(bench_model.parent) not in (out / "bench.json").read_text().replace(
        report.command, ""
    )
    table = (out / "table.md").read_text()
    assert "| rest |" in table
    assert "| hf |" in table
    pytest.importorskip("matplotlib")
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "16 tokens x 1: speed" in capsys.readouterr().out


@pytest.mark.usefixtures("no_waiting")
def test_status_tells_whether_the_result_is_valid(
    bench_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    words = ["bench", "--model", str(bench_model), "--prompt", "16", "--new", "2", "--rounds", "1"]
    words += ["--json", str(tmp_path / "bench.json")]
    assert main(words) == 0
    assert Report.load(tmp_path / "bench.json").valid
    monkeypatch.setattr(schedule.machine, "idle_share", lambda sample_s: 0.2)
    assert main(words) == 1
    assert "NOT VALID" in capsys.readouterr().out
    assert main([*words, "--allow-busy"]) == 0
    assert not Report.load(tmp_path / "bench.json").valid


@pytest.mark.usefixtures("no_waiting")
def test_long_prompts_leave_room_for_new_tokens(
    bench_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "bench.json"
    words = ["bench", "--model", str(bench_model), "--rounds", "1", "--json", str(path)]
    assert main([*words, "--prompt", "128", "--new", "8"]) == 0
    assert Report.load(path).cells[0].prompt_tokens == 120
    assert "cut to 120" in capsys.readouterr().err


@pytest.mark.usefixtures("no_waiting")
def test_an_interrupted_run_shows_what_it_has(
    bench_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workshop: Workshop,
):
    def interrupt(worker: FakeWorker) -> None:
        # Warming up, one round, warming up again.
        worker.failures = [None, None, None, KeyboardInterrupt()]

    workshop.prepare = interrupt
    words = ["bench", "--model", str(bench_model), "--prompt", "16,24", "--new", "2"]
    assert main([*words, "--rounds", "1", "--out", str(tmp_path)]) == INTERRUPTED
    assert "16 tokens x 1: speed" in capsys.readouterr().out
    assert "the run was cut short" in (tmp_path / "table.md").read_text()
    assert not Report.load(tmp_path / "bench.json").finished


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "0"], "--prompt is '0'"),
        (["--prompt", "many"], "--prompt is 'many'"),
        (["--prompt", "4096"], "allowed: up to the model's context window of 128"),
        (["--batch", "1,-2"], "--batch is '1,-2'"),
        (["--budget", "1.5"], "--budget is 1.5"),
        (["--budget", "0.7"], "no modulator is shipped for this model"),
        (["--gaba", "half"], "--gaba is 'half'"),
        (["--against", "gpt"], "--against is 'gpt'"),
        (["--device", "cuda"], "--device is 'cuda'"),
        (["--limit", "0"], "limit_s is 0"),
        (["--text", "no/such/file"], "cannot read no/such/file"),
        (["--new", "128"], "leaves no room"),
    ],
)
def test_mistakes_are_told_in_one_line(
    bench_model: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(["bench", "--model", str(bench_model), "--prompt", "16", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vesicle: error: ")
    assert message in error


def test_help_has_examples(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--help"]) == 0
    assert "vesicle bench --quick" in capsys.readouterr().out


def test_the_parent_loads_no_torch():
    """It must not compete with those it measures."""
    code = (
        "import sys, vesicle.bench, vesicle.bench.display, vesicle.bench.table, vesicle.commands;"
        "import vesicle.bench.weights_file, vesicle.bench.prompts;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_workers_wait_without_working(bench_model: Path):
    from dataclasses import asdict

    from vesicle.bench.contenders import ENGINE, Contender

    contender = Contender(name="rest", runner=ENGINE, model=str(bench_model), threads=2)
    with process.Worker("rest", contender.environment()) as worker:
        worker.ask(do="load", contender=asdict(contender))
        worker.ask(do="measure", rows=[list(range(40))], prompt_tokens=32)
        times = Path(f"/proc/{worker._process.pid}/stat")
        if not times.exists():
            pytest.skip("reads /proc")
        before = _cpu_ticks(times)
        time.sleep(1.0)
        assert _cpu_ticks(times) - before <= 5  # of 100


def _cpu_ticks(path: Path) -> int:
    values = path.read_text().rpartition(")")[2].split()
    return int(values[11]) + int(values[12])


@pytest.mark.usefixtures("no_waiting")
def test_a_second_run_in_a_folder_keeps_the_first(
    bench_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["bench", "--model", str(bench_model), "--new", "2", "--rounds", "1", "--prompt"]
    assert main([*words, "16", "--out", str(tmp_path)]) == 0
    names = ("bench.json", "table.md")
    first = [(tmp_path / name).read_bytes() for name in names]
    assert main([*words, "24", "--out", str(tmp_path)]) == 0
    (kept,) = (tmp_path / "earlier").iterdir()
    assert [(kept / name).read_bytes() for name in names] == first
    assert Report.load(tmp_path / "bench.json").cells[0].prompt_tokens == 24
    assert f"the results of an earlier run are kept in {kept}" in capsys.readouterr().err
