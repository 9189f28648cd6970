"""The C++ driver on the library as it was built: no PyTorch, and the compiler's own flags."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vesicle.engine import core

COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    pytest.mark.skipif(not core.available(), reason="the native core is not built here"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here"),
    pytest.mark.skipif(os.name != "posix", reason="the command line is a POSIX compiler's"),
]


def test_results_do_not_depend_on_the_batch(tmp_path: Path):
    library = core.load()
    assert library is not None
    driver = tmp_path / "driver"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        f"-I{Path(core.__file__).parent}",
        Path(__file__).with_name("driver.cpp"),
        library._name,
        f"-Wl,-rpath,{Path(library._name).parent}",
        "-o",
        driver,
    ]
    subprocess.run(command, check=True, timeout=120)
    run = subprocess.run([driver, "80"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout
