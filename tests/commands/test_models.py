"""`vesicle models`: the list, its JSON, fetching and removing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from tests.models.tiny_gguf import write_gguf
from tests.models.tiny_wheels import tiny_entry
from vesicle.cli import main
from vesicle.files import scratch_folder
from vesicle.models.catalogue import CATALOGUE, Entry
from vesicle.models.fetch import gguf_of
from vesicle.models.resolve import resolve_model

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A model of the catalogue, in two wheels, with terms."""
    entry = tiny_entry(tmp_path, monkeypatch, n_parts=2, terms="Terms of the tiny model.")
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry


@pytest.fixture
def vesicle(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        status = main(list(words))
        return status, *capfd.readouterr()

    return call


def test_an_empty_cache(vesicle: Run, cache: Path):
    status, out, err = vesicle("models")
    assert (status, err) == (0, "")
    for entry in CATALOGUE.values():
        assert f"{entry.name}  " in out
        assert entry.what in out
        assert f"{entry.licence}; download" in out
    assert out.count("cached: nothing") == len(CATALOGUE)
    assert out.endswith(f"\nThe cache is {cache}\n")
    assert not cache.exists()


def test_fetch_list_remove(vesicle: Run, cache: Path, tmp_path: Path, tiny: Entry):
    status, out, err = vesicle("models", "--fetch", "tiny")
    assert (status, out) == (0, f"{cache / 'tiny'}\n")
    assert err.startswith("Terms of the tiny model.\n")
    assert vesicle("models", "--fetch", "tiny") == (0, out, "")
    own = resolve_model(write_gguf(tmp_path / "own.gguf"))
    (cache / ("gguf-" + 16 * "f")).mkdir()
    out = vesicle("models")[1]
    assert "none; download 0.1 MB; cached: 0.1 MB, GGUF 0.1 MB\n" in out
    assert f"{own.name}  converted from own.gguf\n" in out
    assert f"gguf-{16 * 'f'}  converted from an unknown file\n" in out
    with scratch_folder(cache, name="tiny"):
        status, out, err = vesicle("models", "--remove", "tiny")
        assert (status, out) == (2, "")
        assert err.startswith("vesicle: error: tiny is in use: another process")
    gguf_of(tiny).write_bytes(bytes(50_000))
    assert "; cached: 0.1 MB, GGUF 0.1 MB (to be fetched anew)\n" in vesicle("models")[1]
    status, out, err = vesicle("models", "--remove", "tiny")
    assert (status, err) == (0, "")
    assert out.startswith("removed tiny: 0.")
    assert vesicle("models", "--remove", "tiny") == (0, "nothing of tiny is cached\n", "")
    assert vesicle("models", "--remove", own.name)[0] == 0
    gone = f"nothing of {own.name} is cached\n"
    assert vesicle("models", "--remove", own.name) == (0, gone, "")
    assert [path.name for path in cache.iterdir()] == ["gguf-" + 16 * "f"]


def test_json(vesicle: Run, cache: Path, tmp_path: Path, tiny: Entry):
    vesicle("models", "--fetch", "tiny")
    own = resolve_model(write_gguf(tmp_path / "own.gguf"))
    status, out, err = vesicle("models", "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    told = json.loads(out)
    assert told["folder"] == str(cache)
    assert [model["name"] for model in told["catalogue"]] == list(CATALOGUE)
    default, gemma, found = told["catalogue"]
    assert (default["terms"], default["ready"], default["folder_bytes"]) == (None, False, 0)
    assert gemma["terms"] == CATALOGUE["gemma3-270m"].terms
    assert found == {
        "name": "tiny",
        "what": "a tiny model",
        "licence": "none",
        "terms": "Terms of the tiny model.",
        "download_bytes": tiny.download_bytes,
        "path": str(cache / "tiny"),
        "ready": True,
        "folder_bytes": sum(path.stat().st_size for path in (cache / "tiny").iterdir()),
        "gguf_bytes": tiny.gguf_bytes,
        "gguf_ready": True,
        "parts_bytes": 0,
    }
    (conversion,) = told["conversions"]
    assert conversion["name"] == own.name
    assert conversion["source"] == "own.gguf"
    assert conversion["ready"] is True
    document = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    keys = {*told, *found, *conversion}
    assert [key for key in sorted(keys) if f"`{key}`" not in document] == []


def test_packing(vesicle: Run, tmp_path: Path):
    own = str(write_gguf(tmp_path / "own.gguf", {"ffn_down": Kind.Q5_0}))
    status, out, err = vesicle("models", "--packing", own)
    assert (status, err) == (0, "")
    assert "model.layers.0.mlp.down_proj.weight     Q5_0            8  exact\n" in out
    assert "% of the largest\n" in out
    told = json.loads(vesicle("models", "--packing", own, "--json")[1])
    assert told["weights"] == "int8"
    down = next(m for m in told["matrices"] if "down" in m["name"])
    assert (down["kinds"], down["bits"], down["error"]) == (["Q5_0"], 8, 0)
    dense = str(write_gguf(tmp_path / "dense.gguf"))
    assert vesicle("models", "--packing", dense)[1] == "nothing is packed: weights are fp32\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--packing x --fetch x", "--fetch and --packing are given together; give one"),
        ("--packing none.gguf", "error: --packing none.gguf: no such file or folder"),
        ("--packing gemma3_270m", "error: --packing gemma3_270m: did you mean gemma3-270m? Acc"),
        ("--fetch x", "has no 'x'; allowed: smollm2-135m-instruct, gemma3-270m"),
        ("--fetch owner/name", "allowed: smollm2-135m-instruct, gemma3-270m"),
        ("--remove x", "'x' is not a model of the cache; allowed: smollm2-135m-instruct, gemma3"),
        ("--remove ../models", "allowed: smollm2-135m-instruct, gemma3-270m"),
        ("--remove tiny --json", "--remove and --json are given together; give one"),
        ("--fetch tiny --remove tiny", "--fetch and --remove are given together; give one"),
    ],
)
def test_mistakes_are_one_line(vesicle: Run, cache: Path, words: str, message: str):
    status, out, err = vesicle("models", *words.split())
    assert (status, out) == (2, "")
    assert err.startswith("vesicle: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not cache.exists()
