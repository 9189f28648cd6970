"""What directions decode to that are no neuron's: random mixtures of a layer's.

A score is the greatest of all tokens' logits, both ways, and so is high for any direction. The
control of a layer's projection: sums of all its directions with normal weights, which have the same
covariance and no axes of their own (a random rotation of the neurons, in distribution).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.calibration.cache import sample_key
from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.neurons.decoding.readout import Readout, likeliest

_FACTS, _TENSORS = "mixtures.json", "mixtures.safetensors"


def load_mixtures(folder: Path) -> Tensor:
    """(L, P, n) scores that `score_mixtures` left.

    Raises:
        DataError: They are not there, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / _TENSORS)["scores"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{folder / _TENSORS} cannot be read: {error}") from error


@torch.no_grad()
def score_mixtures(
    model: nn.Module,
    out: Path,
    *,
    count: int,
    seed: int = 0,
    show: Callable[[int, str], None] | None = None,
) -> Tensor:
    """(L, P, n) scores of mixtures, the higher of both ways, as neurons' are.

    Args:
        model: A causal LM in fp32.
        out: Folder that keeps them.
        count: n, mixtures of each layer and projection.
        seed: Of their weights.
        show: Told how many layers are done.

    Raises:
        VesicleError: The folder holds those of another model, count or seed.
    """
    from safetensors.torch import save_file

    facts: dict[str, Any] = {"weights": sample_key(model), "count": count, "seed": seed}
    if (out / _FACTS).is_file():
        theirs = read_json(out / _FACTS)
        for name, value in facts.items():
            if theirs.get(name) != value:
                raise VesicleError(
                    f"{out} holds mixtures made with {name} {theirs.get(name)!r}, not {value!r}: "
                    "use another folder, or remove it"
                )
        return load_mixtures(out)
    readout, generator = Readout(model), torch.Generator().manual_seed(seed)
    layers = []
    for layer in range(readout.shape.n_layers):
        found = []
        for kind in readout.kinds:
            own = readout.directions(layer, kind)
            weights = torch.randn(count, len(own), generator=generator, dtype=torch.float32)
            found.append(likeliest(readout.logits(weights @ own), 1).scores.amax(-1))
        layers.append(torch.stack(found))
        if show is not None:
            show(layer + 1, f"mixtures of layer {layer}")
    scores = torch.stack(layers)
    with atomic_path(out / _TENSORS) as part:
        save_file({"scores": scores}, part)
    write_json(out / _FACTS, facts)
    return scores
