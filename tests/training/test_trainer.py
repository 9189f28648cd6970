import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_run import (
    CONFIG,
    LENGTH,
    run,
    tiny_model,
    tiny_modulator,
    tiny_windows,
)
from vesicle.errors import DataError, VesicleError
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.predictors import PREDICTORS
from vesicle.reference.attach import Soft, attach
from vesicle.training import trainer
from vesicle.training.objectives import divergence
from vesicle.training.trainer import TrainConfig, train

GOLDEN = Path(__file__).parents[1] / "golden" / "training_curve.txt"


def curve(folder: Path) -> list[dict]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.endswith("_s")} for x in lines]


def same_outcome(a: Path, b: Path) -> bool:
    x, y = load_file(a / "modulator.safetensors"), load_file(b / "modulator.safetensors")
    return curve(a) == curve(b) and all(torch.equal(x[n], y[n]) for n in x.keys() | y.keys())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


def test_a_run_leaves_its_files_and_a_record(undisturbed):
    lines = curve(undisturbed)
    assert [x["step"] for x in lines if x["event"] == "train"] == list(range(1, 17))
    assert [x["step"] for x in lines if x["event"] == "eval"] == [3, 6, 9, 12, 15]
    assert len(list((undisturbed / "checkpoints").glob("step-*"))) == 2
    modulator = Modulator.from_pretrained(undisturbed)
    record = modulator.info.training
    assert TrainConfig.from_dict(record["config"]) == CONFIG
    assert record["steps"] == 16
    assert record["metrics"]["held_out"]["loss"] > 0
    files = {p.suffix for p in undisturbed.rglob("*") if p.is_file()}
    assert files <= {".json", ".jsonl", ".safetensors"}


def test_killed_at_any_moment_it_continues_exactly(undisturbed, tmp_path):
    # Importing takes seconds and training less than one, so kills are timed by what was written.
    kills = 0
    for lines in (1, 12):
        command = [sys.executable, "-m", "tests.training.tiny_run", str(tmp_path)]
        source = Path(trainer.__file__).parents[2]
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        metrics = tmp_path / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1, "it was too quick to be killed"
    assert not (tmp_path / "modulator.json").exists()
    run(tmp_path)
    assert same_outcome(undisturbed, tmp_path)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_interrupted_within_a_step_it_continues_exactly(predictor, tmp_path, monkeypatch, capsys):
    config = replace(CONFIG, steps=8, checkpoint_every=3)
    run(tmp_path / "a", config, predictor)
    calls = 0

    def interrupting(*args):
        nonlocal calls
        calls += 1
        if calls == 18:  # within step 7, with evaluations in between
            raise KeyboardInterrupt
        return divergence(*args)

    monkeypatch.setattr(trainer, "divergence", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", config, predictor)
    assert "resume from step 6 of 8" in capsys.readouterr().out
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 7, "lo')
    run(tmp_path / "b", config, predictor)
    assert "resuming at step 6 of 8" in capsys.readouterr().out
    assert same_outcome(tmp_path / "a", tmp_path / "b")


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path):
    run(tmp_path)
    newest = max((tmp_path / "checkpoints").glob("step-*")) / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    run(tmp_path)
    assert same_outcome(undisturbed, tmp_path)


def test_a_finished_run_is_not_run_again(undisturbed, tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(trainer, "divergence", None)
    run(tmp_path)
    assert same_outcome(undisturbed, tmp_path)


def test_another_configuration_is_refused_until_restart(tmp_path):
    short = replace(CONFIG, steps=2, eval_every=0)
    run(tmp_path, short)
    with pytest.raises(VesicleError, match=r"price 30\.0, and now it is 7\.0.*--restart"):
        run(tmp_path, replace(short, price=7.0))
    with pytest.raises(VesicleError, match="another predictor"):
        run(tmp_path, short, "mlp")
    run(tmp_path, replace(short, price=7.0), restart=True)
    assert len(curve(tmp_path)) == 2


def test_the_loss_is_that_of_the_positions_drawn(tmp_path):
    config = replace(CONFIG, steps=1, accumulation=1, loss_positions=5, eval_every=0)
    run(tmp_path, config)
    line = curve(tmp_path)[0]
    model = tiny_model()
    modulator = tiny_modulator(model)
    window = tiny_windows()[int(np.random.default_rng((config.seed, 0)).permutation(7)[0])][None]
    with torch.no_grad():
        dense = model(window).logits
        with attach(model, ModulatorMethod(modulator, config.budget(0)), soft=Soft()) as attached:
            modulated = model(window).logits
    drawn = np.random.default_rng((config.seed, 0, 1)).choice(LENGTH, 5, replace=False)
    some = divergence(dense[:, drawn], modulated[:, drawn]).item()
    assert line["kl"] == pytest.approx(some, rel=1e-4)
    assert some != pytest.approx(divergence(dense, modulated).item(), rel=1e-2)
    assert line["share"] == pytest.approx(attached.soft_cost.share.item(), rel=1e-6)


def test_more_positions_than_a_window_has_are_refused():
    with pytest.raises(
        ValueError, match="loss_positions is 49; allowed: up to sequence_length, 48"
    ):
        replace(CONFIG, loss_positions=49)


def test_patience_stops_a_run_that_no_longer_improves(tmp_path):
    config = replace(CONFIG, learning_rate=1e-12, scale_learning_rate=1e-12, patience=2)
    result = run(tmp_path, replace(config, eval_every=1))
    assert result.stopped_early
    assert result.step < 16


def test_the_loss_curve_is_the_golden_one(tmp_path):
    # Soft masks throughout: no machine's rounding can flip a decision.
    soft = {"temperature_start": 0.3, "temperature_end": 0.3}
    run(tmp_path, replace(CONFIG, steps=50, checkpoint_every=50, eval_every=0, **soft))
    got = [(x["event"], x["step"], x["loss"]) for x in curve(tmp_path)]
    text = "".join(f"{event} {step} {loss:.9g}\n" for event, step, loss in got)
    if os.environ.get("VESICLE_WRITE_GOLDEN"):  # after a change that is meant to move the curve
        GOLDEN.write_text(text)
    expected = [line.split() for line in GOLDEN.read_text().splitlines()]
    assert [(e, s) for e, s, _ in got] == [(e, int(s)) for e, s, _ in expected]
    assert [loss for *_, loss in got] == pytest.approx([float(x[2]) for x in expected], rel=1e-4)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_gradient_reaches_every_parameter(kind):
    model = tiny_model().requires_grad_(False)
    modulator = tiny_modulator(model, kind)
    with torch.no_grad():  # a zero read-out passes no gradient to what it reads
        for parameter in modulator.predictor.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tokens = tiny_windows(2)
    dense = model(tokens, use_cache=False).logits
    with attach(model, ModulatorMethod(modulator, 0.6), soft=Soft()) as attached:
        logits = model(tokens, use_cache=False).logits
    (divergence(dense, logits) + attached.soft_cost.share).backward()
    for name, parameter in modulator.predictor.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1) != 0).any(1).all(), name


def test_at_dial_one_nothing_is_lost_and_everything_spent():
    model = tiny_model().requires_grad_(False)
    modulator = tiny_modulator(model)
    tokens = tiny_windows(1)
    dense = model(tokens, use_cache=False).logits
    with attach(model, ModulatorMethod(modulator, 1.0), soft=Soft()) as attached:
        logits = model(tokens, use_cache=False).logits
    assert divergence(dense, logits).item() == pytest.approx(0, abs=1e-7)
    assert attached.soft_cost.share.item() == pytest.approx(1, abs=1e-12)


def test_the_base_model_is_left_as_it_was(tmp_path):
    model = tiny_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = replace(CONFIG, steps=1, eval_every=0)
    train(
        model,
        tiny_modulator(model),
        tiny_windows(),
        None,
        config,
        tmp_path,
        tensorboard=False,
        progress=False,
        say=print,
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_bfloat16_base_with_a_float32_predictor(tmp_path):
    run(tmp_path, replace(CONFIG, steps=2, dtype="bfloat16", eval_every=0))
    tensors = load_file(tmp_path / "modulator.safetensors")
    assert tensors["predictor.weight"].dtype == torch.float32


def test_windows_of_another_length_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(DataError, match=f"have {LENGTH} tokens; sequence_length is 64"):
        train(
            model,
            tiny_modulator(model),
            tiny_windows(),
            None,
            replace(CONFIG, sequence_length=64),
            tmp_path,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; allowed: whole numbers from 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: above 0"),
        ({"price": -1.0}, "price is -1.0"),
        ({"budget_high": 1.0}, "budgets go from"),
        ({"dtype": "float16"}, "allowed: float32, bfloat16"),
        ({"temperature_start": 1.0}, "both above 0, or both 0"),
    ],
)
def test_configurations_check_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_configurations_round_trip_and_refuse_unknown_keys():
    assert TrainConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match="unknown training setting 'stepz'"):
        TrainConfig.from_dict({"stepz": 1})


def test_budgets_cover_their_range_evenly():
    budgets = [TrainConfig(seed=3).budget(i) for i in range(40, 60)]
    counts = torch.histc(torch.tensor(budgets), 5, 0.55, 0.98)
    assert counts.min() >= 3
    assert min(budgets) >= 0.55
    assert max(budgets) <= 0.98
