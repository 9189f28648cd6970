"""A trained duo model as what Plans are executed with: a plain model, and its small modules.

So the reference and the engine run the choices that are made here, as a Plan's field `ffn`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from vesicle.small_modules import SmallFfn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def parted(model: LlamaForCausalLM) -> tuple[LlamaForCausalLM, SmallFfn]:
    """A copy of a duo model with its big FFNs alone, and the small ones."""
    plain = deepcopy(model)
    layers: list[Any] = list(plain.model.layers)
    units, width = layers[0].mlp.small.gate.weight.shape
    found = SmallFfn(len(layers), width, units)
    for number, layer in enumerate(layers):
        small = layer.mlp.small
        found.ffn_in[number] = torch.cat([small.gate.weight, small.up.weight]).T
        found.ffn_out[number] = small.down.weight.T
        layer.mlp = layer.mlp.big
    return plain, found
