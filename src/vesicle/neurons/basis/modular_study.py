"""The basis and its controls on networks for addition modulo p that are trained here.

For each seed a network is trained, its bases are found on all pairs, and on a sample of pairs are
told: how sparse interactions are, and the fewest edges and features of each layer with which the
accuracy stays within 0.001. Each seed's record is kept, and never made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.files import read_json, write_json
from vesicle.neurons.basis.ablation import fewest, keep_edges, keep_features, largest
from vesicle.neurons.basis.claim import claim
from vesicle.neurons.basis.comparison import LIB, PCA, RANDOM, SCALED, BasisReport, compare
from vesicle.neurons.basis.coordinates import Basis, moments
from vesicle.neurons.basis.drawing import Graph
from vesicle.neurons.basis.interactions import edges
from vesicle.neurons.basis.local_interaction import (
    activations,
    local_interaction_bases,
    squared_jacobian,
)
from vesicle.neurons.basis.modular import (
    LAYERS,
    ModularAdder,
    ModularConfig,
    accuracy,
    all_pairs,
    sums,
    trained_adder,
)
from vesicle.neurons.basis.pca import principal_components
from vesicle.neurons.basis.rotated import random_rotation, scaled_components
from vesicle.neurons.basis.sparsity import sparsity

LOST = 0.001
"""Accuracy that may be lost."""
_DRAWN = ("lib", "pca")


@dataclass(frozen=True, kw_only=True)
class ModularStudy:
    """What is studied.

    Attributes:
        config: The network, and its training.
        seeds: How many networks.
        pairs: Pairs that edges and accuracies are measured on, drawn from all.
        parts: Of the path of integrated gradients.
    """

    config: ModularConfig = field(default_factory=ModularConfig)
    seeds: int = 3
    pairs: int = 1000
    parts: int = 8

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            VesicleError: One is below 1.
        """
        for name in ("seeds", "pairs", "parts"):
            if getattr(self, name) < 1:
                raise VesicleError(f"{name} is {getattr(self, name)}; allowed: 1 and above")


def study_modular(
    study: ModularStudy, out: Path, show: Callable[[int, str], None] | None = None
) -> tuple[BasisReport, dict[str, Graph]]:
    """Train, find bases, measure.

    Args:
        study: What.
        out: Folder that keeps each seed's network and record.
        show: Told how many thousandths are done, and what is going on.

    Returns:
        The report, and the interaction graphs of the first seed.

    Raises:
        VesicleError: The folder holds another study, or cannot be written.
    """
    say = show or (lambda done, note: None)
    # More seeds go on with a study of fewer.
    claim(out, {name: value for name, value in asdict(study).items() if name != "seeds"})
    records = [_seed(study, seed, out / f"seed-{seed}", say) for seed in range(study.seeds)]
    compared = tuple(
        compare(
            {
                basis: {m: [r["pairs"][at]["bases"][basis][m] for r in records] for m in measures}
                for basis, measures in records[0]["pairs"][at]["bases"].items()
            },
            source=LAYERS[at],
            target=LAYERS[at + 1],
            # The most that a seed has: by the tolerance they may differ.
            n_source=max(r["pairs"][at]["n_source"] for r in records),
            n_target=max(r["pairs"][at]["n_target"] for r in records),
        )
        for at in range(len(LAYERS) - 1)
    )
    report = BasisReport(
        subject="modular",
        unit="seed",
        settings=asdict(study),
        facts={
            "held_out_accuracy": [r["held_out_accuracy"] for r in records],
            "accuracy_on_measured_pairs": [r["accuracy"] for r in records],
        },
        compared=compared,
    )
    return report, {name: Graph.from_dict(records[0]["graphs"][name]) for name in _DRAWN}


def bases_of(
    network: ModularAdder, inputs: Tensor, generator: torch.Generator
) -> dict[str, list[Basis]]:
    """Bases of all layers, of each kind, with as many features as the Local Interaction Basis.

    Args:
        network: In float64.
        inputs: (N, D) embeddings.
        generator: Of random rotations.
    """
    lib = local_interaction_bases(network.sections, inputs)
    layers = activations(network.sections, inputs)
    components = [
        principal_components(moments(x)).first(basis.n_features)
        for x, basis in zip(layers, lib, strict=True)
    ]
    below = list(zip(network.sections, layers[:-1], components[:-1], lib[1:], strict=True))
    scaled = [scaled_components(own, squared_jacobian(s, x, up)) for s, x, own, up in below]
    # In the last layer all bases are that of principal components.
    return {
        LIB: lib,
        PCA: components,
        SCALED: [*scaled, lib[-1]],
        RANDOM: [*(random_rotation(basis, generator) for basis in lib[:-1]), lib[-1]],
    }


def _seed(
    study: ModularStudy, seed: int, folder: Path, say: Callable[[int, str], None]
) -> dict[str, Any]:
    done = folder / "record.json"
    if done.exists():
        kept: dict[str, Any] = read_json(done)
        return kept
    start, steps = 1000 * seed, study.config.steps
    network, held_out = trained_adder(
        study.config,
        seed,
        folder,
        show=lambda step, loss: say(start + 500 * step // steps, f"seed {seed}, loss {loss:.4f}"),
    )
    measured = _measured(network.double(), study, seed, lambda n, note: say(start + n, note))
    record = {
        "held_out_accuracy": accuracy(network(held_out), sums(held_out, study.config.modulus)),
        **measured,
    }
    write_json(done, record, indent=None)
    return record


def _measured(
    network: ModularAdder, study: ModularStudy, seed: int, say: Callable[[int, str], None]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    pairs = all_pairs(study.config.modulus)
    say(500, f"seed {seed}, bases")
    kinds = bases_of(network, network.embed(pairs), generator)
    sample = pairs[torch.randperm(len(pairs), generator=generator)[: study.pairs]]
    layers = activations(network.sections, network.embed(sample))
    expected = sums(sample, study.config.modulus)
    base = accuracy(layers[-1], expected)
    found: list[dict[str, Any]] = []
    all_edges = dict[str, list[Tensor]]()
    for at, section in enumerate(network.sections):
        rows = {}
        for number, (kind, bases) in enumerate(kinds.items()):
            say(600 + 200 * at + 50 * number, f"seed {seed}, {LAYERS[at]}, {kind}")
            own = edges(section, layers[at], bases[at], bases[at + 1], parts=study.parts)
            all_edges.setdefault(kind, []).append(own)
            rows[kind] = {
                **asdict(sparsity(own)),
                **_needed(network, at, layers[at], bases, own, expected, base - LOST),
            }
        n_target, n_source = own.shape
        found.append({"n_source": n_source, "n_target": n_target, "bases": rows})
    graphs = {
        name: Graph.of(LAYERS, [b.importance for b in kinds[name]], all_edges[name]).to_dict()
        for name in _DRAWN
    }
    return {"accuracy": base, "pairs": found, "graphs": graphs}


def _needed(
    network: ModularAdder,
    at: int,
    x: Tensor,
    bases: list[Basis],
    own: Tensor,
    expected: Tensor,
    least: float,
) -> dict[str, int]:
    """The fewest edges above a layer, and the fewest features of it, for an accuracy."""
    # The accuracies of a thousand pairs do not need float64, which takes twice as long.
    source, target = (basis.to(torch.float32) for basis in bases[at : at + 2])
    narrow, x = network.float(), x.float()
    section, *rest = narrow.sections[at:]

    def after(activations: Tensor) -> float:
        for later in rest:
            activations = later(activations)
        return accuracy(activations, expected)

    counted = {
        "edges_needed": fewest(
            lambda n: after(keep_edges(section, x, source, target, largest(own, n))),
            own.numel(),
            least,
        ),
        "features_needed": fewest(
            lambda n: after(section(keep_features(x, source, n))), source.n_features, least
        ),
    }
    network.double()
    return counted
