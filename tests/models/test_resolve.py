import json
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from tests.models.tiny_folder import SHARDS, write_folder
from tests.models.tiny_gguf import write_gguf
from vesicle.errors import ModelError
from vesicle.models import gguf, resolve
from vesicle.models.resolve import resolve_model
from vesicle.models.safetensors_header import read_safetensors_header
from vesicle.models.text import Text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a tiny model."""
    return write_folder(tmp_path / "model")


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_folder(folder, sharded=True)


def test_folders(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve_model(str(folder)) == folder
    shard(folder)
    assert resolve_model(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == folder


@pytest.mark.parametrize("spec", [None, "smollm2-135m-instruct"])
def test_the_default(spec: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resolve, "ensure_default_model", lambda progress: tmp_path)
    assert resolve_model(spec) == tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "it has no config.json$"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", "{}", "names no model_type"),
        ("model.safetensors", None, "no model.safetensors and no model.safetensors.index.json"),
        ("model.safetensors", "", r"\(0 bytes\) is not a safetensors file"),
        ("model.safetensors", "version https://git-lfs", "git lfs pull"),
    ],
)
def test_broken_folders(folder: Path, name: str, content: str | None, message: str):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


@pytest.mark.parametrize("kept", [4, 20, 90, -1])
def test_truncated_weights(folder: Path, kept: int):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    size = len(whole[:kept])
    with pytest.raises(ModelError, match=rf"model.safetensors.* {size:,} bytes|\({size:,} bytes\)"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b'{"a": {}}', b"\xff\xff"],
)
def test_damaged_headers(tmp_path: Path, header: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match="header is damaged"):
        read_safetensors_header(path)


def test_trailing_bytes(folder: Path):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="is damaged: it has"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "../a.safetensors"}}, "not a file name"),
        ({"weight_map": {"a": "c.safetensors"}}, "lacks 'c.safetensors', weight file 1 of 1"),
        (
            {"weight_map": {"z": SHARDS[0]}},
            "lacks the tensor 'z'",
        ),
    ],
)
def test_broken_indices(folder: Path, change: dict[str, Any], message: str):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_pickled_weights_are_refused(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for spec in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(ModelError, match=r"pytorch_model.bin: pickled weights are not loaded"):
            resolve_model(str(spec))


def test_adapters_are_told(folder: Path):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match="adapter"):
        resolve_model(str(folder))


def test_single_files(folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="name the folder"):
        resolve_model(str(folder / "model.safetensors"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"accepted: a model folder"):
        resolve_model(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("spec", ["./none", "/none", "none.gguf", "a/b/c", r"a\b", "~nobody/x"])
def test_paths_that_do_not_exist(spec: str):
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve_model(spec)


@pytest.mark.parametrize("spec", ["", "a b", "owner/", "x" * 5000, "a--b", "a\0b", "é/b"])
def test_malformed_ids(spec: str):
    with pytest.raises(ModelError, match="is none of: a model folder"):
        resolve_model(spec)


def test_hub_models_are_fetched_and_checked(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("owner/name") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled weights such as .bin are not loaded"):
        resolve_model("owner/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (errors.HFValidationError("bad"), "is none of"),
        (OSError("disk\nor so"), "cannot fetch it from the hub: disk or so$"),
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.GatedRepoError, "grants access on request"),
    ],
)
def test_hub_problems(error: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    def fail(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        # These two want a response of the hub; what it holds is not read.
        raise error.__new__(error) if isinstance(error, type) else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_model("owner/name")


def test_gguf_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(str(path))
    assert folder.parent == cache / "models"
    assert resolve.check_folder(folder) == folder
    monkeypatch.setattr(gguf, "convert_gguf", lambda *arguments: pytest.fail("converted again"))
    assert resolve_model(str(path)) == folder


def test_gguf_gives_the_same_model(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(str(path))
    before = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    model = AutoModelForCausalLM.from_pretrained(folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in read_safetensors_header(folder / "model.safetensors")
    text, tokenizer = Text.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for string in ("a  12 b", "<|im_end|>é"):
        assert text.encode(string) == tokenizer(string).input_ids
    # Digits stand alone, so that the two blanks before them stay together.
    assert text.pieces(text.encode("a  12")) == ["a", "  ", "1", "2"]
    assert text.eos_ids == {text.encode("<|im_end|>")[0]}


@pytest.mark.parametrize("damage", ["magic", "header", "weights"])
def test_damaged_gguf(tmp_path: Path, cache: Path, damage: str):
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    damaged = {"magic": b"XX", "header": content[:3000], "weights": content[:-3000]}
    path.write_bytes(damaged[damage])
    message = "is not a GGUF file" if damage == "magic" else "is truncated or damaged"
    with pytest.raises(ModelError, match=message):
        resolve_model(str(path))
    assert [file for file in cache.rglob("*") if file.is_file()] == []
