"""The exponential that softmax and SiLU rest on, compiled with the flags of an installation."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
UNSAFE = ("-ffast-math", "-Ofast", "-funsafe-math", "-ffinite-math", "-fassociative-math")
PROGRAM = """
#include <cmath>
#include <cstdio>
#include "exponential.h"
int main() {
  float x[2048], y[2048];
  double worst = 0;
  for (int start = 0; start < 1000; ++start) {
    for (int i = 0; i < 2048; ++i) x[i] = -87.0f + 175.0f * (start * 2048 + i) / 2048000.0f;
    for (int i = 0; i < 2048; ++i) y[i] = vesicle::exponential(x[i]);
    for (int i = 0; i < 2048; ++i)
      worst = std::fmax(worst, std::fabs(y[i] / std::exp((double)x[i]) - 1));
  }
  x[0] = NAN, x[1] = -NAN, x[2] = INFINITY, x[3] = -INFINITY, x[4] = 0;
  for (int i = 0; i < 5; ++i) y[i] = vesicle::exponential(x[i]);
  std::printf("%g %g %g %g %g %g", worst, y[0], y[1], y[2], y[3], y[4]);
}
"""


def flags() -> list[str]:
    """What setup.py gives the compiler: the lists that it puts into FLAGS."""
    found: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="FLAGS")], value=value):
                found += ast.literal_eval(value)
            case ast.AugAssign(target=ast.Name(id="FLAGS"), value=value):
                found += ast.literal_eval(value)
    assert "-O3" in found
    return found


def test_no_flag_lets_nan_vanish():
    assert not [flag for flag in flags() if flag.startswith(UNSAFE)]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.skipif(os.name != "posix", reason="the command line is a POSIX compiler's")
def test_it_is_exact_and_hands_nan_on(tmp_path: Path):
    source, program = tmp_path / "test.cpp", tmp_path / "test"
    source.write_text(PROGRAM)
    core = ROOT / "src" / "vesicle" / "engine" / "core"
    command = [COMPILER, *flags(), f"-I{core}", source, "-o", program]
    subprocess.run(command, check=True, timeout=120)
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=True)
    worst, nan, minus_nan, most, least, one = map(float, run.stdout.split())
    assert worst < 2e-7
    assert nan != nan
    assert minus_nan != minus_nan
    assert most > 1e38
    assert 0 < least < 1e-37
    assert one == 1
