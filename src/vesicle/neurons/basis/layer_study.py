"""The basis and its controls between two adjacent layers of a language model.

Bases come from some windows of text (`layer_bases`); how sparse interactions are, and the loss
with the first features alone, from others. Because a layer adds to the residual stream, most of
what a feature gives passes by it; so edges are told again for what the layer adds alone. The edges
in each kind of basis and the losses are kept in the folder, and never made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.families import find_family
from vesicle.files import atomic_path, read_json, write_json
from vesicle.neurons.basis.ablation import keep_features
from vesicle.neurons.basis.claim import claim
from vesicle.neurons.basis.comparison import (
    CONTROLS,
    LIB,
    PCA,
    BasisReport,
    as_values,
    compare,
    estimate,
)
from vesicle.neurons.basis.coordinates import Basis
from vesicle.neurons.basis.drawing import Graph
from vesicle.neurons.basis.interactions import residual_edges
from vesicle.neurons.basis.layer_bases import KINDS, SKIPPED, LayerStudy, layer_bases, narrow
from vesicle.neurons.basis.local_interaction import Section
from vesicle.neurons.basis.residual import differentiable, logits_of, replaced_input, stream
from vesicle.neurons.basis.sparsity import sparsity

_COUNTS = (1, 4, 16, 64, 128, 256, 384, 512, 1024)


def study_layers(
    model: nn.Module,
    windows: Tensor,
    study: LayerStudy,
    out: Path,
    *,
    name: str,
    facts: dict[str, Any] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> tuple[BasisReport, dict[str, Graph]]:
    """Find bases, measure edges and losses.

    Args:
        model: A Hugging Face causal LM in float32 or float64.
        windows: (N, T) token ids, at least `study.windows + study.held_out`.
        study: What.
        out: Folder that keeps what is done.
        name: Of the model.
        facts: What the run depends on beside the study, such as a fingerprint of the weights.
        show: Told how many of `steps` are done, and what is going on.

    Returns:
        The report, and the interaction graphs of the Local Interaction Basis and of PCA.

    Raises:
        ModelError: The model is in half precision, or of no known family.
        VesicleError: The folder holds another study, cannot be written, or there is too little
            text.
    """
    say = show or (lambda done, note: None)
    n_layers = len(find_family(model.config).layers(model))
    study.check(n_layers)
    needed = study.windows + study.held_out
    if len(windows) < needed:
        raise VesicleError(f"the text has {len(windows)} windows; allowed: {needed} and more")
    settings = {**asdict(study), "length": windows.shape[1], **(facts or {})}
    claim(out, settings)
    measured = windows[study.windows : needed]
    with differentiable(model):
        last = logits_of(model)
        kinds = layer_bases(model, windows[: study.windows], study, out, last, say)
        tables = {
            kind: _edges(model, measured, study, out, kinds, kind, last, say) for kind in KINDS
        }
        losses = _losses(model, measured, study, out, kinds, say)
    names = (f"layer {study.layer}", f"layer {study.layer + 1}")
    targets = {"whole": names[1], "added": f"what layer {study.layer} adds"}
    report = BasisReport(
        subject=name,
        unit="window",
        settings=settings,
        facts={"losses": losses},
        compared=tuple(
            compare(
                {
                    kind: as_values([sparsity(one) for one in table[of]])
                    for kind, table in tables.items()
                },
                source=names[0],
                target=target,
                n_source=kinds[LIB][0].n_features,
                n_target=kinds[LIB][1].n_features,
            )
            for of, target in targets.items()
        ),
    )
    graphs = {
        kind: Graph.of(names, [b.importance for b in kinds[kind]], [tables[kind]["whole"].mean(0)])
        for kind in (LIB, PCA)
    }
    return report, graphs


def steps(study: LayerStudy, n_layers: int) -> int:
    """How many steps `study_layers` shows."""
    return n_layers - study.layer + len(KINDS) * (study.held_out + 1) + 1


def _edges(
    model: nn.Module,
    windows: Tensor,
    study: LayerStudy,
    out: Path,
    kinds: dict[str, tuple[Basis, Basis]],
    kind: str,
    last: Section,
    say: Callable[[int, str], None],
) -> dict[str, Tensor]:
    """(W, k_target, k_source) edges of each window, `whole` and of what the layer `added`."""
    path = out / "edges" / f"{kind}.safetensors"
    if not path.exists():
        found = []
        source, target = kinds[kind]
        for number, window in enumerate(windows):
            done = _offset(model, study) + KINDS.index(kind) * len(windows) + number
            say(done, f"edges, {kind}")
            one = stream(model, window[None], study.layer, last)
            found.append(
                residual_edges(
                    one.sections[0],
                    one.layers[0],
                    source,
                    target,
                    parts=study.parts,
                    skipped=SKIPPED,
                )
            )
        whole, added = (torch.stack(tables) for tables in zip(*found, strict=True))
        with atomic_path(path) as part:
            save_file(narrow({"whole": whole, "added": added}), part)
    return load_file(path)


def _losses(
    model: nn.Module,
    windows: Tensor,
    study: LayerStudy,
    out: Path,
    kinds: dict[str, tuple[Basis, Basis]],
    say: Callable[[int, str], None],
) -> dict[str, Any]:
    """Nats a token, whole and how far they rise with the first features of the layer alone."""
    path = out / "losses.json"
    if not path.exists():
        whole = _loss(model, windows)
        most = kinds[LIB][0].n_features
        counts = [count for count in _COUNTS if count < most] + [most]
        rises = {kind: list[Tensor]() for kind in KINDS}
        for number, kind in enumerate(KINDS):
            say(_offset(model, study) + len(KINDS) * len(windows) + number, f"losses, {kind}")
            basis = kinds[kind][0].to(next(model.parameters()).dtype)
            for count in counts:
                change = partial(keep_features, basis=basis, count=count, skipped=SKIPPED)
                with replaced_input(model, study.layer, change):
                    rises[kind].append(_loss(model, windows) - whole)
        lib = rises[LIB]
        less = {
            control: [own - other for own, other in zip(lib, rises[control], strict=True)]
            for control in CONTROLS
        }
        told = {
            "whole": _told(whole),
            "counts": counts,
            "rise": {kind: list(map(_told, rows)) for kind, rows in rises.items()},
            "lib_less": {control: list(map(_told, rows)) for control, rows in less.items()},
        }
        write_json(path, told)
    kept: dict[str, Any] = read_json(path)
    return kept


def _told(values: Tensor) -> dict[str, Any]:
    return asdict(estimate(values.tolist()))


@torch.no_grad()
def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """(W,) nats a token."""
    found = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        found.append(nn.functional.cross_entropy(logits.double(), window[1:]))
    return torch.stack(found)


def _offset(model: nn.Module, study: LayerStudy) -> int:
    return len(find_family(model.config).layers(model)) - study.layer + 1
