"""Scripts in `benchmarks` that take a text: a mistake is one line and status 2."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.models.test_text import byte_level, save

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(
    params=["slack", "tiles", "reading", "lengths", "mixed_ffns", "reevaluate", "drawing"]
)
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One of them as a module."""
    name = request.param
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--model": "gemma3_270m"}, "did you mean gemma3-270m?"),
        ({"--model": "./none"}, "--model ./none: no such file or folder"),
        ({"--text": "none.jsonl"}, "no data at none.jsonl"),
        ({"--out": "."}, "cannot write .: it is a folder"),
    ],
)
def test_mistakes_are_one_line(
    script: ModuleType,
    given: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model = save(tmp_path, byte_level())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vesicle.resolve_model", lambda spec: resolved(spec, model))
    words = {"--model": "tiny", "--text": "text.txt", "--out": "found.json"} | given
    if script.__name__ in ("mixed_ffns", "reevaluate"):
        words["--small-ffns"] = "small"
    assert script.main([word for pair in words.items() for word in pair]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"{script.__name__}: error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def resolved(spec: str, model: Path) -> Path:
    """The model's text side stands for the model."""
    from vesicle.models import resolve_model

    return model if spec == "tiny" else resolve_model(spec)
