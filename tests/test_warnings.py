"""Warnings fail a test where our own code raises them, and are listed where a library does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = """
import warnings

def warn(kind, text="something", level=1):
    warnings.warn(text, kind, stacklevel=level + 1)
"""
OURS = """
import library
import warnings

def warn(kind):
    warnings.warn("something", kind)

def call(kind, text="something"):
    library.warn(kind, text, level=2)
"""
CALLS = {
    # Raised by ours, in the package or in its tests.
    "ours.warn(UserWarning)": False,
    "ours.warn(RuntimeWarning)": False,
    "ours.warn(ResourceWarning)": False,
    "warnings.warn('something')": False,
    "warnings.warn('something', RuntimeWarning)": False,
    "warnings.warn('something', pytest.PytestWarning)": False,
    # Raised by a library.
    "library.warn(UserWarning, level=0)": True,
    "library.warn(RuntimeWarning, level=0)": True,
    "library.warn(ResourceWarning, level=0)": True,
    "library.warn(DeprecationWarning, level=0)": True,
    # By a library in the name of whoever calls it: that call is a fault of ours ...
    "ours.call(RuntimeWarning)": False,
    "library.warn(UserWarning)": False,
    # ... unless all it says is that it will change.
    "ours.call(DeprecationWarning)": True,
    "ours.call(PendingDeprecationWarning)": True,
    "ours.call(FutureWarning)": True,
    "ours.call(UserWarning, '`old` is deprecated and')": True,
    "ours.call(UserWarning, 'Old\\nnames will be removed in 6.0')": True,
    "library.warn(FutureWarning)": True,
    "library.warn(pytest.PytestDeprecationWarning)": True,
}
"""A line of a test, and whether the test passes."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest prints about one test for each call, under this project's settings."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (folder / "library.py").write_text(LIBRARY)
    (folder / "vesicle").mkdir()
    (folder / "vesicle" / "__init__.py").touch()
    (folder / "vesicle" / "ours.py").write_text(OURS)
    (folder / "tests" / "deeper").mkdir(parents=True)
    body = "import warnings\nimport pytest\nimport library\nfrom vesicle import ours\n"
    for number, call in enumerate(CALLS):
        body += f"def test_{number}():\n    {call}\n"
    (folder / "tests" / "deeper" / "test_calls.py").write_text(body)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-rA", "-p", "no:cacheprovider"],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("call", CALLS)
def test_who_raises_it_decides(report: str, call: str):
    name = f"tests/deeper/test_calls.py::test_{list(CALLS).index(call)}"
    lines = report.splitlines()
    outcomes = [line.split()[0] for line in lines if line.split()[1:2] == [name]]
    assert outcomes == ["PASSED" if CALLS[call] else "FAILED"]


def test_what_passes_is_listed(report: str):
    summary = report[report.index("warnings summary") :].partition("short test summary")[0]
    listed = [n for n in range(len(CALLS)) if f"test_calls.py::test_{n}\n" in summary]
    assert listed == [n for n, passes in enumerate(CALLS.values()) if passes]
