"""Candidates on a Ray cluster: dealt out, and judged as in one process."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evolution.test_evolve import CONFIG, lines, questions, start
from vesicle.engine import Engine
from vesicle.errors import CacheFullError, ModelError, VesicleError
from vesicle.evolution import evolve
from vesicle.evolution.cluster import on_cluster


class Ray:
    """As much of Ray as is used, in this process; `lost` is what its workers raise."""

    def __init__(self, cpus: float = 3, lost: Exception | None = None) -> None:
        self.cpus, self.lost, self.killed, self.started = cpus, lost, 0, 0

        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                super().__init__(str(cause))
                self.cause = cause

        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def is_initialized(self) -> bool:
        return True

    def available_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, **resources: float) -> Any:
        assert resources == {"num_cpus": 1}

        def actor(kind: type) -> Any:
            def begin(*args: Any) -> Any:
                self.started += 1
                worker = kind(*args)

                class Handle:
                    def __getattr__(_, name: str) -> Any:
                        return SimpleNamespace(remote=partial(getattr(worker, name)))

                return Handle()

            return SimpleNamespace(remote=begin)

        return actor

    def get(self, found: list[Any]) -> list[Any]:
        if self.lost is not None:
            raise self.lost
        return found

    def kill(self, worker: Any) -> None:
        self.killed += 1


@pytest.fixture
def folder(llama: Any, tmp_path: Path) -> Path:
    llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(folder: Path, out: Path, begin: str, *, cluster: bool, find: Any = None) -> Any:
    engine = Engine.from_pretrained(folder)
    config = replace(CONFIG, begin=begin, evolves="profile" if begin == "ablation" else "both")
    read = on_cluster(find or partial(Path, folder)) if cluster else None
    return evolve(engine, start(engine), questions(5), questions(2, 9), config, out, read=read)


@pytest.mark.parametrize("begin", ["as-is", "ablation"])
def test_dealt_out_as_in_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
):
    ray = Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    here = run(folder, tmp_path / "here", begin, cluster=False)
    there = run(folder, tmp_path / "there", begin, cluster=True)
    assert lines(tmp_path / "here") == lines(tmp_path / "there")
    assert here.namm.digest() == there.namm.digest()
    assert ray.started == ray.killed == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CacheFullError("too little memory"), "too little memory"),
        (ZeroDivisionError("by zero"), "a Ray worker failed: by zero"),
        (None, r"a Ray worker was lost \(node died\); the same command goes on"),
    ],
)
def test_a_worker_that_fails_is_told_in_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    message: str,
):
    ray = Ray()
    kinds = ray.exceptions
    ray.lost = kinds.RayError("node died") if error is None else kinds.RayTaskError(error)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    with pytest.raises(VesicleError, match=message):
        run(folder, tmp_path / "out", "as-is", cluster=True)
    assert ray.killed == ray.started == 3


def test_gone_on_with_on_a_cluster(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", Ray())  # type: ignore[arg-type]
    whole = run(folder, tmp_path / "whole", "as-is", cluster=False)
    run(folder, tmp_path / "part", "as-is", cluster=False)
    path = tmp_path / "part" / "generations.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    part = run(folder, tmp_path / "part", "as-is", cluster=True)
    assert lines(tmp_path / "part") == lines(tmp_path / "whole")
    assert part.namm.digest() == whole.namm.digest()


def test_without_cpus(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", Ray(cpus=0))  # type: ignore[arg-type]
    monkeypatch.setattr("vesicle.evolution.cluster._PATIENCE_S", 0.0)
    with pytest.raises(VesicleError, match="no free CPU"):
        run(folder, tmp_path / "out", "as-is", cluster=True)


def test_without_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VesicleError, match=r"pip install 'vesicle\[ray\]'"):
        run(folder, tmp_path / "out", "as-is", cluster=True)


def no_model() -> Path:
    raise ModelError("no model of that name")


@pytest.mark.ray
def test_on_ray_itself(folder: Path, tmp_path: Path):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(ModelError, match="no model of that name"):
            run(folder, tmp_path / "none", "as-is", cluster=True, find=no_model)
        there = run(folder, tmp_path / "there", "as-is", cluster=True)
        here = run(folder, tmp_path / "here", "as-is", cluster=False)
        assert lines(tmp_path / "here") == lines(tmp_path / "there")
        assert here.namm.digest() == there.namm.digest()
    finally:
        ray.shutdown()
