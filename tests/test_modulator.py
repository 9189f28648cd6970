import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_control, tiny_model, tiny_modulator, tokens
from vesicle.effectors import EFFECTORS
from vesicle.errors import ModelError, VesicleError
from vesicle.modulator import Modulator, ModulatorInfo
from vesicle.plan import FloatArray, Plan, Rows, numbers, resting_rows
from vesicle.predictors import CONTROLS, PREDICTORS
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape
from vesicle.transmitters import NAMES, index


def plan_of(modulator: Modulator, budget: float = 0.6) -> Plan:
    with torch.no_grad(), attach(tiny_model("llama"), modulator, budget) as run:
        run.model(tokens(70))
    return run.plan


@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_saved_and_loaded_it_writes_the_same_plans(shape: ModelShape, kind: str, tmp_path: Path):
    modulator = tiny_modulator(
        shape, kind, ladder=True, bypass_below=0.2, summary="bounds", dtype=torch.float32
    )
    modulator.info.dial = [(0.1, 0.2), (0.6, 0.5), (1.0, 1.0)]
    modulator.info.default_budget = 0.8
    modulator.info.training = {"steps": 3, "note": "µ"}
    modulator.save_pretrained(tmp_path / "new" / "a")
    loaded = Modulator.from_pretrained(tmp_path / "new" / "a")
    assert loaded.info == modulator.info
    assert loaded.effectors == modulator.effectors
    assert loaded.predictor.config == modulator.predictor.config
    for name, tensor in modulator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert plan_of(loaded).equals(plan_of(modulator))
    loaded.save_pretrained(str(tmp_path / "b"))
    for name in ("modulator.json", "modulator.safetensors"):
        written = (tmp_path / "new" / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == written
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "modulator.json",
        "modulator.safetensors",
    }


def test_an_untrained_one_is_saved_too(shape: ModelShape, tmp_path: Path):
    Modulator.new(shape, model_name="tiny").save_pretrained(tmp_path)
    loaded = Modulator.from_pretrained(tmp_path)
    assert loaded.info == ModulatorInfo(model_name="tiny", model=shape.fingerprint())


def test_saving_is_small(tmp_path: Path):
    """About 3.5 MB for the default model with the default ranks: stand-ins are bfloat16."""
    shape = ModelShape(
        n_layers=30,
        width=576,
        n_heads=9,
        n_kv_heads=3,
        head_size=64,
        ffn_width=1536,
        gated=True,
        vocabulary=49152,
    )
    Modulator.new(shape).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    numbers = 30 * 576 * (2 * (32 + 16) + 2)
    assert size < 2 * numbers + 4 * 30 * 3 * (576 + 3) + 5000


@pytest.fixture
def saved(shape: ModelShape, tmp_path: Path) -> Path:
    tiny_modulator(shape, "mlp", dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "modulator.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refusal(folder: Path | str) -> str:
    with pytest.raises(VesicleError) as caught:
        Modulator.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) > 10
    return message


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda v: v.update(format="vesicle-modulator-9"), "is not a vesicle-mod"),
    "no predictor": (lambda v: v.pop("predictor"), "predictor"),
    "unknown predictor": (lambda v: v["predictor"].update(kind="oracle"), ", ".join(PREDICTORS)),
    "unknown predictor setting": (lambda v: v["predictor"].update(depth=3), "depth"),
    "unknown transmitter": (lambda v: v["predictor"].update(transmitters=["x"]), "'x'"),
    "released without effector": (
        lambda v: v["predictor"].update(transmitters=["dopamine", "noradrenaline"]),
        "noradrenaline",
    ),
    "hidden of 0": (lambda v: v["predictor"].update(hidden=0), "hidden is 0"),
    "hidden of text": (lambda v: v["predictor"].update(hidden="six"), ""),
    "other hidden": (lambda v: v["predictor"].update(hidden=7), "7"),
    "other width": (lambda v: v["predictor"].update(width=50), "50"),
    "predictor a list": (lambda v: v.update(predictor=[1, 2]), ""),
    "unknown effector": (
        lambda v: v["effectors"].update(cortisol={}),
        "no effector for 'cortisol'",
    ),
    "unknown effector setting": (
        lambda v: v["effectors"]["gaba"].update(colour=1),
        "unknown gaba setting 'colour'",
    ),
    "effector out of range": (lambda v: v["effectors"]["gaba"].update(least=0), "least is 0"),
    "effectors a list": (lambda v: v.update(effectors=["gaba"]), ""),
    "effector settings a list": (lambda v: v["effectors"].update(gaba=["least"]), ""),
    "no rank": (lambda v: v.pop("ffn_rank"), "ffn_rank"),
    "other rank": (lambda v: v.update(ffn_rank=6), "ffn_standin"),
    "negative rank": (lambda v: v.update(ffn_rank=-1), ""),
    "dial of text": (lambda v: v.update(dial=[["a", "b"]]), "a"),
    "dial a number": (lambda v: v.update(dial=3), ""),
    "budget of text": (lambda v: v.update(default_budget="half"), "half"),
    "unknown setting": (lambda v: v.update(colour=1), "unknown setting 'colour'"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_wrong_config_is_one_line(saved: Path, name: str):
    change, message = CHANGES[name]
    rewrite(saved, change)
    assert message in refusal(saved)


@pytest.mark.parametrize("text", ["", "not json", "[1]", "3", '{"format": 1}'])
def test_a_broken_config_is_one_line(saved: Path, text: str):
    (saved / "modulator.json").write_text(text)
    assert str(saved / "modulator.json") in refusal(saved)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "key", "other"])
def test_broken_weights_are_one_line(saved: Path, damage: str):
    from safetensors.torch import load_file, save_file

    path = saved / "modulator.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not weights")
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "key":
            del tensors["predictor.offset"]
            save_file(tensors, path)
        case "other":
            save_file({**tensors, "extra": torch.zeros(2)}, path)
    assert "modulator.safetensors" in refusal(saved)


def test_nothing_there_is_one_line(tmp_path: Path):
    assert "modulator.json" in refusal(tmp_path)
    # No such folder, and no name that a hub could have: nothing is fetched.
    assert "no modulator at" in refusal(str(tmp_path / "none"))


def test_a_hub_modulator(saved: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, id=repo_id)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert Modulator.from_pretrained("owner/name", revision="v1", token="secret")
    assert (asked["id"], asked["revision"], asked["token"]) == ("owner/name", "v1", "secret")
    assert sorted(asked["allow_patterns"]) == ["modulator.json", "modulator.safetensors"]
    with pytest.raises(VesicleError, match="a revision is of a hub id"):
        Modulator.from_pretrained(saved, revision="v1")


@pytest.mark.parametrize("name", ["modulator.json", "modulator.safetensors"])
def test_a_file_that_is_missing_is_named(saved: Path, name: str):
    (saved / name).unlink()
    assert refusal(saved).endswith(f"the folder has no {name}")
    (saved / "config.json").write_text("{}")
    assert refusal(saved).endswith(f"the folder has no {name}; it holds a model")
    assert "it is a file; accepted: a folder with modulator.json" in refusal(saved / "config.json")


def test_an_unwritable_folder_is_not_half_written(shape: ModelShape, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((VesicleError, OSError)):
        tiny_modulator(shape).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


SIZES = ["n_layers", "width", "n_heads", "n_kv_heads", "head_size", "ffn_width", "vocabulary"]


@pytest.mark.parametrize("size", SIZES)
def test_another_model_is_refused_by_its_first_other_size(shape: ModelShape, size: str):
    modulator = tiny_modulator(shape)
    other = replace(shape, **{size: 2 * getattr(shape, size)})
    with pytest.raises(ModelError) as caught:
        modulator.at(0.5).author(other)
    assert str(caught.value) == (
        f"this modulator was made for tiny with {size} {getattr(shape, size)}; "
        f"this model has {getattr(other, size)}"
    )


def test_number_formats_do_not_matter(shape: ModelShape):
    other = replace(
        shape,
        weight_bytes=2,
        kv_bytes=1,
        kv_scale_bytes=2,
        summary_bytes=2,
        stored_bits=4,
        head_bits=8,
    )
    tiny_modulator(shape).check_fits(other)
    with pytest.raises(ModelError, match="gated True; this model has False"):
        tiny_modulator(shape).check_fits(replace(shape, gated=False))


def test_the_head_follows_the_last_layers_dopamine(shape: ModelShape):
    modulator = tiny_modulator(shape)
    assert set(plan_of(modulator).head) == {0}
    hidden = torch.randn(30, 48, generator=torch.Generator().manual_seed(0)).double()
    positions = np.arange(30, dtype=np.int32)
    screening = replace(shape, weight_bytes=4, stored_bits=4, head_bits=8)

    def written(modulator: Modulator, budget: float) -> tuple[Rows, FloatArray]:
        author, rows = modulator.at(budget).author(screening), resting_rows(screening, positions)
        for layer in range(shape.n_layers):
            author.ffn(layer, hidden, positions, rows[:, layer])
        return rows["head"], author.levels[:, -1, index("dopamine")]

    heads, level = written(modulator, 0.6)
    assert (heads == 0).all()
    median = float(np.median(level))
    dopamine = replace(modulator.dopamine, head_survivors=5, head_below=median)
    screened = Modulator(
        modulator.predictor,
        {**modulator.effectors, "dopamine": dopamine},
        modulator.info,
        ffn_standin=modulator.ffn_standin,
        attention_standin=modulator.attention_standin,
    )
    heads, _ = written(screened, 0.6)
    assert heads[:, -1].tolist() == np.where(level < median, 5, 0).tolist()
    assert (heads[:, :-1] == 0).all()
    assert (written(screened, 1.0)[0] == 0).all()


def test_dial(shape: ModelShape):
    modulator = tiny_modulator(shape)
    modulator.info.dial = [(0.2, 0.1), (0.6, 0.5), (1.0, 0.9)]
    at = [modulator.dial(b) for b in (0.1, 0.2, 0.4, 0.6, 1.0)]
    assert at == pytest.approx([0.1, 0.1, 0.3, 0.5, 1.0])
    dials = [modulator.dial(b) for b in np.linspace(0.01, 1, 50)]
    assert dials == sorted(dials)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_budget_out_of_range_is_refused(shape: ModelShape, budget: float):
    with pytest.raises(VesicleError, match=rf"budget is {budget}; allowed: above 0, up to 1"):
        tiny_modulator(shape).at(budget)


def test_unknown_kinds_and_missing_effectors_are_refused(shape: ModelShape):
    with pytest.raises(VesicleError, match="predictor is 'oracle'; allowed: linear, mlp"):
        Modulator.new(shape, predictor="oracle")
    with pytest.raises(ValueError, match="'noradrenaline' is released but has no effector"):
        Modulator.new(shape, transmitters=("gaba", "noradrenaline"))


@pytest.mark.parametrize("released", [(name,) for name in EFFECTORS] + [("gaba", "dopamine")])
def test_those_not_released_rest(shape: ModelShape, released: tuple[str, ...]):
    modulator = tiny_modulator(shape, transmitters=released)
    hidden = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).double()
    positions = torch.arange(9).expand(2, 9)
    levels = modulator.release(1, hidden, positions, torch.tensor([0.5, 0.5]), {})
    assert levels.shape == (2, 9, 5)
    for name in NAMES:
        assert (levels[..., index(name)] == 1).all() == (name not in released)


@pytest.mark.parametrize("kind", list(CONTROLS))
def test_controls_share_everything_but_the_levels(shape: ModelShape, kind: str, tmp_path: Path):
    modulator = tiny_modulator(shape)
    control = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    assert control.effectors == modulator.effectors
    assert control.ffn_standin is modulator.ffn_standin
    plan = plan_of(control)
    plan.check(shape)
    assert not plan.equals(plan_of(modulator))
    assert not plan.equals(Plan.rest(shape, 70))
    with pytest.raises(VesicleError, match=f"a '{kind}' control cannot be saved"):
        control.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_overhead(shape: ModelShape):
    modulator = tiny_modulator(shape, "mlp", summary="bounds")
    overhead = modulator.at(0.5).overhead(shape)
    assert overhead.modulator_flops == modulator.predictor.flops
    assert overhead.modulator_bytes == 4 * modulator.predictor.weights_read
    weights = overhead.small_ffn_weights, overhead.small_attention_weights
    assert weights == (2 * shape.width * 5, 2 * shape.width * 4)
    assert overhead.selection_vectors == 2
    control = modulator.with_levels(tiny_control("constant", modulator.predictor.config))
    assert control.at(0.5).overhead(shape) == replace(
        overhead, modulator_flops=0, modulator_bytes=0
    )
    assert modulator.at(1.0).overhead(shape).modulator_flops == 0


def test_the_author_keeps_levels_as_released(shape: ModelShape):
    modulator = tiny_modulator(shape)
    author = modulator.at(0.6).author(shape)
    assert author.levels.shape == (0, 3, 5)
    hidden = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(0)).double()
    for start, stop in ((0, 12), (12, 20)):
        positions = np.arange(start, stop, dtype=np.int32)
        rows = resting_rows(shape, positions)
        for layer in range(3):
            author.attention(layer, positions, rows[:, layer])
            author.ffn(layer, hidden[0, start:stop], positions, rows[:, layer])
        rest = resting_rows(shape, positions)
        assert (numbers(rows)[:, 0, :2] == numbers(rest)[:, 0, :2]).all()
        assert (numbers(rows)[:, 1:, :2] != numbers(rest)[:, 1:, :2]).any()
    whole = modulator.release(2, hidden, torch.arange(20)[None], torch.tensor([0.6]), {})
    np.testing.assert_allclose(author.levels[:, 2], whole[0].detach().numpy(), rtol=0, atol=1e-6)
