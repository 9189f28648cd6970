"""The commands about neurons refuse in one line what they cannot do, and do the rest."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.neurons.tiny_cards import tiny_llama, tiny_tokenizer
from vesicle.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The harbour was empty when the boats came back from the night. " * 200)
    return file


@pytest.fixture(scope="module")
def decoded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoded") / "decoded"
    assert main(["neurons", "decode", "--model", str(model), "--out", str(out), "--show", "2"]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["neurons", *map(str, words)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vesicle: error: ")
    return line


CLAMP = ("clamp", "--neuron", "1.2", "hi")


@pytest.mark.parametrize(
    ("words", "named", "allowed"),
    [
        (("clamp",), "--decoded and --neuron", ""),
        (("clamp", "--neuron", "1.2"), "PROMPT", ""),
        (("clamp", "--neuron", "1.2", " "), "PROMPT is empty", "visible character"),
        ((*CLAMP, "--strength", "nan"), "--strength is nan", "up to 1e+06"),
        ((*CLAMP, "--strength", "1e300"), "--strength is 1e+300", "up to 1e+06"),
        ((*CLAMP, "--seed", "99999999999999999999"), "99999999999999999999", "9223372036854775807"),
        (("lens", "--out", "x", "--strength", "inf"), "--strength is inf", "up to 1e+06"),
        (("probe", "--budget", "1"), "--budget is 1", "below 1"),
        (("report", "--out", "x", "--budget", "1"), "--budget is 1", "below 1"),
        (("decode", "--out", "x", "--against", "x"), "--against and --out are both", "another"),
    ],
)
def test_what_means_nothing_is_refused_before_a_model_is_loaded(
    words, named, allowed, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *words)
    assert named in line
    assert allowed in line


def test_answers_fit_the_context_window(model, text, capsys):
    line = refused(capsys, *CLAMP, "--model", model, "--data", text, "--new-tokens", 10**9)
    assert "--new-tokens is 1000000000; allowed after this prompt: up to " in line


def test_a_models_own_folder_is_not_written_to(model, capsys):
    before = sorted(path.name for path in model.iterdir())
    line = refused(capsys, "decode", "--model", model, "--out", model)
    assert "is the folder of a model" in line
    assert [n for n in sorted(p.name for p in model.iterdir()) if n[0] != "."] == before


def test_a_misspelt_split_is_refused(model, tmp_path, capsys):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("Rivers turn slowly over flat land. " * 200)
    words = ("clamp", "--model", model, "--neuron", "0.1", "hi", "--data", tmp_path)
    line = refused(capsys, *words, "--split", "tset")
    assert "'tset'" in line
    assert "test.txt, train.txt" in line


def test_more_neurons_than_there_are(model, text, decoded, tmp_path, capsys):
    own = ("--model", model, "--data", text)
    line = refused(capsys, "clamp", *own, "--decoded", decoded, "--count", 10**6)
    assert "allowed: 1 to " in line
    words = ("lens", *own, "--texts", 1, "--prompts", 1, "--out", tmp_path / "lens")
    assert "allowed: 3 to " in refused(capsys, *words, "--neurons", 10**6)


def test_a_text_that_is_too_short_says_how_to_give_a_longer_one(model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Too short.")
    line = refused(capsys, *CLAMP, "--model", model, "--data", tmp_path / "short.txt")
    assert "give more text" in line
    assert "sequence length" not in line


@pytest.mark.parametrize("content", ["[1, 2]", '{"model": "tiny"}'])
def test_a_damaged_note_is_named(content, model, decoded, tmp_path, capsys):
    for path in decoded.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "decoded.json").write_text(content)
    line = refused(capsys, "clamp", "--model", model, "--decoded", tmp_path)
    assert "decoded.json is not what decode wrote; remove" in line


@pytest.mark.parametrize("damage", ["layers", "tokens", "kinds"])
def test_damaged_numbers_are_refused(damage, model, text, decoded, tmp_path, capsys):
    tensors = load_file(decoded / "decoded.safetensors")
    facts = json.loads((decoded / "decoded.json").read_text())
    if damage == "layers":
        tensors = {name: value[:-1].contiguous() for name, value in tensors.items()}
    elif damage == "tokens":
        tensors["ids"] = torch.full_like(tensors["ids"], 10**6)
    else:
        facts["kinds"] = facts["kinds"][:-1]
    save_file(tensors, tmp_path / "decoded.safetensors")
    (tmp_path / "decoded.json").write_text(json.dumps(facts))
    words = ("clamp", "--model", model, "--decoded", tmp_path, "--data", text)
    line = refused(capsys, *words)
    assert "decode again" in line


def test_one_line_tells_what_is_decoded_and_what_a_clamp_does(model, text, decoded, capsys):
    capsys.readouterr()
    own = ("--model", str(model), "--data", str(text), "--json")
    words = ("clamp", "--decoded", str(decoded), "--count", "3", "--prompts", "2", *own)
    assert main(["neurons", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["neurons"] == 3
    assert len(told["clamped"]["random"]) == 3
    assert told["specialised_size"]["mean"] >= abs(told["specialised"]["mean"])
    words = ("clamp", "--neuron", "1.2", "hi", "--new-tokens", "3", *own)
    assert main(["neurons", *words]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["value"] is None for answer in answers] == [True, False, False]
    words = ("decode", "--out", str(decoded), "--model", str(model), "--json")
    assert main(["neurons", *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["specialised"]["down"]) == 10
