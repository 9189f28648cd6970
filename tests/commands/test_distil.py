"""`vesicle distil`, and small FFNs on their way into a modulator and an answer."""

import json
from pathlib import Path

import pytest

from vesicle.cli import main
from vesicle.modulator import Modulator
from vesicle.small_modules import SmallFfn


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and small FFNs for the model."""
    folder = tmp_path_factory.mktemp("distil")
    (folder / "model").symlink_to(model)
    (folder / "text.txt").write_text("".join(f"{n} and {n} is {2 * n}. " for n in range(160)))
    assert main(distil(folder)) == 0
    return folder


def distil(folder: Path, *more: str) -> list[str]:
    words = ["distil", "--data", str(folder / "text.txt"), "--model", str(folder / "model")]
    words += ["--sequence-length", "32", "--passes", "3", "--windows", "2", "--held-out", "2"]
    return [*words, "--out", str(folder / "small"), *more]


def calibrate(folder: Path, out: Path, *more: str) -> list[str]:
    words = ["calibrate", "--data", str(folder / "text.txt"), "--model", str(folder / "model")]
    words += ["--sequence-length", "32", "--windows", "2", "--gap", "0.2", "--attention-rank", "2"]
    return [*words, "--out", str(out), *more]


def test_kinds_are_compared(made: Path, capsys: pytest.CaptureFixture[str]):
    assert main(distil(made, "--json")) == 0  # what is done is not done again
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((made / "small" / "comparison.json").read_text())
    names = [row["kind"] for row in found["kinds"]]
    assert names == ["distilled", "nested", "low-rank", "low-rank 32", "Jacobian"]
    for row in found["kinds"]:
        assert row["points"][0]["rise"] == 0
        assert [p["flops"] for p in row["points"]] == sorted(
            (p["flops"] for p in row["points"]), reverse=True
        )
    page = (made / "small" / "comparison.html").read_text()
    assert all(name in page for name in names)


def test_a_model_in_bf16_and_another_model_in_its_place(
    made: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import torch
    import transformers

    (tmp_path / "text.txt").symlink_to(made / "text.txt")
    network = transformers.AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16)
    for name in ("tokenizer.json",):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).symlink_to(model / name)
    network.save_pretrained(tmp_path / "model")
    assert main(distil(tmp_path)) == 0
    assert main(oracle(tmp_path, "--most", "1", "--no-report")) == 0
    for parameter in network.parameters():
        parameter.data *= 1.5
    network.save_pretrained(tmp_path / "model")
    assert "holds a run with another weights" in refused(capsys, distil(tmp_path))
    assert "holds a search of other texts" in refused(capsys, oracle(tmp_path, "--most", "1"))


def test_a_modulator_of_them_answers(made: Path, tmp_path: Path):
    more = ("--small-ffns", str(made / "small"))
    assert main(calibrate(made, tmp_path / "new", *more)) == 0
    modulator = Modulator.from_pretrained(tmp_path / "new")
    assert isinstance(modulator.ffn_standin, SmallFfn)
    words = ["run", "hi", "--model", str(made / "model"), "--modulator", str(tmp_path / "new")]
    assert main([*words, "--max-new-tokens", "2", "--budget", "0.8", "--goal", "flops"]) == 0

    # And in place of the maps of one that is there.
    assert main(calibrate(made, tmp_path / "maps", "--ffn-rank", "2")) == 0
    earlier = ("--modulator", str(tmp_path / "maps"))
    assert main(calibrate(made, tmp_path / "changed", *earlier, *more)) == 0
    changed = Modulator.from_pretrained(tmp_path / "changed")
    assert isinstance(changed.ffn_standin, SmallFfn)


def test_a_training_with_others_is_another(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["train", "--data", str(made / "text.txt"), "--model", str(made / "model")]
    words += ["--sequence-length", "32", "--steps", "1", "--calibration-windows", "2"]
    words += ["--eval-windows", "1", "--accumulation", "1", "--attention-rank", "2"]
    words += ["--out", str(tmp_path)]
    assert main([*words, "--small-ffns", str(made / "small")]) == 0
    assert isinstance(Modulator.from_pretrained(tmp_path).ffn_standin, SmallFfn)
    assert main(words) == 2
    assert "another" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    assert main(words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_one_line_for_what_cannot_be(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = refused(capsys, distil(made, "--passes", "4"))
    assert "holds a run with another passes" in line
    line = refused(capsys, distil(made, "--held-out", "0", "--json"))
    assert line.endswith("--json prints the comparison, and --held-out 0 makes none")
    assert "--seed" in refused(capsys, distil(made, "--seed", "-1"))
    line = refused(capsys, distil(made, "--held-out", "999"))
    assert "leaves none to learn from" in line
    line = refused(capsys, calibrate(made, tmp_path, "--small-ffns", str(tmp_path)))
    assert line.endswith("holds no small_ffns.json; vesicle distil writes one")
    words = ["--windows", "0", "--long-windows", "1", "--modulator", "m"]
    line = refused(capsys, calibrate(made, tmp_path, *words, "--small-ffns", str(tmp_path)))
    assert line.endswith("other FFNs need the dial measured anew")
    more = ("--small-ffns", str(made / "small"), "--transmitters", "gaba")
    line = refused(capsys, calibrate(made, tmp_path, *more))
    assert line.endswith("allowed where serotonin is among --transmitters, which are gaba")


def oracle(folder: Path, *more: str) -> list[str]:
    words = ["oracle", "--data", str(folder / "text.txt"), "--model", str(folder / "model")]
    words += ["--small-ffns", str(folder / "small"), "--split", "train", "--length", "17"]
    return [*words, "--texts", "2", "--random", "3", "--out", str(folder / "oracle"), *more]


def test_an_oracle_and_its_report(made: Path, capsys: pytest.CaptureFixture[str]):
    from safetensors.numpy import load_file

    assert main(oracle(made, "--json", "--most", "2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 32
    assert len(found["curves"]["labelled"]) == 3
    # All FFNs of this model are small at last: then all choose alike, but for the router, which
    # leaves the first token of a text big.
    last = {name: told[-1]["mean"] for name, told in found["executed"].items()}
    assert last.pop("router") != last["fixed"]
    assert len(set(last.values())) == 1
    assert found["router_had_small"][-1] == pytest.approx(2 * 15 / 16, abs=1e-3)
    page = (made / "oracle" / "report.html").read_text()
    assert "<svg" in page
    assert "difficult" in page
    kept = sorted((made / "oracle" / "texts").iterdir())
    assert len(kept) == 2
    assert load_file(kept[0])["patterns"].shape == (16, 3, 2)

    kept[1].unlink()  # as if it had been cut off there
    before = kept[0].stat().st_mtime_ns
    kept[1].write_bytes(b"broken")
    assert "cannot read" in refused(capsys, oracle(made, "--most", "2"))
    kept[1].unlink()
    assert main(oracle(made, "--json", "--most", "2")) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert kept[0].stat().st_mtime_ns == before

    line = refused(capsys, oracle(made, "--json", "--no-report"))
    assert line.endswith("--json prints the report, and --no-report makes none")
    line = refused(capsys, oracle(made, "--most", "1"))
    assert "holds a search of other texts or settings" in line
    line = refused(capsys, oracle(made, "--most", "3"))
    assert line.endswith("--most is 3; allowed: 1 to 2, the layers")
    line = refused(capsys, oracle(made, "--search", "best"))
    assert line.endswith("--search is 'best'; allowed: gains, greedy, beam")
    line = refused(capsys, oracle(made, "--texts", "999"))
    assert "--texts 999 needs 1001" in line


def test_difficulty_by_task(made: Path, capsys: pytest.CaptureFixture[str]):
    words = ["oracle", "--tasks", "race,wikitext2", "--data", "sample", "--texts", "1"]
    words += ["--model", str(made / "model"), "--small-ffns", str(made / "small"), "--most", "1"]
    words += ["--length", "17", "--random", "2", "--out", str(made / "tasks")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 2
    assert list(found["difficulty"]["by_task"]) == ["race", "wikitext2"]
    by_task = [row["mean"] for row in found["difficulty"]["by_task"].values()]
    assert sum(by_task) / 2 == pytest.approx(found["difficulty"]["mean"]["mean"], abs=1e-4)
    assert "wikitext2" in (made / "tasks" / "report.html").read_text()
    assert "race has" in refused(capsys, [*words, "--texts", "999"])
