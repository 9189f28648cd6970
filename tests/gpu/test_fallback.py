"""Without Triton or a GPU the package imports, and its entry points say what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import SHAPE, tiny_model
from vesicle.cost import price, price_dense
from vesicle.errors import VesicleError
from vesicle.gpu import GpuEngine, bench

ROOT = Path(__file__).parents[2]


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(VesicleError, match=r"needs Triton.*pip install 'vesicle\[gpu\]'"):
        GpuEngine.from_model(tiny_model("llama"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", sys)  # anything that can be imported
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(VesicleError, match="needs an NVIDIA GPU and PyTorch sees none"):
        GpuEngine.from_model(tiny_model("llama"))
    with pytest.raises(VesicleError, match="device is 'cuda', but PyTorch sees no GPU"):
        GpuEngine.from_model(tiny_model("llama"), device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert bench.main([]) == 2
    assert capsys.readouterr().err == (
        "error: this benchmark needs an NVIDIA GPU, and PyTorch sees none\n"
    )


@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_uniform_plan_has_its_price(budget: float):
    plan = bench.uniform_plan(SHAPE, 20, budget)
    plan.check(SHAPE)
    share = price(plan, SHAPE).flops_total / price_dense(SHAPE, 20).flops_total
    assert budget - 0.04 < share <= budget
    with pytest.raises(VesicleError, match=r"budget is 0.01"):
        bench.uniform_plan(SHAPE, 20, 0.01)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_kernels_compile_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.gpu.compile_only"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
