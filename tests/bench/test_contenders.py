"""Who takes part, and what is refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from vesicle.bench import contenders
from vesicle.bench.contenders import Contender, line_up
from vesicle.errors import ModelError, VesicleError


def names(**settings: Any) -> list[str]:
    return [contender.name for contender in lined_up(**settings)]


def lined_up(**settings: Any) -> list[Contender]:
    return line_up(
        **{
            "folder": Path("/somewhere/model"),
            "files": {},
            "modulator": None,
            "budget": None,
            "overhead": False,
            "gaba": (),
            "against": (),
            "threads": 2,
            **settings,
        }
    )


def test_who_takes_part():
    assert names() == ["rest"]
    everyone = names(
        modulator="m", overhead=True, gaba=(0.25, 0.5), against=("hf", "hf-bf16"), budget=0.7
    )
    assert everyone == ["rest", "overhead", "budget", "gaba-0.25", "gaba-0.5", "hf", "hf-bf16"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": ("vllm",)}, "against is .vllm.; allowed: hf, .*, openvino, onnx$"),
        ({"gaba": (1.5,)}, r"--gaba is 1\.5"),
        ({"gaba": (0.5, 0.5)}, "gaba-0.5 is asked for twice"),
        ({"device": "cuda"}, r"--device is 'cuda'; allowed: cpu"),
        ({"overhead": True}, "--overhead has nothing to measure"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(VesicleError, match=message):
        lined_up(**settings)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contenders, "find_spec", lambda module: None)
    with pytest.raises(VesicleError, match=r"llama_cpp.*pip install 'vesicle\[bench\]'"):
        contenders.check_installed(("llamacpp",))


def test_llama_cpp_needs_a_gguf(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contenders, "find_spec", lambda module: object())
    with pytest.raises(VesicleError, match="--gguf"):
        lined_up(against=("llamacpp",))
    assert lined_up(against=("llamacpp",), files={"llamacpp": Path("a.gguf")})[1].model == "a.gguf"


def test_reports_keep_no_folders():
    record = lined_up(modulator="/anywhere/modulator")[1].record()
    assert record["model"] == "model"
    assert record["modulator"] == "modulator"


def test_waiting_threads_of_this_engine_sleep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    rest, hf = lined_up(against=("hf",))
    assert rest.environment()["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in hf.environment()
    assert rest.environment()["OMP_NUM_THREADS"] == "2"


class TestGguf:
    """Where llama.cpp's file comes from."""

    def test_given(self, tmp_path: Path):
        from vesicle.bench.weights_file import find_gguf

        path = tmp_path / "own.gguf"
        path.write_bytes(b"GGUF and more")
        assert find_gguf(None, tmp_path, path) == path
        path.write_bytes(b"else")
        with pytest.raises(ModelError, match="not a GGUF file"):
            find_gguf(None, tmp_path, path)

    def test_the_model_itself_or_beside_it(self, tmp_path: Path):
        from vesicle.bench.weights_file import find_gguf

        assert find_gguf("a/b.gguf", tmp_path, None) == Path("a/b.gguf")
        (tmp_path / "inside.gguf").write_bytes(b"GGUF")
        assert find_gguf("owner/name", tmp_path, None) == tmp_path / "inside.gguf"

    def test_none(self, tmp_path: Path):
        from vesicle.bench.weights_file import find_gguf

        with pytest.raises(ModelError, match="--gguf"):
            find_gguf("owner/name", tmp_path, None)
        # A folder of the user's own, by a name of the catalogue.
        with pytest.raises(ModelError, match="--gguf"):
            find_gguf("gemma3-270m", tmp_path, None)

    def test_of_the_catalogue(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from vesicle.bench import weights_file

        monkeypatch.setenv("VESICLE_CACHE", str(tmp_path))
        monkeypatch.setattr(weights_file, "ensure_gguf", lambda name: tmp_path / f"{name}.gguf")
        folder = tmp_path / "models" / "gemma3-270m"
        for model, name in (
            (None, "smollm2-135m-instruct"),
            ("gemma3-270m", "gemma3-270m"),
        ):
            assert weights_file.find_gguf(model, folder, None) == tmp_path / f"{name}.gguf"
