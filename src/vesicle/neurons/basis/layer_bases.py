"""Bases of two adjacent layers of a language model, found from its logits back, and their controls.

Moments and Jacobians come from windows of text. Of each window the first position is held fixed
and looked at nowhere: models park outliers there that would be most of the variance. The basis of
each layer is kept in a folder as soon as it is found, and never made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.files import atomic_path
from vesicle.neurons.basis.comparison import CONTROLS, LIB, PCA, RANDOM, SCALED
from vesicle.neurons.basis.coordinates import Basis, Moments
from vesicle.neurons.basis.local_interaction import Section, local_interaction, sampled_jacobian
from vesicle.neurons.basis.pca import principal_components
from vesicle.neurons.basis.residual import Stream, stream
from vesicle.neurons.basis.rotated import random_rotation, scaled_components

KINDS = (LIB, *CONTROLS)
SKIPPED = 1
_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class LayerStudy:
    """What is studied.

    Attributes:
        layer: Its residual stream and that of the next layer, from 0.
        windows: Of text that bases come from.
        held_out: Windows of text that is measured.
        probes: Random cotangents of each window, for each layer.
        parts: Of the path of integrated gradients.
        features: The most important ones of each basis that are compared; None for all.
        seed: Of cotangents and rotations.
    """

    layer: int
    windows: int = 32
    held_out: int = 8
    probes: int = 16
    parts: int = 1
    features: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            VesicleError: One is out of its range.
        """
        for name in ("windows", "held_out", "probes", "parts"):
            if getattr(self, name) < 1:
                raise VesicleError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        if self.features is not None and self.features < 2:
            raise VesicleError(f"features is {self.features}; allowed: 2 and above")
        if self.layer < 0:
            raise VesicleError(f"layer is {self.layer}; allowed: 0 and above")

    def check(self, n_layers: int) -> None:
        """Refuse a layer that has no layer after it.

        Raises:
            VesicleError: It has none.
        """
        if self.layer > n_layers - 2:
            raise VesicleError(
                f"layer is {self.layer}; allowed: 0 to {n_layers - 2}, with a layer after it"
            )


def layer_bases(
    model: nn.Module,
    windows: Tensor,
    study: LayerStudy,
    out: Path,
    last: Section,
    say: Callable[[int, str], None],
) -> dict[str, tuple[Basis, Basis]]:
    """Bases of the two layers, of each kind, all of as many features.

    Args:
        model: A Hugging Face causal LM, its attention differentiable.
        windows: (N, T) token ids.
        study: Which layers, and how.
        out: Folder that keeps the bases.
        last: From `logits_of`.
        say: Told how many bases are done, and what is going on.
    """
    streams = [stream(model, part, study.layer, last) for part in windows.split(_AT_ONCE)]
    known = [_moments(streams, at) for at in range(len(streams[0].layers))]
    basis = principal_components(known[-1])
    found: list[tuple[Basis, Tensor]] = []
    n_layers = len(known) - 1
    for at in range(n_layers - 1, -1, -1):
        number = study.layer + at
        say(n_layers - at - 1, f"basis of layer {number}")
        path = out / "bases" / f"{number}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(study.seed * 100_003 + number)
            metric = _metric(streams, at, basis, study.probes, generator)
            own = local_interaction(known[at], metric)
            with atomic_path(path) as part:
                save_file(narrow({**own.tensors(), "metric": metric}), part)
        # Read back also when it was just written, so that a run that was cut off finds the same.
        tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
        metric = tensors.pop("metric")
        basis = Basis(**tensors)
        found.insert(0, (basis, metric))
    generator = torch.Generator().manual_seed(study.seed)
    kinds: dict[str, list[Basis]] = {kind: [] for kind in KINDS}
    for (lib, metric), moments in zip(found[:2], known[:2], strict=True):
        components = principal_components(moments)
        count = min(lib.n_features, study.features or lib.n_features)
        lib = lib.first(count)
        kinds[LIB].append(lib)
        kinds[PCA].append(components.first(count))
        kinds[SCALED].append(scaled_components(components, metric).first(count))
        kinds[RANDOM].append(random_rotation(lib, generator))
    return {kind: (pair[0], pair[1]) for kind, pair in kinds.items()}


def _moments(streams: Sequence[Stream], at: int) -> Moments:
    found = Moments(streams[0].layers[at].shape[-1])
    for one in streams:
        found.add(one.layers[at][:, SKIPPED:])
    return found


def _metric(
    streams: Sequence[Stream], at: int, target: Basis, probes: int, generator: torch.Generator
) -> Tensor:
    total = torch.zeros(())
    for one in streams:
        x = one.layers[at]
        found = sampled_jacobian(
            one.sections[at], x, target, probes=probes, generator=generator, skipped=SKIPPED
        )
        total = total + found * len(x)
    return total / sum(len(one.layers[at]) for one in streams)


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float32, as they are saved."""
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}
