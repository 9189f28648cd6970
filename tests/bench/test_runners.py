"""Every contender computes the same model, in any batch, and tells what it read."""

from pathlib import Path

import pytest
import torch

from tests.models.tiny_gguf import write_gguf
from tests.tiny import perturb
from vesicle.bench import weights_file
from vesicle.bench.contenders import ENGINE, HUGGING_FACE, LLAMA_CPP, ONNX, OPENVINO, Contender
from vesicle.bench.measure import measure
from vesicle.bench.runners import Runner, load
from vesicle.engine import Engine
from vesicle.errors import ModelError, VesicleError
from vesicle.modulator import Modulator

PROMPT, STEPS = 40, 6
ROWS = [[(7 * i + 31 * row) % 200 for i in range(PROMPT + STEPS + 1)] for row in range(3)]


@pytest.fixture(autouse=True)
def same_threads():
    """Runners set the number of threads of their process, which here is everybody's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def default_model() -> Path:
    from vesicle.models import ensure_default_model

    return ensure_default_model(progress=False)


@pytest.fixture
def modulator(bench_model: Path, tmp_path: Path) -> Path:
    fresh = Modulator.new(Engine.from_pretrained(bench_model, dtype=torch.float32).shape)
    perturb(fresh.predictor)
    fresh.save_pretrained(tmp_path / "modulator")
    return tmp_path / "modulator"


def loaded(runner: str, model: Path, **settings: object) -> Runner:
    contender = Contender(
        name="x",
        runner=runner,
        model=str(model),
        threads=1,
        **settings,  # type: ignore[arg-type]
    )
    made = load(contender)
    assert made.load()["weight_bytes"] > 0
    return made


def test_engine_and_hugging_face_say_the_same(bench_model: Path):
    rest = measure(loaded(ENGINE, bench_model, weights="fp32"), ROWS, PROMPT)
    hf = measure(loaded(HUGGING_FACE, bench_model), ROWS, PROMPT)
    assert rest["greedy"] == hf["greedy"]
    assert [len(row) for row in rest["greedy"]] == [STEPS + 1] * 3
    assert len(rest["steps_s"]) == len(hf["steps_s"]) == STEPS
    assert rest["prefill_s"] > 0
    assert rest["executed_share"] == pytest.approx(1.0)


@pytest.mark.parametrize("runner", [ENGINE, HUGGING_FACE])
def test_a_batch_says_what_its_rows_say_alone(bench_model: Path, runner: str):
    made = loaded(runner, bench_model)
    together = measure(made, ROWS, PROMPT)
    alone = [measure(made, [row], PROMPT)["greedy"][0] for row in ROWS]
    assert together["greedy"] == alone


def test_bytes_of_a_step(bench_model: Path):
    """Weights once for the batch, the cache of every sequence."""
    made = loaded(ENGINE, bench_model, weights="fp32")
    one, three = (measure(made, ROWS[:n], PROMPT)["step_bytes"] for n in (1, 3))
    hf = measure(loaded(HUGGING_FACE, bench_model), ROWS[:1], PROMPT)["step_bytes"]
    kv = 2 * 2 * 32 * 4 * (PROMPT + 1 + (STEPS - 1) / 2)  # K and V, layers, GK, bytes, positions
    assert three - one == pytest.approx(2 * kv)
    # Beside what the ledger counts, Hugging Face's figure has the norms' gains: 5 x 64 numbers.
    assert hf == pytest.approx(one + 5 * 64 * 4)


def test_a_budget_reads_less(bench_model: Path, modulator: Path):
    rest = measure(loaded(ENGINE, bench_model), ROWS, PROMPT)
    method = loaded(ENGINE, bench_model, mode="budget", modulator=str(modulator), budget=0.5)
    budget = measure(method, ROWS, PROMPT)
    assert budget["step_bytes"] < rest["step_bytes"]
    assert budget["executed_share"] < 0.9


def test_the_overhead_contender_computes_levels_and_skips_nothing(
    bench_model: Path, modulator: Path
):
    rest = measure(loaded(ENGINE, bench_model), ROWS, PROMPT)
    made = loaded(ENGINE, bench_model, mode="overhead", modulator=str(modulator))
    found = measure(made, ROWS, PROMPT)  # it checks its Plans itself
    assert found["executed_share"] > 1.0
    assert found["step_bytes"] > rest["step_bytes"]
    agree = [
        a == b
        for x, y in zip(found["greedy"], rest["greedy"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert sum(agree) / len(agree) > 0.9


def test_gaba_reads_its_share_of_blocks(bench_model: Path):
    row = [[i % 200 for i in range(110)]]
    made = loaded(ENGINE, bench_model, mode="gaba", share=0.5)
    made.begin(1, 110)
    made.prefill([row[0][:105]])
    made.step([3])
    plan = made._sequences[0].plan  # type: ignore[attr-defined]
    assert plan.kv_blocks[-1].tolist() == [7, 7]  # at most 8 are always read
    assert (plan.channels == plan.channels[0, 0]).all()


def test_llama_cpp_says_what_hugging_face_says(tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that CI does not build")
    from vesicle.models import resolve_model

    path = write_gguf(tmp_path / "tiny.gguf")
    rows = [[3 + token for token in row] for row in ROWS]
    llama = measure(loaded(LLAMA_CPP, path), rows, PROMPT)
    hf = measure(loaded(HUGGING_FACE, resolve_model(str(path))), rows, PROMPT)
    agree = [
        a == b
        for x, y in zip(llama["greedy"], hf["greedy"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert sum(agree) / len(agree) > 0.9
    kv = 2 * 32 * 2 * (PROMPT + 1 + (STEPS - 1) / 2)
    assert llama["step_bytes"] > 3 * kv


def test_llama_cpp_requantises_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that CI does not build")
    monkeypatch.setattr(weights_file, "cache_root", lambda: tmp_path / "cache")
    path = write_gguf(tmp_path / "tiny.gguf")
    files = weights_file.files_for(("llamacpp", "llamacpp-q4_0"), path)
    assert files["llamacpp"] == path
    made = files["llamacpp-q4_0"]
    assert made.parent == tmp_path / "cache" / "bench"
    assert made.stat().st_size > 0
    begun = made.stat().st_mtime_ns
    assert weights_file.files_for(("llamacpp-q4_0",), path) == {"llamacpp-q4_0": made}
    assert made.stat().st_mtime_ns == begun


def test_what_cannot_be_requantised_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an extra that CI does not build")
    monkeypatch.setattr(weights_file, "cache_root", lambda: tmp_path / "cache")
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot requantise"):
        weights_file.files_for(("llamacpp-q4_k_s",), path)
    assert list((tmp_path / "cache" / "bench").iterdir()) == []


@pytest.mark.model
def test_openvino_begins_as_this_engine_does(default_model: Path):
    """It goes on by itself, so that first tokens alone can be held against each other."""
    pytest.importorskip("openvino_genai", reason="openvino-genai is an extra")
    from vesicle.models import ensure_default_gguf

    rows = [[(7 * i + 31 * row) % 40000 + 100 for i in range(47)] for row in range(4)]
    theirs = measure(loaded(OPENVINO, ensure_default_gguf()), rows, PROMPT)
    mine = measure(loaded(ENGINE, default_model), rows, PROMPT)
    firsts = [(a[0], b[0]) for a, b in zip(theirs["greedy"], mine["greedy"], strict=True)]
    assert sum(a == b for a, b in firsts) >= 3, firsts
    assert [len(row) for row in theirs["greedy"]] == [STEPS + 1] * 4


@pytest.mark.model
def test_onnx_is_converted_once_and_says_much_the_same(
    default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is an extra")
    monkeypatch.setattr(weights_file, "cache_root", lambda: tmp_path / "cache")
    told: list[str] = []
    made = weights_file.converted_to_onnx(default_model, told.append)
    assert weights_file.converted_to_onnx(default_model, told.append) == made
    assert len(told) == 1
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 9
    ids = Engine.from_pretrained(default_model).encode(text)[: PROMPT + STEPS + 1]
    theirs = measure(loaded(ONNX, made), [ids], PROMPT)
    mine = measure(loaded(ENGINE, default_model), [ids], PROMPT)
    pairs = list(zip(theirs["greedy"][0], mine["greedy"][0], strict=True))
    assert sum(a == b for a, b in pairs) > STEPS / 2  # other weights, of a text that repeats
    with pytest.raises(VesicleError, match="one sequence at a time"):
        loaded(ONNX, made).begin(2, 50)


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the builder, as well as with it."""
    monkeypatch.setattr(weights_file, "cache_root", lambda: tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot convert model: "):
        weights_file.converted_to_onnx(tmp_path / "model")
    assert list((tmp_path / "cache" / "bench").iterdir()) == []
