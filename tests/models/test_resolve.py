import json
import shutil
import struct
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from tests.models.test_text import byte_level
from tests.models.tiny_folder import CONFIG, SHARDS, write_folder
from tests.models.tiny_gguf import write_gguf
from vesicle.errors import ModelError, VesicleError
from vesicle.models import gguf, resolve
from vesicle.models.checks import read_config
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
    found = {"smollm2-135m-instruct": tmp_path}
    monkeypatch.setattr(resolve, "ensure_model", lambda name, progress: found[name])
    assert resolve_model(spec) == tmp_path


def test_names_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {"gemma3-270m": tmp_path / "model"}
    monkeypatch.setattr(resolve, "ensure_model", lambda name, progress: found[name])
    monkeypatch.chdir(tmp_path)
    assert resolve_model("gemma3-270m") == tmp_path / "model"
    (tmp_path / "gemma3-270m").mkdir()
    hides = (
        r"^gemma3-270m is not a model: it has no config\.json; it hides the model of the catalogue "
        "that has its name: rename it, or work in another folder$"
    )
    for resolve_it in (resolve_model, Text.from_pretrained):
        with pytest.raises(ModelError, match=hides):
            resolve_it("gemma3-270m")


NEAR = {
    "Gemma3-270M": "gemma3-270m",
    "gemma3-270": "gemma3-270m",
    "gemma3_270m": "gemma3-270m",
    "gemma-270m": "gemma3-270m",
    "gemma3 270m": "gemma3-270m",
    "SmolLM2-135M": "smollm2-135m-instruct",
}


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("spec", NEAR)
def test_near_names_of_the_catalogue(spec: str):
    shown = repr(spec) if " " in spec else spec
    with pytest.raises(ModelError, match=rf"^--model {shown}: did you mean {NEAR[spec]}\? Acc"):
        resolve_model(spec)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("spec", ["./gemma3-270", "gemma3-270m.gguf"])
def test_near_paths_are_paths(spec: str):
    with pytest.raises(ModelError, match=r"no such file or folder$"):
        resolve_model(spec)


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


@pytest.mark.parametrize("name", ["model.bin", "model", "model.safetensors"])
def test_a_gguf_file_of_another_name(tmp_path: Path, name: str):
    path = write_gguf(tmp_path / name)
    with pytest.raises(ModelError, match=rf"{name} is a GGUF file, and its name must end in .gguf"):
        resolve_model(str(path))


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


PATHS = [
    "./none",
    "../none",
    "/none",
    ".",
    "none.gguf",
    "none.safetensors",
    "none.json",
    "a/b/c",
    r"a\b",
    "~nobody/x",
    "~/none",
    "runs/mine",  # there is a folder `runs`
    "runs/",
]


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder holds an empty folder `runs`, and the hub may not be asked."""
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked")
    )


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("spec", [p for p in PATHS if p not in (".", "runs/")])
def test_paths_that_do_not_exist(spec: str):
    from vesicle.modulator import Modulator

    with pytest.raises(ModelError, match=r"^--model .*: no such file or folder"):
        resolve_model(spec)
    with pytest.raises(ModelError, match=r"^--model .*: no such file or folder"):
        Text.from_pretrained(Path(spec))
    with pytest.raises(VesicleError, match=r"^no modulator at .*: no such file or folder"):
        Modulator.from_pretrained(spec)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("spec", [".", "runs/", "runs"])
def test_folders_of_other_things(spec: str):
    from vesicle.modulator import Modulator

    with pytest.raises(ModelError, match=r"is not a model: it has no config\.json"):
        resolve_model(spec)
    with pytest.raises(
        VesicleError, match=r"no modulator at .*: the folder has no modulator\.json$"
    ):
        Modulator.from_pretrained(spec)


@pytest.mark.usefixtures("no_hub")
def test_a_revision_says_that_a_hub_id_is_meant(monkeypatch: pytest.MonkeyPatch):
    """Also where a folder has the owner's name."""
    with pytest.raises(
        ModelError, match="the hub is not asked, because there is a folder 'runs' here"
    ):
        resolve_model("runs/mine")
    asked: list[str] = []

    def offline(repo_id: str, **options: Any) -> str:
        asked.append(repo_id)
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for spec in ("runs/mine", "other/mine", "mine", "Qwen/Qwen2.5-0.5B"):
        with pytest.raises(ModelError, match="the hub cannot be reached"):
            resolve_model(spec, revision="main")
    assert asked == ["runs/mine", "other/mine", "mine", "Qwen/Qwen2.5-0.5B"]


def test_what_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch):
    error = errors.RepositoryNotFoundError
    missing = error.__new__(error)

    def fail(*arguments: object, **options: object) -> None:
        raise missing

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"\(smollm2-135m-instruct, gemma3-270m\)$"):
        resolve_model("mistral-7b")
    with pytest.raises(ModelError, match=r"no such model on the hub \(or it is private\)$"):
        resolve_model("owner/name")


@pytest.mark.parametrize("spec", ["", "a b", "owner/", "x" * 5000, "a--b", "a\0b", "é/b"])
def test_malformed_ids(spec: str):
    with pytest.raises(ModelError, match="is none of: a model folder"):
        resolve_model(spec)


@pytest.mark.parametrize(("spec", "shown"), [("", "''"), ("a b", "'a b'"), ("a--b", "a--b")])
def test_what_would_not_be_seen_is_quoted(spec: str, shown: str):
    with pytest.raises(ModelError, match=f"^--model {shown}: it is none of"):
        resolve_model(spec)


class Hub:
    """A hub with one repository: what it is asked for, and a folder with what it gave."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache
        self.asked: list[tuple[str | None, str | bool | None]] = []
        self.given: list[str] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        token: str | bool | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        assert repo_id == "owner/name"
        self.asked.append((revision, token))
        for path in sorted(self.source.rglob("*")):
            name = str(path.relative_to(self.source))
            wanted = any(fnmatch(name, p) for p in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(name, p) for p in ignore_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                if not (self.cache / name).exists():
                    self.given.append(name)
                    shutil.copy(path, self.cache / name)
        self.cache.mkdir(parents=True, exist_ok=True)
        return str(self.cache)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Of the tiny model."""
    stub = Hub(folder, tmp_path / "hub" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub.snapshot_download)
    return stub


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_hub_model_only_what_is_read_is_fetched(hub: Hub, sharded: bool):
    if sharded:
        shard(hub.source)
    whole = hub.source / (SHARDS[0] if sharded else "model.safetensors")
    for name in ("consolidated.safetensors", "adapter.safetensors", "fp16/model.safetensors"):
        (hub.source / name).parent.mkdir(exist_ok=True)
        shutil.copy(whole, hub.source / name)
    for name in ("pytorch_model.bin", "README.md", "onnx.onnx"):
        (hub.source / name).write_text("x")
    (hub.source / "tokenizer.json").write_text("{}")
    assert resolve_model("owner/name") == hub.cache
    weights = list(SHARDS) if sharded else ["model.safetensors"]
    index = ["model.safetensors.index.json"] if sharded else []
    assert hub.given == ["config.json", *index, "tokenizer.json", *weights]


def test_what_is_not_supported_is_refused_before_weights_are_fetched(hub: Hub):
    config = hub.source / "config.json"
    for change, message in (
        ({"model_type": "mamba"}, "model type 'mamba' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights are quantised"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    ):
        config.write_text(json.dumps({**CONFIG, **change}))
        (hub.cache / "config.json").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=message):
            resolve_model("owner/name")
    config.unlink()
    (hub.cache / "config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        resolve_model("owner/name")
    assert set(hub.given) == {"config.json"}


def test_hub_models_without_weights_to_load(hub: Hub):
    (hub.source / "model.safetensors").rename(hub.source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights such as .bin are not loaded"):
        resolve_model("owner/name")
    assert hub.given == ["config.json"]


def test_revisions_and_tokens_are_passed_on(hub: Hub):
    resolve_model("owner/name", revision="v1", token="secret")
    # The weights are of the same commit, whatever the revision has come to mean meanwhile.
    assert hub.asked == [("v1", "secret"), (COMMIT, "secret")]


@pytest.mark.parametrize("spec", [None, "smollm2-135m-instruct", "gemma3-270m", "folder", "file"])
def test_a_revision_is_of_a_hub_id(spec: str | None, folder: Path, tmp_path: Path):
    given = {"folder": str(folder), "file": str(write_gguf(tmp_path / "tiny.gguf"))}.get(spec, spec)
    with pytest.raises(ModelError, match=r"revision 'v1' is given; a revision is of a hub id"):
        resolve_model(given, revision="v1")


def test_a_text_of_a_hub_model_fetches_no_weights(hub: Hub):
    tokenizer = byte_level()
    tokenizer.save(str(hub.source / "tokenizer.json"))
    expected = Text.from_folder(str(hub.source)).encode("a b")
    text = Text.from_pretrained("owner/name", revision="v1", token=False)
    assert text.encode("a b") == expected
    assert Text.from_pretrained(hub.source).encode("a b") == expected
    assert (hub.asked, hub.given) == ([("v1", False)], ["config.json", "tokenizer.json"])


def test_a_text_of_a_gguf_file(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert Text.from_pretrained(path).encode("a b") == Text.from_folder(resolve_model(path)).encode(
        "a b"
    )


def test_an_engine_of_a_hub_model(hub: Hub):
    from vesicle.engine import Engine

    engine = Engine.from_pretrained("owner/name", revision="v1", token="secret")
    assert engine.shape.n_layers == CONFIG["num_hidden_layers"]
    assert hub.asked == [("v1", "secret"), (COMMIT, "secret")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (errors.HFValidationError("bad"), "is none of"),
        (OSError("disk\nor so"), "cannot fetch it from the hub: disk or so$"),
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.GatedRepoError, "grants access on request"),
        (errors.RevisionNotFoundError, "the hub has it, but no revision 'v1'"),
    ],
)
def test_hub_problems(error: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    def fail(repo_id: str, **options: Any) -> str:
        # These two want a response of the hub; what it holds is not read.
        raise error.__new__(error) if isinstance(error, type) else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_model("owner/name", revision="v1")


def test_gguf_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_model(str(path))
    assert folder.parent == cache / "models"
    assert resolve.check_folder(folder) == folder
    # Read without importing transformers, which takes seconds: so the default model is, too.
    assert isinstance(read_config(folder), SimpleNamespace)
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
