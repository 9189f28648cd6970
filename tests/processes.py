"""Command lines in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from vesicle.engine import core

SOURCE = Path(__file__).parents[1] / "src"


def environment() -> dict[str, str]:
    """The sources of this checkout, with the native libraries of the package under test."""
    libraries = Path(core.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(SOURCE), "VESICLE_LIBRARIES": str(libraries)}


def shell(words: list[object], redirection: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run `vesicle` under a redirection of `sh`, with nothing on standard input."""
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "vesicle"]
    return subprocess.run(
        [*command, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        check=False,
    )
