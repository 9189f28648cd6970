"""Every neuron of a model as tokens: the likeliest ones of each projection, both ways.

A layer at a time, each kept as it is done, so that a run that was killed goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.calibration.cache import sample_key
from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.neurons.decoding.readout import Readout, likeliest

_ROWS = 256
"""Directions at a time: as many rows of logits fit the caches beside the head."""
_FACTS, _TENSORS = "decoded.json", "decoded.safetensors"
_NAMES = ("ids", "chances", "scores")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """All neurons of a model as tokens.

    Attributes:
        kinds: Projections P, as `readout.KINDS`.
        ids: (L, P, F, 2, k) int32, the likeliest tokens of a direction and of its opposite.
        chances: (L, P, F, 2, k) their probabilities.
        scores: (L, P, F, 2) of the likeliest, as `Likeliest` has them.
        facts: What it was made of.
    """

    kinds: tuple[str, ...]
    ids: Tensor
    chances: Tensor
    scores: Tensor
    facts: dict[str, Any]

    def best(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of a projection's neurons (L, F) the token they are most of, its score, and which way.

        By this score neurons are called specialised; the way is 1, or -1 for the opposite.
        """
        place = self.kinds.index(kind)
        score, way = self.scores[:, place].max(-1)
        token = self.ids[:, place, :, :, 0].gather(-1, way[..., None])[..., 0]
        return token, score, 1 - 2 * way

    def specialised(self, kind: str, count: int) -> list[tuple[int, int, int, float, list[int]]]:
        """The neurons with the highest scores: layer, index, way, score, likeliest tokens.

        Args:
            kind: A projection.
            count: At most.
        """
        _, score, way = self.best(kind)
        place, width = self.kinds.index(kind), score.shape[1]
        found = []
        for flat in score.flatten().argsort(descending=True)[:count].tolist():
            layer, index = divmod(flat, width)
            sign = int(way[layer, index])
            ids = self.ids[layer, place, index, 0 if sign > 0 else 1].tolist()
            found.append((layer, index, sign, float(score[layer, index]), ids))
        return found

    def check(self, model: nn.Module) -> None:
        """Refuse a model that these are not the neurons of.

        Raises:
            VesicleError: Its weights are others, or the numbers are damaged.
        """
        if self.facts["weights"] != sample_key(model):
            raise VesicleError(
                f"these are decoded neurons of another model, {self.facts['model']}; decode this "
                "one's first"
            )
        shape = Readout(model).shape
        n_layers, _, width = self.scores.shape[:3]
        low, high = int(self.ids.min()), int(self.ids.max())
        if (n_layers, width) != (shape.n_layers, shape.ffn_width) or not (
            0 <= low <= high < shape.vocabulary
        ):
            raise DataError(
                f"the decoded neurons are damaged: {n_layers} layers of {width} with tokens {low} "
                f"to {high}, and the model has {shape.n_layers} of {shape.ffn_width} with tokens 0 "
                f"to {shape.vocabulary - 1}; decode again"
            )

    def save(self, folder: Path) -> None:
        """Write both files, the facts last."""
        from safetensors.torch import save_file

        with atomic_path(folder / _TENSORS) as part:
            save_file({name: getattr(self, name) for name in _NAMES}, part)
        write_json(folder / _FACTS, {**self.facts, "kinds": list(self.kinds)}, indent=2)

    @classmethod
    def load(cls, folder: Path) -> Decoded:
        """Read what `save` wrote.

        Raises:
            DataError: It is not there, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        facts, again = read_json(folder / _FACTS), f"remove {folder}, and decode again"
        if not isinstance(facts, dict) or not isinstance(facts.get("kinds"), list):
            raise DataError(f"{folder / _FACTS} is not what decode wrote; {again}")
        kinds = tuple(facts.pop("kinds"))
        try:
            tensors = load_file(folder / _TENSORS)
            found = cls(kinds=kinds, facts=facts, **{name: tensors[name] for name in _NAMES})
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{folder / _TENSORS} cannot be read: {error}; {again}") from error
        size = found.scores.shape
        if (
            len(size) != 4
            or size[1] != len(kinds)
            or found.ids.shape != found.chances.shape
            or found.ids.shape[:-1] != size
        ):
            raise DataError(f"{folder / _TENSORS} and {_FACTS} do not belong together; {again}")
        return found


def decode_all(
    model: nn.Module,
    out: Path,
    *,
    name: str,
    k: int = 8,
    lens: Tensor | None = None,
    show: Callable[[int, str], None] | None = None,
) -> Decoded:
    """Decode every neuron, going on where a run was cut off.

    Args:
        model: A causal LM in fp32.
        out: Folder to write to.
        name: What the model is called.
        k: Tokens of each direction.
        lens: (L, D, D) maps from what each layer leaves to the end; None for the plain readout.
        show: Told how many layers are done.

    Raises:
        VesicleError: The folder holds another model's, or was made with another k or lens.
    """
    readout = Readout(model)
    shape = readout.shape
    if not 1 <= k <= shape.vocabulary:
        raise VesicleError(f"k is {k}; allowed: 1 to {shape.vocabulary}")
    facts = {
        "model": name,
        "weights": sample_key(model),
        "k": k,
        "lens": None if lens is None else round(float(lens.double().norm()), 6),
    }
    if (out / _FACTS).is_file():
        found = Decoded.load(out)
        _check(out, found.facts, facts)
        found.check(model)
        return found
    parts = []
    for layer in range(shape.n_layers):
        own = None if lens is None else lens[layer]
        parts.append(_layer(readout, layer, k, own, out / "layers", facts))
        if show is not None:
            show(layer + 1, f"layer {layer}")
    whole = {name: torch.stack([part[name] for part in parts]) for name in _NAMES}
    decoded = Decoded(kinds=readout.kinds, facts=facts, **whole)
    decoded.save(out)
    shutil.rmtree(out / "layers", ignore_errors=True)
    return decoded


def check_alike(other: Decoded, model: nn.Module) -> None:
    """Refuse another checkpoint's neurons that cannot be compared with a model's.

    Raises:
        DataError: Shapes differ.
    """
    readout = Readout(model)
    own = (readout.shape.n_layers, len(readout.kinds), readout.shape.ffn_width)
    if tuple(other.scores.shape[:3]) != own:
        raise DataError(_apart(own, tuple(other.scores.shape[:3])))


def same_top_token(one: Decoded, other: Decoded, kind: str) -> dict[str, float]:
    """Share of neurons whose likeliest token is the same in two checkpoints.

    Published for the up-projections of Llama 3.1 8B and its instruct model: more than 75 %.
    Beside it what chance gives: the same share with the neurons of each layer shuffled (one shift).

    Args:
        one: Of a checkpoint.
        other: Of another, of the same shape.
        kind: A projection.

    Raises:
        DataError: Shapes differ.
    """
    if one.ids.shape != other.ids.shape or one.kinds != other.kinds:
        raise DataError(_apart(tuple(one.ids.shape[:3]), tuple(other.ids.shape[:3])))
    left, right = one.best(kind)[0], other.best(kind)[0]
    return {
        "same": float((left == right).double().mean()),
        "shuffled": float((left == right.roll(1, dims=1)).double().mean()),
    }


@torch.no_grad()
def _layer(
    readout: Readout, layer: int, k: int, lens: Tensor | None, folder: Path, facts: dict[str, Any]
) -> dict[str, Tensor]:
    """A layer's part of `Decoded`, from its file where there is one."""
    from safetensors.torch import load_file, save_file

    note, file = folder / f"{layer}.json", folder / f"{layer}.safetensors"
    if note.is_file():
        _check(folder, read_json(note), facts)
        return load_file(file)
    blocks = [
        likeliest(readout.logits(rows, lens), k)
        for kind in readout.kinds
        for rows in readout.directions(layer, kind).split(_ROWS)
    ]
    shape = (len(readout.kinds), readout.shape.ffn_width)
    found = {}
    for name in _NAMES:
        joined = torch.cat([getattr(block, name) for block in blocks])
        found[name] = joined.reshape(*shape, *joined.shape[1:]).contiguous()
    with atomic_path(file) as part:
        save_file(found, part)
    write_json(note, facts)
    return found


def _check(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) == value:
            continue
        told = f"with {name} {theirs.get(name)!r}, not {value!r}"
        if name == "lens":
            through = ("without a lens", "through another lens")[theirs.get(name) is not None]
            told = f"{through}, and now it is {'no lens' if value is None else 'a lens'}"
        raise VesicleError(
            f"{folder} holds neurons decoded {told}: use another folder, or remove it"
        )


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    return (
        f"the two models have (layers, projections, neurons) {one} and {other}; allowed: two "
        "checkpoints of one shape"
    )
