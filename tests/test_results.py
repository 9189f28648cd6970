"""Committed tables say what the JSON beside them says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_made_from_their_json():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "render_results.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_results_are_there():
    assert list((ROOT / "results").glob("*/result.json"))
