"""`vesicle kept`: tables, JSON, the page, and a line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.commands.conftest import WINDOW
from vesicle.cli import main
from vesicle.engine import Engine
from vesicle.namm import Namm, NammSettings

ROOT = Path(__file__).parents[2]
TEXT = "The cat sat on 31 mats, Ann saw it.</s>\n" * 8  # 320 tokens, one a byte
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vesicle(capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        status = main(["kept", *map(str, words), "--model", str(model)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def error_line(status: int, out: str, err: str) -> str:
    assert (status, out) == (2, ""), err
    assert err.startswith("vesicle: error: ")
    assert err.count("\n") == 1, err
    return err


def test_json_of_every_method(vesicle: Run, model: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    settings = NammSettings(network="linear")
    namm = Namm(
        settings=settings,
        parameters=rng.normal(size=settings.n_parameters).astype(np.float32),
        profile=np.array([[1, 0], [0, 2]], np.float32),
    )
    namm.save(tmp_path / "namm")
    (tmp_path / "text.txt").write_text(TEXT + "\n")
    kept = dict[str, list[float]]()
    for words in (("namm", "--namm", tmp_path / "namm"), ("recency",), ("heavy-hitters",)):
        given = ("--file", tmp_path / "text.txt", "--memory", 0.5, "--method", *words, "--json")
        status, out, err = vesicle(*given)
        assert (status, err) == (0, "")
        found = json.loads(out)
        name = words[0]
        assert found["method"] == (f"namm:{tmp_path / 'namm'}" if name == "namm" else name)
        assert found["sees"] == ("positions" if name == "recency" else "entries")
        assert (found["memory"], found["interval"], found["asked_last"]) == (0.5, 128, 256)
        assert "".join(token["text"] for token in found["tokens"]) == TEXT
        assert {row["length"] for row in found["over_time"]} == {128, 256}
        kept[name] = [token["share"] for token in found["tokens"]]
        assert all(kept[name][256:])
        held = sum(head["entries"] for layer in found["layers"] for head in layer["heads"])
        assert held == pytest.approx(4 * sum(kept[name]))
        assert found["share"] < 0.8
        assert not found["code"]
    assert len({tuple(shares) for shares in kept.values()}) == 3


def test_tables_and_a_page(vesicle: Run, tmp_path: Path):
    status, out, err = vesicle(TEXT)
    assert status == 0
    assert err.endswith(
        "no NAMM is shipped for this model: the first and the newest entries stay\n"
    )
    assert out.startswith("320 tokens; held: ")
    assert "nothing but where a token stands" in out
    for row in ("function word", "capitalised word", "number", "layer", "1  "):
        assert f"\n{row} " in out
    page = tmp_path / "new" / "kept.html"
    status, out, err = vesicle(TEXT, "--out", page)
    assert (status, out) == (0, "")
    assert err.endswith(f"wrote {page}\n")
    assert page.read_text(encoding="utf-8").count('title="token ') == 320
    status, out, _ = vesicle(TEXT, "--out", page, "--json")
    assert json.loads(out)["method"] == "recency"
    assert [path.name for path in page.parent.iterdir()] == ["kept.html"]


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [("a.py", [], True), ("a.txt", [], False), ("a.txt", ["--code"], True)],
)
def test_code_by_suffix_or_option(
    vesicle: Run, tmp_path: Path, name: str, words: list[str], code: bool
):
    (tmp_path / name).write_text(TEXT)
    given = ("--file", tmp_path / name, "--method", "recency", "--json", *words)
    found = json.loads(vesicle(*given)[1])
    assert found["code"] is code
    names = {row["name"] for row in found["classes"]}
    assert ("keyword or name" in names, "function word" in names) == (code, not code)


def test_texts_too_short_and_too_long(vesicle: Run, monkeypatch: pytest.MonkeyPatch):
    def loads(*arguments: object, **settings: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Engine, "from_pretrained", loads)
    words = ("--method", "recency")
    line = error_line(*vesicle("a" * 127, *words))
    assert "the text has 127 tokens, and the first are forgotten after 128" in line
    line = error_line(*vesicle("a" * (WINDOW + 1), *words))
    assert f"the text has {WINDOW + 1} tokens; the model's context window is {WINDOW}" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "no prompt"),
        (["hi", "--file", "x"], "both"),
        (["hi", "--memory", "0"], "--memory is 0; allowed: above 0 and below 1"),
        (["hi", "--memory", "1"], "--memory is 1; allowed: above 0 and below 1"),
        (["hi", "--memory", "nan"], "--memory is nan"),
        (["hi", "--namm", "missing"], "missing holds no namm.json"),
        (["hi", "--namm", "x", "--method", "recency"], "a NAMM is of --method namm"),
        (["hi", "--method", "h2o"], "--method"),
        (["hi", "--out", "."], "folder"),
        (["hi", "--out", "pyproject.toml/x"], "--out: cannot write"),
    ],
)
def test_mistakes_are_told_before_anything_is_looked_for(
    vesicle: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str
):
    def looks(*arguments: object, **settings: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vesicle.models.resolve_model", looks)
    assert part in error_line(*vesicle(*words))


def test_another_models_namm_is_one_line(vesicle: Run, tmp_path: Path):
    settings = NammSettings()
    other = np.zeros((7, 2), np.float32)
    parameters = np.zeros(settings.n_parameters, np.float32)
    Namm(settings=settings, parameters=parameters, profile=other).save(tmp_path)
    assert "7 layers" in error_line(*vesicle(TEXT, "--namm", tmp_path))
