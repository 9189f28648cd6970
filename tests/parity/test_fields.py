"""Each field of a Plan does what it says, by hand: one token, one layer, ordinary PyTorch hooks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import DECIDED, shape_of, tiny_model, tiny_modulator
from vesicle.families import find_family
from vesicle.families.base import LayerModules
from vesicle.nested import NestedWeight
from vesicle.plan import Plan, Replay, StandIns
from vesicle.reference.attach import attach

TOKEN, LAYER = 61, 1
KEPT, BITS = 20, 3
TOLERANCE = 1e-9  # of fp64 logits; the sums run in another order

Edit = tuple[str, int | None, int]
"""Field, site (None for fields without sites) and value, at `TOKEN` and `LAYER`."""

EDITS: dict[str, tuple[Edit, ...]] = {
    **{f"channels {site}": (("channels", site, KEPT),) for site in range(4)},
    **{f"bits {site}": (("bits", site, BITS),) for site in range(4)},
    "ffn skipped": (("ffn", None, 0),),
    "ffn small": (("ffn", None, 1),),
    "attention skipped": (("attention", None, 0),),
    "kv_blocks": (("kv_blocks", None, 2),),
}
EDITS["together"] = tuple(
    edit
    for name, edits in EDITS.items()
    if name.startswith(("channels", "bits", "kv_blocks"))
    for edit in edits
)
EDITS["skipped together"] = (*EDITS["together"], ("ffn", None, 1), ("attention", None, 0))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def planned(shape: Any, edits: tuple[Edit, ...]) -> Plan:
    """The resting Plan of 70 tokens but for `edits`."""
    plan = Plan.rest(shape, 70)
    for name, site, value in edits:
        values = getattr(plan, name).copy()
        values[(TOKEN, LAYER) if site is None else (TOKEN, LAYER, site)] = value
        plan = plan.with_fields(**{name: values})
    plan.check(shape)
    return plan


def with_row(x: Tensor, row: Tensor) -> Tensor:
    """x (1, T, ...) with its row `TOKEN` replaced."""
    result = x.clone()
    result[:, TOKEN] = row
    return result


def largest(x: Tensor, count: int) -> Tensor:
    """The token's row with all but its `count` largest channels zeroed."""
    row = x[:, TOKEN]
    keep = row.abs().topk(count, dim=-1).indices
    return torch.zeros_like(row).scatter(-1, keep, row.gather(-1, keep))


def by_hand(model: Any, ids: Tensor, edits: tuple[Edit, ...], stand_ins: StandIns) -> Tensor:
    """Logits of the model with hooks that do what the edits say."""
    family = find_family(model.config)
    modules = family.modules(family.layers(model)[LAYER])
    given = {(name, site): value for name, site, value in edits}
    sites = (modules.query_key_value, (modules.out,), modules.ffn_in, (modules.ffn_out,))
    with ExitStack() as stack:

        def hook(
            register: Callable[..., Any], function: Callable[..., Any], **settings: Any
        ) -> None:
            stack.callback(register(function, **settings).remove)

        for site, linears in enumerate(sites):
            for linear in linears:
                if ("channels", site) in given:
                    hook(linear.register_forward_pre_hook, fewer_channels)
                if ("bits", site) in given:
                    hook(linear.register_forward_hook, fewer_bits)
        if given.get(("kv_blocks", None)):
            hook(modules.attention.register_forward_pre_hook, first_and_own, with_kwargs=True)
        replace_modules(modules, given, stand_ins, hook)
        return model(ids).logits


def fewer_channels(module: nn.Linear, args: tuple[Tensor]) -> Tensor:
    return with_row(args[0], largest(args[0], KEPT))


def fewer_bits(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> Tensor:
    weight = NestedWeight.quantize(module.weight.t()).dequantize(BITS).double()
    row = args[0][:, TOKEN] @ weight
    return with_row(output, row if module.bias is None else row + module.bias)


def first_and_own(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    config = module.config
    every = config.sliding_window if config.model_type == "mistral" else None
    if window := getattr(module, "sliding_window", every):  # shows no first block, half a second
        mask = mask.triu(1 - window)
        mask[TOKEN, :32] = False
    else:
        mask[TOKEN, 16 : TOKEN // 16 * 16] = False
    if module.config._attn_implementation == "eager":
        mask = torch.zeros(70, 70, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return args, {**kwargs, "attention_mask": mask[None, None]}


def replace_modules(
    modules: LayerModules,
    given: dict[tuple[str, int | None], int],
    stand_ins: StandIns,
    hook: Callable[..., None],
) -> None:
    """Send the token to stand-ins; their input is the module's own, with every channel.

    They give what is added to the residual stream.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = args[0] if args else kwargs["hidden_states"]

    def small(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        row = stand_ins.ffn.apply_layer(LAYER, inputs[modules.ffn][:, TOKEN])
        return with_row(output, row if given["ffn", None] == 1 else torch.zeros_like(row))

    def skip(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        row = stand_ins.attention.apply_layer(LAYER, inputs[modules.attention][:, TOKEN])
        if isinstance(output, Tensor):
            return with_row(output, row)
        return (with_row(output[0], row), *output[1:])

    for module, end, function, field in (
        (modules.ffn, modules.ffn_end, small, "ffn"),
        (modules.attention, modules.attention_end, skip, "attention"),
    ):
        hook(module.register_forward_pre_hook, keep_input, with_kwargs=True)
        if (field, None) in given:
            hook(end.register_forward_hook, function)


def test_every_field_is_edited():
    assert {edit[0] for edits in EDITS.values() for edit in edits} == set(DECIDED)
    assert {name for name, _, _ in EDITS["together"]} == {"channels", "bits", "kv_blocks"}


@pytest.mark.parametrize("name", list(EDITS))
def test_a_field_does_what_it_says(variant: tuple[str, str], ids: Tensor, name: str):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    shape = shape_of(model)
    stand_ins = tiny_modulator(shape).stand_ins
    own = model(ids).logits
    with attach(model, Replay(planned(shape, EDITS[name]), stand_ins)):
        logits = model(ids).logits
    # In eager mode softmax runs in fp32, but in fp64 where blocks are chosen.
    tolerance = 1e-4 if attention == "eager" and "kv_blocks" in str(EDITS[name]) else TOLERANCE
    difference = (logits - by_hand(model, ids, EDITS[name], stand_ins)).abs().amax((0, 2))
    assert difference.max() < tolerance, f"{difference.max():.2e} at token {difference.argmax()}"
    moved = (logits - own).abs().amax((0, 2))
    assert moved[:TOKEN].max() < tolerance
    assert moved[TOKEN] > 0.01
    assert moved[TOKEN + 1 :].min() > 1e-6  # through the next layer's keys and values


@pytest.mark.parametrize("name", ["channels 2", "channels 3", "ffn small", "channels 1"])
def test_in_the_last_layer_other_tokens_do_not_notice(llama: Any, ids: Tensor, name: str):
    shape = shape_of(llama)
    plan = planned(shape, EDITS[name])
    last = Plan.of(
        **{n: np.roll(getattr(plan, n), 1, axis=1) for n in DECIDED}  # layer 1 becomes layer 2
    )
    own = llama(ids).logits
    with attach(llama, Replay(last, tiny_modulator(shape).stand_ins)):
        moved = (llama(ids).logits - own).abs().amax((0, 2))
    assert moved[TOKEN] > 0.01
    assert moved[:TOKEN].max() == 0
    assert moved[TOKEN + 1 :].max() == 0
