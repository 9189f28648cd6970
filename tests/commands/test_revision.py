"""Every command with `--model` takes a `--revision`, and hands it to whoever finds the model."""

from pathlib import Path

import pytest

from tests.models.tiny_folder import write_folder
from vesicle.cli import main

COMMANDS = {
    "run": ["hi"],
    "eval": ["squad", "--method", "dense"],
    "train": ["--data", "text.txt"],
    "calibrate": ["--data", "text.txt"],
    "distil": ["--data", "text.txt"],
    "oracle": ["--data", "text.txt", "--small-ffns", "small"],
    "kept": ["hi"],
    "regret": [],
    "bench": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_revision_of_a_folder_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    out = [] if name == "run" else ["--out", str(tmp_path / "out")]
    words = [name, *COMMANDS[name], *out, "--model", str(tmp_path / "model"), "--revision", "v1"]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vesicle: error: ")
    assert error.endswith("revision 'v1' is given; a revision is of a hub id")
