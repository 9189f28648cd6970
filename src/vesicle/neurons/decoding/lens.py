"""The Jacobian lens: what a direction at one layer becomes at the end, on average.

J_l = mean over texts of d h_L(t) / d h_l(t), at the last token t of each text, with h_l what layer
l leaves in the residual stream and h_L what the last one does. The plain readout (logit lens) takes
J_l for the identity; the tuned lens (Belrose et al. 2023) fits a map that predicts h_L, which need
not be what a *change* of h_l does. Earlier tokens are read once, without gradients: nothing that
follows from h_l(t) at the last token goes through them.

Whether it is good for anything is measured: `compare` raises neurons and asks which of the two
foretells what happens to all tokens' probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.calibration.cache import fingerprint, sample_key
from vesicle.errors import VesicleError
from vesicle.families import cache_argument
from vesicle.files import atomic_path, read_json, write_json
from vesicle.intervals import interval
from vesicle.neurons.clamping import NAMES, next_chances
from vesicle.neurons.decoding.readout import Readout
from vesicle.neurons.edits import Edit
from vesicle.neurons.hooks import Hooked

_FACTS, _TENSORS = "lens.json", "lens.safetensors"
_READOUTS = ("plain", "lens")


def fit_lens(
    hooked: Hooked,
    texts: Tensor,
    out: Path,
    *,
    batch: int = 8,
    show: Callable[[int, str], None] | None = None,
) -> Tensor:
    """Jacobians (L, D, D), of the last layer the identity.

    Args:
        hooked: The dense model.
        texts: (N, T) token ids, T at least 2.
        out: Folder that keeps the sum after every batch; a fit in it is gone on with.
        batch: Texts at a time.
        show: Told how many texts are done.

    Raises:
        VesicleError: The folder holds the lens of another model or of other texts; or texts are
            too short.
    """
    from safetensors.torch import load_file, save_file

    if texts.shape[1] < 2:
        raise VesicleError(f"texts have {texts.shape[1]} tokens; allowed: 2 and more")
    n_layers, width = hooked.shape.n_layers, hooked.shape.width
    facts = {"weights": sample_key(hooked.model), "texts": fingerprint([texts])}
    total, done = torch.zeros(n_layers, width, width), 0
    if (out / _FACTS).is_file():
        kept = read_json(out / _FACTS)
        if {name: kept.get(name) for name in facts} != facts:
            raise VesicleError(
                f"{out} holds a lens of "
                f"{'another model' if kept.get('weights') != facts['weights'] else 'other texts'} "
                "(number, seed and source decide which): use another folder, or remove it"
            )
        done, total = int(kept["done"]), load_file(out / _TENSORS)["total"]
    while done < len(texts):
        own = texts[done : done + batch]
        total += _jacobians(hooked, own)
        done += len(own)
        with atomic_path(out / _TENSORS) as part:
            save_file({"total": total}, part)
        write_json(out / _FACTS, {**facts, "done": done})
        if show is not None:
            show(done, f"text {done}")
    return total / len(texts)


def load_lens(folder: Path, model: nn.Module) -> Tensor:
    """The Jacobians (L, D, D) that a fit left, of all texts that it was done with.

    Raises:
        DataError: There is none.
        VesicleError: It is of another model.
    """
    from safetensors.torch import load_file

    kept = read_json(folder / _FACTS)
    if kept.get("weights") != sample_key(model):
        raise VesicleError(f"{folder} holds the lens of another model")
    return load_file(folder / _TENSORS)["total"] / int(kept["done"])


def _jacobians(hooked: Hooked, texts: Tensor) -> Tensor:
    """(L, D, D) summed over texts (N, T)."""
    from transformers import DynamicCache

    model: Any = hooked.model
    n_layers, width = hooked.shape.n_layers, hooked.shape.width
    cache = DynamicCache(config=model.config)
    given = cache_argument(model, cache)
    with torch.no_grad():
        model(texts[:, :-1], use_cache=True, **given)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    with torch.enable_grad(), hooked.hold(read=names) as seen:
        model(texts[:, -1:], use_cache=True, **given)
    inner = [seen[name] for name in names[:-1]]
    last = seen[names[-1]][:, -1].sum(0)
    found = torch.zeros(n_layers, width, width)
    for i in range(width):
        slopes = torch.autograd.grad(last[i], inner, retain_graph=i + 1 < width)
        for layer, slope in enumerate(slopes):
            found[layer, i] = slope[:, -1].sum(0)
    found[-1] = torch.eye(width) * len(texts)
    return found


@torch.no_grad()
def compare(
    hooked: Hooked,
    lens: Tensor,
    prompts: Tensor,
    most: Tensor,
    *,
    count: int = 90,
    strength: float = 2.0,
    seed: int = 0,
    show: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Which readout foretells what raising a neuron does, over neurons drawn from all layers.

    A neuron's prediction is its written direction's logits; what happened is the mean change of log
    probabilities over prompts. They are compared by their correlation over tokens. *Shuffled* has
    another neuron's prediction through the lens.

    Args:
        hooked: The dense model.
        lens: (L, D, D).
        prompts: (N, T) token ids, none that the lens was fitted on.
        most: (L, F) largest values of neurons in ordinary text.
        count: Neurons, as many of each third of the layers.
        strength: Of the change, times `most`, up and down by turns.
        seed: Of the draw.
        show: Told how many neurons are done.

    Raises:
        VesicleError: More neurons than half of the model's.
    """
    readout, rng = Readout(hooked.model), np.random.default_rng(seed)
    n_layers, n_neurons = most.shape
    if not 3 <= count <= most.numel() // 2:
        raise VesicleError(f"{count} neurons to compare on; allowed: 3 to {most.numel() // 2}")
    parts = np.arange(count) % 3
    drawn = np.zeros((count, 2), dtype=int)
    for third, layers in enumerate(np.array_split(np.arange(n_layers), 3)):
        own = parts == third
        places = rng.choice(len(layers) * n_neurons, own.sum(), replace=False)
        drawn[own] = np.stack([layers[places // n_neurons], places % n_neurons], 1)
    base = next_chances(hooked, prompts, [])
    last = [prompts.shape[1] - 1]
    foretold: dict[str, list[Tensor]] = {name: [] for name in _READOUTS}
    happened = []
    for number, (layer, index) in enumerate(drawn.tolist()):
        way = 1.0 if number % 2 else -1.0
        value = way * strength * float(most[layer, index])
        # Added, so that what happens does not hang on where the neuron was.
        name = f"blocks.{layer}.{NAMES['down']}"
        edit = Edit(name=name, how="add", value=value, index=index, tokens=last)
        happened.append((next_chances(hooked, prompts, [edit]) - base).mean(0))
        direction = way * readout.directions(layer, "down")[index][None]
        foretold["plain"].append(readout.logits(direction)[0])
        foretold["lens"].append(readout.logits(direction, lens[layer])[0])
        if show is not None:
            show(number + 1, f"{layer}.{index}")
    own = {
        name: np.array([_correlation(a, b) for a, b in zip(each, happened, strict=True)])
        for name, each in foretold.items()
    }
    rolled = [*foretold["lens"][3:], *foretold["lens"][:3]]  # of the same third of the layers
    own["shuffled"] = np.array([_correlation(a, b) for a, b in zip(rolled, happened, strict=True)])
    own["lens_above_plain"] = own["lens"] - own["plain"]
    return {
        "neurons": count,
        "strength": strength,
        "all": {name: _told(values) for name, values in own.items()},
        "by_third": [
            {name: _told(values[parts == part]) for name, values in own.items()}
            for part in range(min(3, count))
        ],
    }


def _correlation(left: Tensor, right: Tensor) -> float:
    a, b = left - left.mean(), right - right.mean()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))


def _told(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    own = np.asarray(values)
    low, high = interval(own)
    return {"mean": float(own.mean()), "low": low, "high": high}
