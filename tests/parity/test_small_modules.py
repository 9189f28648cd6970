"""Small modules of all kinds: the same from the reference, the engine and the native core."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.engine.decoding import IDS, native, read
from tests.parity.test_engine import FP64, close, counted, executed, reference
from tests.tiny import random_plan, randomise, shape_of, tiny_modulator
from vesicle.cost import price
from vesicle.engine import Engine, core
from vesicle.engine.packed import PackedWeight
from vesicle.engine.small_codes import grid_of, round_to_codes, rounded
from vesicle.errors import VesicleError
from vesicle.families import find_family
from vesicle.modulator import Modulator
from vesicle.plan import Method, Plan, Replay, StandIns
from vesicle.reference.attach import attach
from vesicle.shapes import ModelShape
from vesicle.small_modules import LowRankMaps, SmallFfn, SmallModule

needs_core = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Halves(SmallModule):
    """Of somebody else's making: half of its input."""

    weights = 7
    size: ClassVar = {}

    def apply_layer(self, layer: int, x: Tensor) -> Tensor:
        return x / 2


def small_ffn(
    shape: ModelShape,
    units: int = 5,
    activation: str = "silu",
    seed: int = 0,
    *,
    coded: bool = False,
) -> Any:
    small = SmallFfn(shape.n_layers, shape.width, units, activation=activation, gated=shape.gated)
    randomise(small, seed)
    if coded:
        round_to_codes(small)
    return small


def low_rank(shape: ModelShape, rank: int = 3) -> LowRankMaps:
    maps = LowRankMaps(shape.n_layers, shape.width, rank)
    randomise(maps, 1)
    return maps


def plan_for(shape: ModelShape) -> Plan:
    plan = random_plan(shape, 160, np.random.default_rng(3))
    if shape.stored_bits is None:
        return plan.with_fields(bits=np.full_like(plan.bits, 16))
    return plan


def replay(shape: ModelShape, ffn: SmallModule | None, attention: SmallModule | None) -> Method:
    return Replay(plan_for(shape), StandIns(ffn=ffn, attention=attention))


def test_every_family(model: Any, ids: Tensor):
    """In place of the FFN, and in place of attention."""
    shape = shape_of(model)
    activation = find_family(model.config).decoder_config(model.config).activation
    small, other = (small_ffn(shape, 5, activation, seed).double() for seed in (0, 1))
    method = replay(shape, small, other)
    engine = Engine.from_model(model)
    logits, sequence = executed(engine, ids, method, (30,))
    close(logits, reference(model, ids, method)[0], FP64)
    counted(sequence, engine)
    without = replay(shape, None, other)
    assert (logits - reference(model, ids, without)[0]).abs().mean() > 0.01


NATIVE = [("int4", "fp16"), ("int8", "int8"), ("fp32", "fp32"), ("bf16", "fp32")]


@needs_core
@pytest.mark.parametrize(("weights", "kv"), NATIVE)
@pytest.mark.parametrize("coded", [False, True], ids=["dense", "coded"])
def test_the_core_runs_them_whatever_the_cut(weights: str, kv: str, coded: bool):
    engine = native(weights, kv)
    small = small_ffn(engine.shape, 150 if coded else 5, coded=coded)
    method = replay(engine.shape, small, low_rank(engine.shape))
    assert engine._native is not None
    assert engine._native.reach(engine.start(method)) > 0
    whole, logits = read(engine, method, [100])
    for sizes in ([1] * 100, [17, 50, 1, 32]):
        cut, again = read(engine, method, sizes)
        assert torch.equal(again, logits)
        assert cut.cost == whole.cost
    counted(whole, engine)


@needs_core
@pytest.mark.parametrize("units", [1, 40, 200])
def test_the_core_computes_what_pytorch_does(units: int):
    engine, without = native("fp32"), native("fp32")
    without._native = None
    shape = engine.shape
    every = np.broadcast_to(np.arange(160, dtype=np.int32)[:, None] // 16 + 1, (160, 4))
    plan = plan_for(shape).with_fields(kv_blocks=every)
    small = StandIns(ffn=small_ffn(shape, units), attention=low_rank(shape))
    _, logits = read(engine, Replay(plan, small), [100])
    _, expected = read(without, Replay(plan, small), [100])
    assert (logits - expected).abs().max() < 2e-3 * expected.abs().max()


@needs_core
@pytest.mark.parametrize("units", [1, 40, 200])
def test_the_core_computes_codes_as_pytorch_does(units: int):
    engine, without = native("int4"), native("int4")
    without._native = None
    shape = engine.shape
    ffn = np.random.default_rng(1).integers(1, 3, (160, shape.n_layers), np.int32)
    # Without attention no token sees what became of another.
    plan = Plan.rest(shape, 160).with_fields(ffn=ffn, attention=np.zeros_like(ffn))
    method = Replay(plan, StandIns(ffn=small_ffn(shape, units, coded=True)))
    one, logits = read(engine, method, [100])
    other, expected = read(without, method, [100])
    apart = (logits - expected).abs().amax(1) / expected.abs().amax(1)
    # Where an activation lies between two codes, the last bit of a sum decides.
    assert (apart < 1e-5).sum() >= 95
    assert apart.max() < 0.05
    assert one.cost == other.cost
    counted(other, without)


def test_coded_ffns_in_place_of_attention_are_read_as_they_are():
    engine = native("int4")
    shape = engine.shape
    method = replay(shape, None, small_ffn(shape, coded=True))
    sequence, _ = read(engine, method, [50])
    counted(sequence, engine)


@needs_core
@pytest.mark.parametrize("units", [1, 40, 200])
def test_codes_give_what_their_weights_give(units: int):
    """But for activations, which are rounded to 8 bits beside codes as they are in the model."""
    engine = native("int4")
    shape = engine.shape
    ffn = np.ones((160, shape.n_layers), np.int32)
    plan = Plan.rest(shape, 160).with_fields(ffn=ffn)
    small = small_ffn(shape, units, coded=True)
    _, coded = read(engine, Replay(plan, StandIns(ffn=small)), [100])
    cost = price(plan, shape, Replay(plan, StandIns(ffn=small)).overhead(shape))
    small.bits = None
    _, dense = read(engine, Replay(plan, StandIns(ffn=small)), [100])
    assert not torch.equal(coded, dense)
    assert (coded - dense).square().mean() < 5e-3 * dense.square().mean()
    more = price(plan, shape, Replay(plan, StandIns(ffn=small)).overhead(shape))
    saved = 160 * shape.n_layers * small.weights
    assert more.weight_bytes - cost.weight_bytes == 160 * (
        4 * saved // 160 - 5 * (saved // 160) // 8
    )


@pytest.mark.parametrize("n_in", [32, 40, 576])
def test_codes_hold_in_bf16_and_are_found_again(n_in: int):
    weight = torch.randn(70, n_in) * torch.logspace(-3, 0, 70)[:, None]
    weight[3] = weight[3].abs()
    weight[4] = 0
    weight[5, 1:] = 0
    near = rounded(weight)
    assert torch.equal(near, near.bfloat16().float())
    grid = grid_of(near)
    packed = PackedWeight.pack(near, 4, grid=grid)
    assert packed.exact
    assert torch.equal(packed.dequantize(16).T, near)
    tiny = rounded(weight * 2e-4)
    assert (tiny - weight * 2e-4).square().mean() < 0.02 * (weight * 2e-4).square().mean()
    best = PackedWeight.pack(weight, 4).dequantize(16).T  # which need not lie in bf16
    assert (near - weight).square().mean() < 1.5 * (best - weight).square().mean()


def test_weights_on_no_grid_are_told():
    with pytest.raises(VesicleError, match="do not lie on a grid of those"):
        grid_of(torch.randn(8, 64))


@needs_core
def test_company_of_other_kinds_changes_nothing():
    engine = native("int4")
    shape = engine.shape
    methods = [
        replay(shape, small_ffn(shape, 5), low_rank(shape)),
        replay(shape, small_ffn(shape, 150, seed=4), None),
        replay(shape, small_ffn(shape, 90, seed=5, coded=True), None),
        replay(shape, small_ffn(shape, 200, seed=6, coded=True), low_rank(shape)),
        replay(shape, low_rank(shape, 7), low_rank(shape)),
        replay(shape, None, low_rank(shape)),
    ]
    methods.append(methods[0])
    alone = [read(engine, method, [20, 1, 1])[1] for method in methods]
    sequences, at, rows = [engine.start(method) for method in methods], 0, []
    for size in (20, 1, 1):
        rows.append(engine.forward([(s, IDS[at : at + size]) for s in sequences], "all"))
        at += size
    for i, expected in enumerate(alone):
        assert torch.equal(torch.cat([part[i] for part in rows]), expected)


@needs_core
@pytest.mark.parametrize("kind", ["custom", "ffn for attention", "gelu"])
def test_what_the_core_does_not_know_runs_in_pytorch(kind: str):
    engine = native("int4")
    shape = engine.shape
    ffn: SmallModule = small_ffn(shape)
    attention: SmallModule = low_rank(shape)
    match kind:
        case "custom":
            ffn = Halves()
        case "gelu":
            ffn = small_ffn(shape, activation="gelu")
        case _:
            attention = small_ffn(shape)
    method = replay(shape, ffn, attention)
    assert engine._native is not None
    assert engine._native.reach(engine.start(method)) == 0
    sequence, logits = read(engine, method, [50])
    counted(sequence, engine)
    assert logits.isfinite().all()


@needs_core
def test_a_kind_that_changes_is_followed():
    """What the core computes is asked of what is there now, not of what was."""
    engine = native("int4")
    assert engine._native is not None
    small = small_ffn(engine.shape)
    sequence = engine.start(replay(engine.shape, small, None))
    engine.forward([(sequence, IDS[:10])])
    assert engine._native.reach(sequence) > 0
    small.activation = "relu"
    assert engine._native.reach(sequence) == 0
    small.activation = "silu"
    assert engine._native.reach(sequence) > 0


@needs_core
def test_weights_that_are_replaced_are_followed():
    engine = native("int4")
    small = small_ffn(engine.shape)
    method = replay(engine.shape, small, None)
    logits = read(engine, method, [20])[1]
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:10])])
    small.ffn_in.data, small.ffn_out.data = 2 * small.ffn_in.data, 3 * small.ffn_out.data
    assert not torch.equal(engine.forward([(sequence, IDS[10:20])], "all")[0], logits[10:])
    small.ffn_in.data, small.ffn_out.data = small.ffn_in.data / 2, small.ffn_out.data / 3
    close(read(engine, method, [20])[1], logits, 1e-3)


@needs_core
def test_codes_follow_what_is_written():
    engine = native("int4")
    small = small_ffn(engine.shape, coded=True)
    method = replay(engine.shape, small, None)
    sequence, other = engine.start(method), engine.start(method)
    first = engine.forward([(sequence, IDS[:10])], "all")[0]
    small.ffn_out.mul_(2)  # on a grid still
    assert not torch.equal(engine.forward([(other, IDS[:10])], "all")[0], first)
    with torch.inference_mode():  # nobody counts what is written to such weights
        made = small_ffn(engine.shape, coded=True)
    read(engine, replay(engine.shape, made, None), [20])
    small.ffn_out.add_(0.1234567)
    with pytest.raises(VesicleError, match="do not lie on a grid of those"):
        engine.forward([(other, IDS[10:12])])


def test_a_modulator_keeps_them(llama: Any, tmp_path: Path):
    shape = shape_of(llama)
    modulator = tiny_modulator(shape)
    small = small_ffn(shape)
    for parameter in small.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as it is saved
    modulator.ffn_standin = small
    modulator.save_pretrained(tmp_path)
    loaded = Modulator.from_pretrained(tmp_path)
    form = {"kind": "ffn", "units": 5, "activation": "silu", "gated": True}
    assert loaded.ffn_standin.size == small.size == form
    assert torch.equal(loaded.ffn_standin.ffn_in, small.ffn_in)
    assert isinstance(loaded.attention_standin, LowRankMaps)
    text = (tmp_path / "modulator.json").read_text()
    (tmp_path / "modulator.json").write_text(text.replace('"ffn",', '"huge",'))
    with pytest.raises(VesicleError, match="kind of small module is 'huge'; allowed: low-rank"):
        Modulator.from_pretrained(tmp_path)


@pytest.mark.parametrize("units", [0, -1, 2.5, True, "x"])
def test_units_are_checked(units: Any):
    with pytest.raises(ValueError, match="hidden units; allowed: 1 and above"):
        SmallFfn(2, 8, units)


def test_forms_are_checked():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: silu"):
        SmallFfn(2, 8, 1, activation="tanh")
    with pytest.raises(ValueError, match="gated is 'no'; allowed: true, false"):
        SmallFfn(2, 8, 1, gated="no")  # type: ignore[arg-type]


def test_an_activation_that_is_set_later_is_checked(llama: Any):
    small = small_ffn(shape_of(llama))
    small.activation = "tanh"
    with pytest.raises(VesicleError, match="activation is 'tanh'; allowed: silu"):
        Engine.from_model(llama).start(replay(shape_of(llama), small, None))


def misfits(shape: ModelShape) -> dict[str, SmallModule]:
    layers, width = shape.n_layers, shape.width
    odd = SmallFfn(layers, width, 6)
    odd.ffn_in.data = torch.zeros(layers, width, 11)
    return {
        "layers": SmallFfn(layers - 1, width, 6),
        "more layers": SmallFfn(layers + 1, width, 6),
        "width": SmallFfn(layers, width // 2, 6),
        "odd": odd,
        "nowhere": SmallFfn(layers, width, 6).to("meta"),
        "complex": SmallFfn(layers, width, 6).to(torch.complex64),
        "maps' layers": LowRankMaps(layers - 1, width, 4),
        "maps' width": LowRankMaps(layers, width // 2, 4),
    }


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize(
    "name",
    ["layers", "more layers", "width", "odd", "nowhere", "complex", "maps' layers", "maps' width"],
)
@pytest.mark.parametrize("place", ["ffn", "attention"])
def test_what_does_not_fit_is_refused_wherever_it_is_brought(llama: Any, name: str, place: str):
    """Before anything is read beyond its end."""
    shape = shape_of(llama)
    module = misfits(shape)[name]
    method = Replay(plan_for(shape), StandIns(**{place: module}))
    line = r"ffn_in of a SmallFfn (has shape|is)|down of a LowRankMaps has shape"
    with pytest.raises(VesicleError, match=line):
        Engine.from_model(llama).start(method)
    with pytest.raises(VesicleError, match=line):
        attach(llama, method)
    good = tiny_modulator(shape)
    with pytest.raises(VesicleError, match=line):
        Modulator(good.predictor, good.effectors, good.info, **{f"{place}_standin": module})


@needs_core
def test_what_is_replaced_by_something_that_does_not_fit_is_refused():
    engine = native("int4")
    small = small_ffn(engine.shape)
    sequence = engine.start(replay(engine.shape, small, None))
    engine.forward([(sequence, IDS[:10])])
    small.ffn_out.data = small.ffn_out.data[:2].clone()
    with pytest.raises(VesicleError, match="ffn_out of a SmallFfn has shape"):
        engine.forward([(sequence, IDS[10:20])])


class Mine(SmallFfn):
    pass


@pytest.mark.parametrize("wrong", ["own", "subclass", "nan", "size"])
def test_nothing_is_saved_that_cannot_be_read(llama: Any, tmp_path: Path, wrong: str):
    shape = shape_of(llama)
    modulator, small = tiny_modulator(shape), small_ffn(shape)
    match wrong:
        case "own":
            small = Halves()
        case "subclass":
            small = Mine(shape.n_layers, shape.width, 3)
        case "nan":
            small.ffn_out.data[0, 0, 0] = torch.nan
        case _:
            small = SmallFfn(shape.n_layers + 1, shape.width, 3)
    modulator.ffn_standin = small
    with pytest.raises(VesicleError, match=r"cannot be saved|not finite|has shape"):
        modulator.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
