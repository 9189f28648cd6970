import numpy as np
import pytest
import torch

from tests.evaluation.helpers import some_windows
from tests.tiny import shape_of, tiny_modulator
from vesicle.calibration import long_texts, measure_long
from vesicle.engine import Engine
from vesicle.modulator import Modulator
from vesicle.phases import GABA_ALONE, Phases
from vesicle.plan import Dense


@pytest.fixture
def subject(llama, monkeypatch):
    monkeypatch.setattr(long_texts, "DIALS", (0.7, 0.3))
    return llama, tiny_modulator(shape_of(llama)), some_windows(2, length=384)


def test_shares_and_losses_are_the_engines_own(subject):
    model, modulator, windows = subject
    told: list[str] = []
    measured, losses = measure_long(model, modulator, windows, tolerance=1e9, tell=told.append)
    shares, dials = map(np.array, zip(*measured.dial, strict=True))
    assert (np.diff(shares) > 0).all()
    assert (np.diff(dials) > 0).all()
    assert measured.dial[-1] == (1.0, 1.0)
    assert shares[0] < 0.99  # of 24 blocks some can be left out
    assert len(told) == len(losses) == len(long_texts.DIALS) + 1
    # No loss is too much, so the default is the least share.
    assert measured.default_budget == pytest.approx(shares[0], abs=1e-3)
    modulator.info.gaba_alone = measured
    engine = Engine.from_model(model)
    method = modulator.at(float(shares[0]), GABA_ALONE)
    assert method.dial == dials[0]
    nats = 0.0
    executed, dense = [], []
    for ids in windows.tolist():
        for who, into in ((method, executed), (Dense(), dense)):
            sequence = engine.start(who)
            sequence.begin_prompt(192)
            logits = engine.forward([(sequence, ids)], "all")[0].double().log_softmax(-1)
            into.append(sequence.cost_of(slice(191, None)).flops_total)
            if who is method:
                nats -= float(logits[191:383].gather(1, torch.tensor(ids[192:])[:, None]).sum())
    assert sum(executed) / sum(dense) == pytest.approx(shares[0], abs=1e-9)
    assert nats / (2 * 192) == pytest.approx(losses[f"{shares[0]:.3f}"], rel=1e-5)


def test_no_loss_allowed_is_rest(subject):
    measured, losses = measure_long(*subject, tolerance=-1.0)
    assert measured.default_budget == 1.0
    assert losses["1.000"] > 0


def test_it_is_kept(subject, tmp_path, monkeypatch):
    found = measure_long(*subject, cache=tmp_path)
    monkeypatch.setattr(long_texts, "Engine", None)
    assert measure_long(*subject, cache=tmp_path) == found
    with pytest.raises(AttributeError):
        measure_long(*subject, cache=tmp_path, tolerance=0.5)


def test_its_table_serves_where_gaba_alone_acts_and_survives_saving(subject, tmp_path):
    model, modulator, windows = subject
    before = modulator.dial(0.8, GABA_ALONE)
    modulator.info.gaba_alone, _ = measure_long(model, modulator, windows)
    modulator.save_pretrained(tmp_path)
    loaded = Modulator.from_pretrained(tmp_path)
    assert loaded.info.gaba_alone == modulator.info.gaba_alone
    least = modulator.info.gaba_alone.dial[0][0]
    assert loaded.least_budget(GABA_ALONE) == least
    assert loaded.least_budget(Phases.saving_time("avx2")) == least
    assert loaded.default_budget(GABA_ALONE) == modulator.info.gaba_alone.default_budget
    for phases in (Phases(), Phases.everywhere(), Phases(gaba="all")):
        assert loaded.dial(0.8, phases) == before
    assert loaded.below_reach(least, GABA_ALONE) == ""
    assert f"{least:.2f}" in loaded.below_reach(least / 2, GABA_ALONE)
    # Of other transmitters that rest nothing was measured.
    assert loaded.below_reach(0.01, Phases(dopamine="never")) == ""
