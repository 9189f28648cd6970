"""The residual stream of a Hugging Face causal LM, and the layers as functions between its parts.

`stream` runs the model once over windows and gives, from one layer on, what each layer is given,
and what the final norm is given; and each layer as a function of that, all else as it was (masks,
rotary phases), so that it can be differentiated. Attention to other positions is a part of it.

After the last layer comes the function to the logits, less their mean over the vocabulary, which
changes no probability. They are told in D coordinates: with head weight H (V, D), its rows less
their mean, z = (Hᵀ H)^1/2 norm(x) has the lengths and angles of those logits, so nothing is lost,
and features need no V numbers each. Where a model caps its logits, those before the cap are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.engine.linear import normalise
from vesicle.errors import ModelError
from vesicle.families import find_family
from vesicle.neurons.basis.local_interaction import Section
from vesicle.neurons.basis.pca import descending


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Of windows (B, T).

    Attributes:
        layers: (B, T, D) what each layer is given, from `first` on, then what the final norm is
            given, then the logits in D coordinates.
        sections: What lies between adjacent ones.
        first: Number of the first layer.
    """

    layers: tuple[Tensor, ...]
    sections: tuple[Section, ...]
    first: int


@torch.no_grad()
def stream(model: nn.Module, windows: Tensor, first: int, last: Section) -> Stream:
    """Run the model once.

    Args:
        model: A Hugging Face causal LM, its attention differentiable (`differentiable`).
        windows: (B, T) token ids.
        first: Number of the first layer wanted.
        last: From `logits_of`.
    """
    blocks = list(find_family(model.config).layers(model))[first:]
    given: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
    left: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args[0].detach(), args[1:], kwargs))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda m, a, out: left.append(_hidden(out))))
    try:
        model(windows, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    sections = [
        _section(block, args, kwargs)
        for block, (_, args, kwargs) in zip(blocks, given, strict=True)
    ]
    layers = [*(x for x, _, _ in given), left[0]]
    return Stream(layers=(*layers, last(layers[-1])), sections=(*sections, last), first=first)


@torch.no_grad()
def logits_of(model: nn.Module) -> Section:
    """From what the final norm is given to the logits in D coordinates."""
    family = find_family(model.config)
    config = family.decoder_config(model.config)
    tensors = family.model_tensors(dict(model.named_parameters(remove_duplicate=False)).get)
    head, norm = tensors.head.float(), tensors.final_norm
    centred = head - head.mean(0)
    values, vectors = descending((centred.mT @ centred).double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT

    def section(x: Tensor) -> Tensor:
        weight = norm.weight.detach().to(x.dtype)
        bias = None if norm.bias is None else norm.bias.detach().to(x.dtype)
        return normalise(x, weight, bias, config.norm_eps, config.rms_norm) @ root.to(x.dtype)

    return section


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """Have attention in plain operations inside the block: others lack forward derivatives.

    Raises:
        ModelError: The model's weights are in half precision, which differences do not survive.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"the model's weights are {dtype}; allowed: float32 or float64")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def replaced_input(
    model: nn.Module, layer: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Change what a layer is given, (B, T, D), inside the block."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    block = find_family(model.config).layers(model)[layer]
    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _section(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Section:
    return lambda x: _hidden(block(x, *args, **kwargs))


def _hidden(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found
