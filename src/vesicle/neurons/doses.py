"""Dose and response: one transmitter held at a level everywhere, the others at rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vesicle.cost import price_dense
from vesicle.neurons.edits import clamp, lesion
from vesicle.neurons.hooks import Hooked
from vesicle.transmitters import index

DOSES = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)


@torch.no_grad()
def doses(
    hooked: Hooked, transmitter: str, texts: Tensor, levels: tuple[float, ...] = DOSES
) -> list[dict[str, Any]]:
    """What a transmitter alone does to loss and to executed cost.

    Args:
        hooked: A model with a modulator.
        transmitter: Of those that it releases.
        texts: (N, T) token ids.
        levels: At which it is held, in every layer and at every token.

    Returns:
        For each its dose, nats a token more than at rest, and the share of the dense FLOPs.
    """
    found = []
    base = None
    for level in levels:
        losses, spent, whole = [], 0, 0
        for text in texts:
            edits = []
            for layer in range(hooked.shape.n_layers):
                name = f"blocks.{layer}.hook_levels"
                edits += [lesion(name), clamp(name, index(transmitter), level)]
            seen = hooked.run(text[None], edits=edits)
            losses.append(float(cross_entropy(seen.logits[0, :-1].float(), text[1:])))
            assert seen.run is not None
            spent += seen.run.cost.flops_total
            whole += price_dense(seen.run.shape, len(text)).flops_total
        mean = sum(losses) / len(losses)
        base = mean if base is None else base
        found.append({"dose": level, "nats": mean - base, "share": spent / whole})
    return found
