"""What the FFNs of a pretrained model are given and give on text, by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.families import find_family


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one layer's FFN, over N tokens.

    Attributes:
        x: (N, D) its normed input.
        y: (N, D) what it adds to the residual stream.
        weight: (N, 1) how much an error counts: 1 / |r|², r the residual stream after it. The next
            norm divides by |r|, so that is what later layers see of an error.
    """

    x: Tensor
    y: Tensor
    weight: Tensor


Read = Callable[[Tensor], list[Seen]]
"""From windows (B, T) of token ids to what each layer's FFN saw of them."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Read]:
    """Listen to the FFNs of a Hugging Face causal LM inside the block.

    The first position of each window is left out: models park outliers there.
    """
    family = find_family(model.config)
    device = next(model.parameters()).device
    before: dict[int, Tensor] = {}
    given: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}
    handles = []

    def keep_first(kept: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[layer] = args[0]

        return hook

    def keep_output(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            added[layer] = output

        return hook

    @torch.no_grad()
    def read(windows: Tensor) -> list[Seen]:
        model(windows.to(device), use_cache=False, logits_to_keep=1)
        found = []
        for layer in range(len(given)):
            x, y, start = (kept[layer][:, 1:].flatten(0, 1) for kept in (given, added, before))
            length = (start + y).square().sum(-1, keepdim=True)
            found.append(Seen(x=x, y=y, weight=length.clamp_min(1e-12).reciprocal()))
        return found

    try:
        for number, layer in enumerate(family.layers(model)):
            parts = family.modules(layer)
            handles += [
                parts.ffn_norm.register_forward_pre_hook(keep_first(before, number)),
                parts.ffn.register_forward_pre_hook(keep_first(given, number)),
                parts.ffn_end.register_forward_hook(keep_output(number)),
            ]
        yield read
    finally:
        for handle in handles:
            handle.remove()
