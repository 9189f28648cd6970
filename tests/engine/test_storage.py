"""What the native core points to stays where it is, and is followed where it moves."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.decoding import IDS, beside, modulator_for, native
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.rotary import STRIDE
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.plan import FFN_SMALL, Plan, Replay

START = 20

pytestmark = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


def replaced(module: nn.Module) -> None:
    """Every parameter becomes another object with other numbers."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            new = nn.Parameter(parameter.detach().clone() * 0.5, requires_grad=False)
            setattr(part, name, new)


def moved(module: nn.Module) -> None:
    """To another format and back, by which the old storage is freed."""
    module.double()
    module.float()


def loaded(module: nn.Module) -> None:
    """Other numbers in the old place."""
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})


def assigned(module: nn.Module) -> None:
    """Other numbers, in tensors of the caller's."""
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()}, assign=True)


def exchanged(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def turned(module: nn.Module) -> None:
    """Not contiguous: the core cannot read it where it lies."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.mT.contiguous().mT


def doubled(module: nn.Module) -> None:
    """A format that the core does not read."""
    module.double()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    change.__name__: change
    for change in (replaced, moved, loaded, assigned, exchanged, turned, doubled)
}


def churn() -> list[Tensor]:
    """Take what was freed, and fill it."""
    gc.collect()
    return [torch.full((n,), 1e3) for n in (64, 128, 512, 1024, 4096, 24576) for _ in range(50)]


def method_of(kind: str, modulator: Modulator) -> Any:
    if kind == "modulator":
        return ModulatorMethod(modulator, 0.5)
    plan = Plan.rest(native("fp32").shape, 100)
    plan.ffn[:, 1], plan.attention[:, 2] = FFN_SMALL, 0
    return Replay(plan, modulator.stand_ins)


def decode(engine: Engine, method: Any, module: nn.Module, change: Any) -> tuple[Tensor, Sequence]:
    """Some tokens, a change between two of them, and some more."""
    sequence = engine.start(method)
    engine.forward([(sequence, IDS[:START])], "none")
    rows = [engine.forward([(sequence, [token])])[0] for token in IDS[START : START + 6]]
    change(module)
    filled = churn()
    rows += [engine.forward([(sequence, [token])])[0] for token in IDS[START + 6 : START + 12]]
    del filled
    return torch.cat(rows), sequence


@pytest.mark.parametrize("kind", ["modulator", "replay"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_change_between_steps(change: str, kind: str):
    """The core goes on with what the general path goes on with."""
    engine = native("fp32")
    other = beside(engine, "fp32")
    first = modulator_for(engine.shape, "stand-ins")
    second = copy.deepcopy(first)
    got, sequence = decode(engine, method_of(kind, first), first, CHANGES[change])
    expected, general = decode(other, method_of(kind, second), second, CHANGES[change])
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    assert sequence.plan.equals(general.plan)
    np.testing.assert_allclose(sequence.levels, general.levels, atol=3e-6)


@pytest.mark.parametrize("kind", ["modulator", "replay"])
def test_names_that_are_deleted_between_steps(kind: str):
    """The sequence holds what it points to, whoever else lets go of it."""
    engine = native("fp32")

    def begun() -> Sequence:
        sequence = engine.start(method_of(kind, modulator_for(engine.shape, "stand-ins")))
        engine.forward([(sequence, IDS[:START])], "none")
        engine.forward([(sequence, [IDS[START]])])
        return sequence

    with closing(begun()) as sequence, closing(begun()) as untouched:
        expected = engine.forward([(untouched, [IDS[START]])])[0]
        sequence.method = None
        filled = churn()
        assert torch.equal(engine.forward([(sequence, [IDS[START]])])[0], expected)
        del filled


def test_what_is_pointed_to_is_held():
    """No pointer outlives its tensor: parameters that were thrown away are held until followed."""
    engine = native("fp32")
    modulator = modulator_for(engine.shape, "stand-ins")
    with closing(engine.start(ModulatorMethod(modulator, 0.5))) as sequence:
        engine.forward([(sequence, IDS[:START])], "none")
        engine.forward([(sequence, [IDS[START]])])
        slot = sequence.buffer()
        pointers = {
            slot._modulator.weight,
            slot._modulator.offset,
            slot._modulator.log_slope,
            slot._modulator.place_weight,
            *(getattr(slot._small_ffn, name) for name in ("down", "up", "bias")),
            *(getattr(slot._small_attention, name) for name in ("down", "up", "bias")),
        }
        replaced(modulator)
        churn()
        held = {tensor.data_ptr() for tensor in (*slot._predictor, *slot._small)}
        assert pointers == held
        engine.forward([(sequence, [IDS[START]])])
        now = {tensor.data_ptr() for tensor in (*slot._predictor, *slot._small)}
        assert not now & held
        lies = {p.data_ptr() for name, p in modulator.named_parameters()}
        assert now == lies


def test_phases_are_kept_of_the_positions_at_hand_alone():
    """Those of a whole window took more memory than a windowed model's cache."""
    engine = native("fp32")
    rotary, sequence = engine._native._rotaries[0], engine.start()
    seen = []
    for n in (STRIDE - 1, 1, 2, STRIDE, STRIDE - 2, 100):
        engine.forward([(sequence, (IDS * 4)[:n])], "none")
        (table,) = sequence.buffer()._rotations
        end = sequence.length
        assert table.start < end <= table.start + 2 * STRIDE
        at = rotary.at(np.arange(table.start, end, dtype=np.int32))
        for kept, made in zip((table.cos, table.sin), at, strict=True):
            assert torch.equal(kept[: end - table.start], made)
        seen.append(weakref.ref(table))
    del table, sequence
    gc.collect()
    assert not any(table() for table in seen)


@pytest.mark.parametrize("lengths", [(10, 256), (256, 10), (300, 511, 20)])
def test_rows_of_a_batch_that_reaches_further(lengths: tuple[int, ...]):
    """The table of phases grew once while the first tokens of a batch pointed into the old one."""
    engine = native("fp32")
    sequences = [engine.start() for _ in lengths]
    for sequence, n in zip(sequences, lengths, strict=True):
        engine.forward([(sequence, (IDS * 4)[:n])], "none")
    rotary = engine._native._rotaries[0]
    logits = engine.forward([(s, [IDS[n % 50]]) for s, n in zip(sequences, lengths, strict=True)])
    assert {n // STRIDE * STRIDE for n in lengths} <= set(rotary._tables)
    for row, n in zip(logits, lengths, strict=True):
        alone = engine.start()
        engine.forward([(alone, (IDS * 4)[:n])], "none")
        assert torch.equal(row, engine.forward([(alone, [IDS[n % 50]])])[0])
