"""What is measured of a reader (neurons, or an autoencoder's features) and of its decoder.

Kept in a folder as JSON (single numbers) and safetensors (what intervals are drawn from), and not
measured again where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.neurons.experts.corpus import Corpus
from vesicle.neurons.experts.coverage import always_counts, f1_of, find
from vesicle.neurons.experts.decoder import expert_layers, routings
from vesicle.neurons.experts.features import Reader, activations, ffn_inputs
from vesicle.neurons.experts.layer import ExpertFfn

Measures = tuple[dict[str, Any], dict[str, Tensor]]
"""Single numbers, and what intervals are drawn from."""


def kept(path: Path, facts: dict[str, Any], measure: Callable[[], Measures]) -> Measures:
    """What a file holds, or what is measured now, and written there.

    Args:
        path: Without a suffix.
        facts: All that it depends on (JSON).
        measure: Does it.

    Raises:
        VesicleError: The file is of other facts, or cannot be written.
    """
    told, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if told.exists():
        held = read_json(told)
        if held.get("facts") != facts:
            raise VesicleError(f"{told} holds what was measured with other settings: remove it")
        return held["numbers"], load_file(tensors)
    numbers, found = measure()
    with atomic_path(tensors) as part:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, part)
    write_json(told, {"facts": facts, "numbers": numbers}, indent=None)
    return numbers, found


def of_reader(reader: Reader, corpus: Corpus, equal: int | None, seed: int) -> Measures:
    """Coverage, reconstruction and sparsity of a reader's features.

    Args:
        reader: Of which decoder.
        corpus: Whose judged texts have properties.
        equal: Features of the dense decoder; a reader with more is judged with as many, too. None
            for a reader whose features are no sample of anything.
        seed: Of which those are.
    """
    places = corpus.where.flatten()
    features = activations(reader, corpus.judged)[places]
    found = find(features, corpus.properties)
    active = (features != 0).sum(1).float()
    numbers: dict[str, Any] = {
        "features": reader.n_features,
        "active": round(float(active.mean()), 3),
        "alive": round(float((features != 0).any(0).float().mean()), 4),
        "published_coverage": round(float(found.published.mean()), 5),
        "best": _best(found.counts, found.feature, corpus),
    }
    tensors = {"coverage": found.counts, "reconstruction": found.reconstruction}
    if equal is not None and reader.n_features > equal:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(reader.n_features, generator=generator)[:equal]
        tensors["equal_coverage"] = find(features[:, drawn], corpus.properties).counts
    return numbers, tensors


@torch.no_grad()
def of_decoder(
    model: Any, corpus: Corpus, inside: AbstractContextManager[None] | None = None
) -> dict[str, Tensor]:
    """(M,) loss of each test text in nats a token; for chess also the share of legal best tokens.

    Args:
        model: The decoder.
        corpus: Whose test texts.
        inside: What holds meanwhile, such as a reconstruction in the place of a layer.
    """
    losses, legal = list[Tensor](), list[Tensor]()
    with inside or nullcontext():
        for rows in torch.arange(len(corpus.test)).split(16):
            ids, counts = corpus.test[rows], corpus.test_scored[rows][:, 1:]
            logits = model(ids[:, :-1]).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view_as(counts)
            losses.append((each * counts).sum(1) / counts.sum(1).clamp_min(1))
            if corpus.legal is not None:
                allowed = corpus.legal[rows][:, 1:]
                right = allowed.gather(2, logits.argmax(2, keepdim=True))[..., 0]
                asked = allowed.any(2)
                legal.append((right & asked).sum(1) / asked.sum(1).clamp_min(1))
    found = {"loss": torch.cat(losses)}
    return {**found, "legal": torch.cat(legal)} if legal else found


@torch.no_grad()
def of_routing(model: Any, layer: int, corpus: Corpus) -> dict[str, float]:
    """How even a layer's experts are used, and whether scores know which are sparse.

    Returns:
        `load`: experts in use, exp of the entropy of their shares; `agreement`: mean rank
        correlation, over the experts of a token, of scores and the share of units that are silent.
    """
    ids = corpus.judged[:32]
    ffn = expert_layers(model)[layer]
    x = ffn_inputs(model, layer, ids)
    with routings(model) as seen:
        ffn(x)
    shares = seen[0].chosen.flatten().bincount(minlength=ffn.size.n_experts).double()
    shares = shares / shares.sum()
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    silent = torch.stack([_silent(ffn, j, x) for j in range(ffn.size.n_experts)], 1)
    scores, silent = _ranks(seen[0].scores), _ranks(silent)
    agreement = torch.nn.functional.cosine_similarity(scores, silent, dim=1)
    return {
        "load": round(float(entropy.exp()), 3),
        "agreement": round(float(agreement.mean()), 4),
    }


def _silent(ffn: ExpertFfn, expert: int, x: Tensor) -> Tensor:
    return (x @ ffn.encoders[expert] <= 0).double().mean(1)


def _ranks(values: Tensor) -> Tensor:
    """(N, M) ranks within rows, their mean taken off; equal values share the mean of theirs."""
    below = (values[:, None] < values[:, :, None]).sum(2).double()
    equal = (values[:, None] == values[:, :, None]).sum(2).double()
    ranks = below + (equal - 1) / 2
    return ranks - ranks.mean(1, keepdim=True)


def _best(counts: Tensor, features: Tensor, corpus: Corpus, most: int = 12) -> list[dict[str, Any]]:
    """The properties that single features know best beyond how frequent they are."""
    f1, always = f1_of(counts.sum(0)), f1_of(always_counts(corpus.properties).sum(0))
    order = (f1 - always).argsort(descending=True)[:most].tolist()
    return [
        {
            "property": corpus.properties.names[i],
            "feature": int(features[i]),
            "f1": round(float(f1[i]), 4),
            "always": round(float(always[i]), 4),
        }
        for i in order
    ]
