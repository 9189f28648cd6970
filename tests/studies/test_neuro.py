"""The study of transmitters at its smallest, from its jobs to the report, and its parts by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vesicle.errors import VesicleError
from vesicle.files import read_json
from vesicle.modulator import ModulatorMethod
from vesicle.phases import EVERYWHERE
from vesicle.plan import Plan
from vesicle.predictors import ConstantLevels, Predictor
from vesicle.reference.attach import attach
from vesicle.studies.corpora import TASKS, fingerprint
from vesicle.studies.neuro import SCALES, run_study
from vesicle.studies.neuro.analysis import _cost, _flattened
from vesicle.studies.neuro.controls import _mirrored
from vesicle.studies.neuro.hybrids import REMEMBERING, SETS
from vesicle.studies.neuro.judging import at_cost, dense_flops, dial_for, executed, unread
from vesicle.studies.neuro.learning import faster, loss_of, text_losses
from vesicle.studies.neuro.needs import needs_loss
from vesicle.studies.neuro.plan import stages
from vesicle.studies.neuro.policy import GROUP, Perturbed
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.tables import WHOLE, _fit
from vesicle.studies.neuro.variants import GROUPS, Variant, _read, of_group, variants


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neuro")
    run_study(folder, "debug", data="sample")
    return folder


@pytest.fixture
def run(out: Path) -> Run:
    texts = "+".join(fingerprint(task, "sample", None) for task in TASKS)
    return Run(out=out, scale="debug", seed=0, texts=texts, data="sample", text=None)


def test_the_report_has_all_steps(out: Path):
    report = read_json(out / "report.json")
    assert set(report["groups"]) == set(GROUPS) - {"whole", "hybrid"}
    for group, rows in report["groups"].items():
        named = {v.name for v in of_group("whole", group)} - {"dense"}
        assert {row["name"] for row in rows} == named
    assert {row["task"] for row in report["tasks"]} == set(TASKS)
    assert {row["name"] for row in report["controls"]} == {
        *("learnt", "uniform", "per layer", "random", "shuffled", "swapped", "inverted"),
        *("best of N random", "oracle"),
    }
    inside = report["inside"]
    assert {row["transmitter"] for row in inside["doses"]} == {"dopamine", "serotonin", "gaba"}
    assert {row["how"] for row in inside["lesions"]} == {"flat", "resting"}
    assert len(inside["hybrids"]) == 1 + len(SETS) + len(REMEMBERING)
    assert {row["what"] for row in inside["times"]} == {"trained", "tiny"}
    assert len(report["scaling"]["rows"]) == 2
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 15
    assert "<script" not in page
    told = (out / "summary.md").read_text()
    assert all(name in told for name in variants() if variants()[name].group != "hybrid")


def test_no_record_nor_page_tells_of_the_machine(out: Path):
    files = [*(out / "records").rglob("*.json"), *out.glob("*.json"), *out.glob("*.html")]
    for path in [*files, out / "summary.md"]:
        told = path.read_text()
        assert str(out) not in told, path.name
        assert str(Path.home()) + "/" not in told, path.name


def test_given_again_nothing_is_done_and_the_report_is_the_same(out: Path):
    names = ("report.html", "report.json", "summary.md")
    before = [(out / name).read_bytes() for name in names]
    stamps = {p: p.stat().st_mtime_ns for p in (out / "records").rglob("*.json")}
    run_study(out, "debug", data="sample")
    assert [(out / name).read_bytes() for name in names] == before
    assert {p: p.stat().st_mtime_ns for p in (out / "records").rglob("*.json")} == stamps


def test_a_job_that_is_lost_is_done_again_with_the_same_result(out: Path):
    path = out / "records" / "variant" / "transmitters" / "0.json"
    before = read_json(path)["result"]["points"]
    path.unlink()
    run_study(out, "debug", data="sample")
    assert read_json(path)["result"]["points"] == before


def test_weights_that_are_lost_are_trained_again_for_the_jobs_that_need_them(out: Path):
    path = out / "records" / "doses" / "0.json"
    before = read_json(path)
    path.unlink()
    weights = [out / "models" / name / "0" / "model.safetensors" for name in ("base", WHOLE)]
    kept = [file.read_bytes() for file in weights]
    for file in weights:
        shutil.rmtree(file.parent)
    run_study(out, "debug", data="sample")
    assert read_json(path) == before
    assert [file.read_bytes() for file in weights] == kept


def test_all_at_rest_cost_what_the_dense_decoder_costs(out: Path):
    for name in variants():
        record = read_json(out / "records" / "variant" / name / "0.json")["result"]
        cost = record["points"][0]["cost"]
        fewer = variants()[name].tiles or variants()[name].attention
        assert cost < 1 if fewer else cost == 1
        shares = [point["cost"] for point in record["points"][1:]]
        assert all(0 < share < 1.2 for share in shares)


def test_every_scale_can_be_planned():
    for scale in SCALES:
        names = [job.name for _, _, jobs in stages(scale, "sample", None, 2) for job in jobs]
        assert len(names) == len(set(names))
        assert f"variant/transmitters/{SCALES[scale].seeds - 1}" in names


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"group": "x"}, "group is 'x'; allowed: whole, baseline"),
        ({"predictor": "x"}, "predictor is 'x'; allowed: none, linear"),
        ({"transmitters": ["melatonin"]}, "melatonin"),
        ({"budgets": [0.5, 0.3]}, "budgets are"),
        ({"tiles": 1.5}, "tiles is 1.5"),
        ({"predictor": "mod"}, "'mod' releases serotonin alone"),
        ({"attention": {"blok": 3}}, "attention has blok; allowed: block and columns"),
        ({"budgets": 0.5}, "not iterable"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(change: dict[str, object], told: str):
    values = {"group": "release", "says": "something", **change}
    with pytest.raises(VesicleError, match="mine: ") as refused:
        _read("mine", json.dumps(values))
    assert told in str(refused.value)


def test_every_variant_trains_what_it_says(run: Run):
    for variant in variants().values():
        subject = run.untrained(variant)
        named = dict(subject.named_parameters())
        trained = {name for name, p in named.items() if p.requires_grad}
        assert any(n.startswith("model.") for n in trained) == (variant.tune == "all")
        read_outs = {n for n in trained if n.startswith("modulator.predictor.")}
        if variant.predictor == "none":
            assert not read_outs
        if variant.layers_alone:
            assert {n.rpartition(".")[2] for n in read_outs} == {
                *("offset", "log_slope", "position_weight")
            }


@pytest.mark.parametrize(
    "name", ["transmitters", "policy", "told-by-margin", "tiles", "early-exit"]
)
def test_a_step_moves_what_is_trained(run: Run, name: str):
    subject = run.untrained(variants()[name]).train()
    loss_of(run, subject, steps=4)(1).backward()
    moved = {n for n, p in subject.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("model.") for n in moved)
    part = "importance." if name == "tiles" else "modulator.predictor."
    assert any(n.startswith(part) for n in moved)


def test_frozen_decoders_stay_as_they_were(out: Path, run: Run):
    before, after = run.base(), run.trained(variants()["frozen"]).model
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_read_outs_that_are_told_learn_from_nothing_else(run: Run):
    subject = run.untrained(variants()["told-by-cross-entropy"])
    assert subject.modulator is not None
    loss_of(run, subject, steps=4)(1).backward()
    assert isinstance(subject.modulator.predictor, Predictor)
    own = subject.modulator.predictor.get_parameter("weight")
    got = own.grad
    assert got is not None
    ids, _ = run.batch(run.size.base_steps + 1)
    alone = torch.autograd.grad(needs_loss(subject, ids, "cross-entropy"), own)[0]
    torch.testing.assert_close(got, alone)


def test_costs_between_two_points_are_interpolated():
    points = [
        {"dial": d, "cost": c, "losses": {"lm": [x, 2 * x]}}
        for d, c, x in ((1.0, 1.0, 1.0), (0.5, 0.8, 2.0), (0.2, 0.4, 4.0))
    ]
    found = at_cost(points, 0.6)
    assert found is not None
    np.testing.assert_allclose(found["lm"], [3.0, 6.0])
    assert at_cost(points, 0.3) is None
    assert at_cost(points, 1.0) == {"lm": [1.0, 2.0]}


def test_a_dial_is_found_for_a_cost(run: Run):
    subject = run.trained(variants()["without-serotonin"])
    record = read_json(run.out / "records" / "variant" / "without-serotonin" / "0.json")["result"]
    dial = dial_for(run, subject, record["points"], 0.9)
    assert dial is not None
    shares = [executed(subject, subject.method(dial), *part[1:])[1] for part in run.judged("test")]
    assert np.mean(shares) == pytest.approx(0.9, abs=4e-3)
    assert dial_for(run, subject, record["points"], 0.01) is None


def test_flat_levels_cost_what_they_did(run: Run):
    subject = run.trained(variants()["without-serotonin"])
    levels = np.random.default_rng(0).uniform(0.4, 1, (2, run.size.length, 3, 2))
    flat = _flattened(subject, levels, (0,))
    assert flat is not None
    assert np.ptp(flat[..., 0], axis=(0, 1)).max() < 1e-6
    np.testing.assert_allclose(flat[..., 1], levels[..., 1], atol=1e-12)
    assert _cost(subject, flat) == pytest.approx(_cost(subject, levels), rel=3e-3)


def test_levels_that_are_the_dial_need_no_predictor(run: Run):
    subject = run.untrained(variants()["uniform-without-depth"])
    _, ids, scored = next(run.judged("test"))
    shares = [
        executed(subject, m, ids, scored)[1] for m in (subject.served(0.8), subject.method(0.8))
    ]
    assert 0 < shares[1] - shares[0] < 0.02


def test_a_step_mixes_tasks_and_their_order(run: Run):
    ids, scored = run.batch(3)
    assert torch.equal(ids, run.batch(3)[0])
    assert scored[:, 1:].any(1).all()


def test_levels_that_are_not_learnt_are_turned_to_what_they_cost(run: Run):
    subject = run.untrained(variants()["uniform-without-depth"])
    _, ids, scored = next(run.judged("test"))
    for budget in (0.97, 0.9):
        _, cost, _ = executed(subject, subject.method(subject.dial(budget)), ids, scored)
        assert cost == pytest.approx(budget, abs=0.01)
    assert run.untrained(variants()["transmitters"]).dial(0.6) == 0.6


def test_what_patterns_leave_unread_is_taken_off_the_cost(run: Run):
    subject = run.untrained(variants()["sparse-attention"])
    ids = next(run.judged("test"))[1][:1]
    subject.model(ids)
    t, shape = ids.shape[1], subject.shape
    block, columns = 32, 4
    reads = np.mean([i % block + 1 + columns * (i // block) for i in range(t)])
    wanted = 4 * shape.query_width * shape.n_layers * t * ((t + 1) / 2 - reads)
    rest = Plan.rest(shape, t)
    assert unread(subject, [rest]) == pytest.approx(wanted)
    half = rest.rows.copy()
    half["attention"][: t // 2] = 0
    assert unread(subject, [Plan(rows=half)]) == pytest.approx(wanted / 2)
    assert dense_flops(subject, 3, t) == 3 * dense_flops(subject, 1, t)


def test_losses_count_scored_targets_alone():
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 3] = 9.0
    ids = torch.tensor([[1, 2, 3, 4]])
    scored = torch.tensor([[True, False, True, False]])
    expected = -logits[0, 1].log_softmax(-1)[3]
    torch.testing.assert_close(text_losses(logits, ids, scored), expected[None])


def test_mirrored_deficits_keep_their_mean_and_change_sides():
    deficits = np.array([0.2, 0.4, 0.6]).reshape(3, 1, 1)
    np.testing.assert_allclose(_mirrored(deficits)[:, 0, 0], [0.6, 0.4, 0.2])


def test_perturbed_levels_reward_what_did_better(run: Run):
    subject = run.untrained(variants()["policy"])
    assert subject.modulator is not None
    predictor = subject.modulator.predictor
    assert isinstance(predictor, Predictor)
    policy = Perturbed(predictor, seed=0, step=3)
    ids = policy.grouped(torch.arange(12).view(4, 3))
    assert ids.shape == (GROUP, 3)
    assert (ids == ids[0]).all()
    hidden = torch.randn(GROUP, 6, subject.shape.width)
    positions, dial = torch.arange(6).expand(GROUP, -1), torch.full((GROUP,), 0.6)
    with policy:
        levels = predictor.release(0, hidden, positions, dial, {})
    assert not levels.requires_grad
    assert predictor.release(0, hidden, positions, dial, {}).requires_grad
    # Copies whose GABA was higher did better: it should rise, and so its deficit's offset fall.
    policy.loss(levels[..., 2].mean(1)).backward()
    assert predictor.offset.grad is not None
    assert predictor.offset.grad[0, 2] > 0


def test_release_is_as_before_after_a_perturbed_pass(run: Run):
    subject = run.untrained(variants()["policy"])
    assert subject.modulator is not None
    before = subject.modulator.predictor.release
    with Perturbed(subject.modulator.predictor, seed=0, step=0):  # type: ignore[arg-type]
        pass
    assert subject.modulator.predictor.release == before


def test_read_outs_learn_faster_than_the_decoder():
    assert faster("model.model.layers.0.mlp.up_proj.weight") == 1
    assert faster("modulator.predictor.weight") > 1
    assert faster("modulator.predictor.offset") > faster("modulator.predictor.weight")


def test_doses_are_what_they_say(out: Path, run: Run):
    rows = read_json(out / "records" / "doses" / "0.json")["result"]["rows"]
    row = next(r for r in rows if (r["transmitter"], r["dose"]) == ("dopamine", 0.5))
    subject = run.trained(variants()["transmitters"])
    assert subject.modulator is not None
    config = subject.modulator.predictor.config
    table = np.ones((config.n_layers, 3))
    table[:, 0] = 0.5
    levels = subject.modulator.with_levels(ConstantLevels(config, table))
    task, ids, scored = next(run.judged("test"))
    assert task == row["task"]
    with torch.no_grad(), attach(subject.model, ModulatorMethod(levels, 1.0, EVERYWHERE)):
        logits = subject.model(ids).logits
    np.testing.assert_allclose(text_losses(logits, ids, scored), row["losses"], atol=2e-5)


def test_a_fit_finds_the_slope_of_gains():
    rows = [
        {"parameters": 10**n, "budgets": [{"gain": {"by_seed": [0.1 * n, 0.1 * n]}}]}
        for n in (5, 6, 7)
    ]
    found = _fit(rows, 0, 0.7)
    assert found["slope"] == pytest.approx(0.1)
    assert found["at_a_million"] == pytest.approx(0.6)
    assert _fit(rows[:1], 0, 0.7)["slope"] is None


def test_variants_tell_what_their_training_depends_on():
    facts = variants()["transmitters"].facts
    assert "says" not in facts
    assert Variant(name="x", group="release", says="y").facts["predictor"] == "linear"
