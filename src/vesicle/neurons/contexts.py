"""Where every neuron fires: one pass over a text, exact, in bounded memory.

Kept of each neuron are its k highest and its k lowest activations with their places (activation of
a gated FFN is gate times up, so that both signs carry something), mean and mean square; and of all
neurons their activations at places that are drawn evenly over the text, as negatives.

The first tokens of a window do not count: the first of all has activations that are unlike any
other's in many models (Sun et al. 2024, "Massive activations in large language models"), and those
after it show little of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.calibration.cache import fingerprint, sample_key
from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.models import Text
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.running_top import RunningTop
from vesicle.training.data import token_windows

_FACTS, _TENSORS, _PARTIAL = "contexts.json", "contexts.safetensors", "partial.safetensors"
_POST = "mlp.hook_post"

Reader = Callable[[Tensor], Sequence[Tensor]]
"""Gives, of a window (T,) of token ids, the activations (T, F) of each of L layers."""


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """What is kept of a text.

    Attributes:
        k: Highest activations of a neuron, and as many lowest.
        skip: First tokens of each window that do not count.
        drawn: Places drawn evenly over the text, at which all activations are kept.
        seed: Of that draw.
        block: Windows after which all is saved, so that a run that was cut off goes on.
    """

    k: int = 20
    skip: int = 8
    drawn: int = 1024
    seed: int = 0
    block: int = 16

    def check(self, windows: Tensor) -> None:
        """See that a text fits.

        Args:
            windows: (N, T) token ids.

        Raises:
            DataError: Naming the setting that is out of range, and what is allowed.
        """
        for name, least in {"k": 1, "skip": 0, "drawn": 1, "seed": 0, "block": 1}.items():
            if getattr(self, name) < least:
                raise DataError(f"{name} is {getattr(self, name)}; allowed: {least} and above")
        n, t = windows.shape
        if t <= self.skip:
            raise DataError(f"windows have {t} tokens; allowed: more than skip, {self.skip}")
        there = n * (t - self.skip)
        for name in ("k", "drawn"):
            if getattr(self, name) > there:
                raise DataError(
                    f"{name} is {getattr(self, name)}; allowed: up to {there}, the tokens that "
                    f"count in {n} windows of {t}"
                )


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Where the neurons of L layers of F fire.

    Attributes:
        tokens: (N, T) int64, the windows that were read.
        activations: (L, F, k) the highest, falling.
        places: (L, F, k, 2) int32, the window and the token at which they stand.
        low_activations: (L, F, k) the lowest, rising.
        low_places: (L, F, k, 2) int32.
        mean: (L, F) float64, over the tokens that count.
        mean_square: (L, F) float64.
        drawn_places: (R, 2) int32, in the order of the text.
        drawn_activations: (L, F, R) bfloat16, at those places.
        n_tokens: Tokens that count.
        facts: What it was made of.
    """

    tokens: Tensor
    activations: Tensor
    places: Tensor
    low_activations: Tensor
    low_places: Tensor
    mean: Tensor
    mean_square: Tensor
    drawn_places: Tensor
    drawn_activations: Tensor
    n_tokens: int
    facts: dict[str, Any]

    @property
    def maximum(self) -> Tensor:
        """(L, F)."""
        return self.activations[..., 0]

    @property
    def minimum(self) -> Tensor:
        """(L, F)."""
        return self.low_activations[..., 0]

    def extremes(self, *, low: bool) -> tuple[Tensor, Tensor]:
        """Activations (L, F, k) and places (L, F, k, 2) of one side."""
        if low:
            return self.low_activations, self.low_places
        return self.activations, self.places

    def stronger_low(self) -> Tensor:
        """(L, F) whether the lowest activations are the larger ones, on average over k."""
        return -self.low_activations.sum(-1) > self.activations.sum(-1)

    def share_above(self, fraction: float = 0.5) -> Tensor:
        """(L, F) share of tokens whose activation is above a fraction of the neuron's maximum.

        Where fewer than k tokens are, they are counted; elsewhere it is the share of the drawn
        places, and at least k of all.

        Args:
            fraction: In (0, 1).

        Raises:
            DataError: It is outside.
        """
        if not 0 < fraction < 1:
            raise DataError(f"fraction is {fraction}; allowed: above 0, below 1")
        bound = (fraction * self.maximum)[..., None]
        k = self.activations.shape[-1]
        counted = (self.activations > bound).sum(-1)
        share = (self.drawn_activations > bound).float().mean(-1)
        return (counted / self.n_tokens).where(counted < k, share.clamp_min(k / self.n_tokens))

    def before(self, place: Sequence[int], n: int) -> list[int]:
        """Up to n token ids of a window that end with a place's."""
        window, token = place
        return self.tokens[window, max(0, token + 1 - n) : token + 1].tolist()

    def save(self, folder: Path) -> None:
        """Write both files, the facts last."""
        from safetensors.torch import save_file

        tensors = {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        with atomic_path(folder / _TENSORS) as part:
            save_file({name: value.contiguous() for name, value in tensors.items()}, part)
        write_json(folder / _FACTS, {**self.facts, "n_tokens": self.n_tokens})

    @classmethod
    def load(cls, folder: Path) -> Contexts:
        """Read what `save` wrote.

        Raises:
            DataError: It is not there, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        facts = read_json(folder / _FACTS)
        try:
            n_tokens = int(facts.pop("n_tokens"))
            return cls(**load_file(folder / _TENSORS), n_tokens=n_tokens, facts=facts)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _TENSORS} cannot be read: {error}") from error


def windows_of(text: Text, documents: Sequence[str], length: int) -> Tensor:
    """(N, length) token ids of documents, each window with what the tokenizer puts first.

    Args:
        text: The model's text side.
        documents: Texts, joined by blank lines.
        length: Tokens of a window.

    Raises:
        DataError: There are too few tokens, or too many for the model.
    """
    if length > text.context_window:
        raise DataError(
            f"windows have {length} tokens; allowed: up to {text.context_window}, the model's "
            "context window"
        )
    first = text.encode("")
    own = token_windows(
        documents, lambda part: text.encode(part, continues=True), length - len(first)
    )
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(len(own), -1), own], 1)


def neuron_reader(hooked: Hooked) -> Reader:
    """Reads all neurons of a model, without its LM head."""
    names = [f"blocks.{layer}.{_POST}" for layer in range(hooked.shape.n_layers)]
    model: Any = hooked.model

    def read(window: Tensor) -> list[Tensor]:
        with torch.no_grad(), hooked.hold(read=names) as seen:
            model.base_model(input_ids=window[None], use_cache=False)
        return [seen[name][0] for name in names]

    return read


def collect(
    hooked: Hooked,
    windows: Tensor,
    settings: ContextSettings,
    folder: Path | None = None,
    *,
    show: Callable[[int, str], None] | None = None,
) -> Contexts:
    """Where all neurons of a model fire in a text.

    Args:
        hooked: The dense model.
        windows: (N, T) token ids.
        settings: What is kept.
        folder: That keeps it; a pass in it that was cut off is gone on with.
        show: Told how many windows are done.

    Raises:
        DataError: A setting is out of range, or a token id.
        VesicleError: The folder holds what was made of another model, text or settings.
    """
    top = hooked.shape.vocabulary
    if not 0 <= int(windows.min()) <= int(windows.max()) < top:
        bad = next(i for i in windows.flatten().tolist() if not 0 <= i < top)
        raise DataError(f"token id {bad} is out of range; allowed: 0 to {top - 1}")
    what = f"neurons of {sample_key(hooked.model)}"
    return collect_from(neuron_reader(hooked), windows, settings, folder, what=what, show=show)


def collect_from(
    read: Reader,
    windows: Tensor,
    settings: ContextSettings,
    folder: Path | None = None,
    *,
    what: str,
    show: Callable[[int, str], None] | None = None,
) -> Contexts:
    """The same of whatever has activations: experts, features of an autoencoder.

    Args:
        read: Gives a window's activations.
        windows: (N, T) token ids.
        settings: What is kept.
        folder: As in `collect`.
        what: A name for what is read; another one's folder is refused.
        show: As in `collect`.

    Raises:
        DataError: A setting is out of range.
        VesicleError: As `collect`.
    """
    settings.check(windows)
    facts = {"of": what, "windows": fingerprint([windows]), **asdict(settings)}
    del facts["block"]  # which changes nothing
    if folder is not None and (folder / _FACTS).is_file():
        found = Contexts.load(folder)
        _check(folder, found.facts, facts)
        return found
    passed = _Pass(windows, settings)
    if folder is not None and (folder / _PARTIAL).is_file():
        passed.restore(folder, facts)
    while passed.done < len(windows):
        passed.take(read(windows[passed.done]))
        if show is not None:
            show(passed.done, f"window {passed.done}")
        if folder is not None and passed.done % settings.block == 0:
            passed.keep(folder, facts)
    contexts = passed.contexts(facts)
    if folder is not None:
        contexts.save(folder)
        (folder / _PARTIAL).unlink(missing_ok=True)
    return contexts


class _Pass:
    """A pass under way: what `Contexts` has, so far."""

    def __init__(self, windows: Tensor, settings: ContextSettings) -> None:
        self.windows, self.settings, self.done = windows, settings, 0
        self.drawn = _evenly(windows, settings)
        self.tensors: dict[str, Tensor] = {}

    def take(self, activations: Sequence[Tensor]) -> None:
        """Take the next window in: (T, F) of each layer."""
        if not self.tensors:
            self._make(len(activations), activations[0].shape[1])
        skip, t = self.settings.skip, self.windows.shape[1]
        here = self.drawn[:, 0] == self.done
        rows = self.drawn[here, 1].long()
        for layer, whole in enumerate(activations):
            x, own = whole.detach().float(), {n: v[layer] for n, v in self.tensors.items()}
            own["drawn"][:, here] = x[rows].T.to(torch.bfloat16)
            x = x[skip:]
            own["sum"] += x.sum(0)
            own["square"] += x.square().sum(0)
            first = self.done * t + skip
            RunningTop(own["high"], own["high_places"]).update(x, first)
            RunningTop(own["low"], own["low_places"], lowest=True).update(x, first)
        self.done += 1

    def _make(self, n_layers: int, width: int) -> None:
        size = (n_layers, width)
        for side in ("high", "low"):
            self.tensors[side] = torch.full((*size, self.settings.k), -torch.inf)
            self.tensors[f"{side}_places"] = torch.full(
                (*size, self.settings.k), -1, dtype=torch.int32
            )
        for name in ("sum", "square"):
            self.tensors[name] = torch.zeros(size, dtype=torch.float64)
        self.tensors["drawn"] = torch.zeros(*size, len(self.drawn), dtype=torch.bfloat16)

    def keep(self, folder: Path, facts: dict[str, Any]) -> None:
        """Save where the pass is, in one file, so that no part of it is of another moment."""
        from safetensors.torch import save_file

        notes = {name: str(value) for name, value in facts.items()}
        with atomic_path(folder / _PARTIAL) as part:
            save_file(self.tensors, part, metadata={**notes, "done": str(self.done)})

    def restore(self, folder: Path, facts: dict[str, Any]) -> None:
        """Go on from what `keep` saved.

        Raises:
            DataError: It is damaged.
            VesicleError: It is of another pass.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / _PARTIAL, framework="pt") as file:
                notes = dict(file.metadata() or {})
                done = int(notes.pop("done"))
                _check(folder, notes, {name: str(value) for name, value in facts.items()})
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # no dict
                self.done = done
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{folder / _PARTIAL} cannot be read: {error}") from error

    def contexts(self, facts: dict[str, Any]) -> Contexts:
        """All of it."""
        (n, t), own = self.windows.shape, self.tensors
        counted = n * (t - self.settings.skip)

        def pairs(flat: Tensor) -> Tensor:
            return torch.stack([flat // t, flat % t], -1)

        return Contexts(
            tokens=self.windows,
            activations=own["high"],
            places=pairs(own["high_places"]),
            low_activations=-own["low"],
            low_places=pairs(own["low_places"]),
            mean=own["sum"] / counted,
            mean_square=own["square"] / counted,
            drawn_places=self.drawn,
            drawn_activations=own["drawn"],
            n_tokens=counted,
            facts=facts,
        )


def _evenly(windows: Tensor, settings: ContextSettings) -> Tensor:
    """(R, 2) places, one drawn of each of R equal stretches of the tokens that count."""
    n, own = len(windows), windows.shape[1] - settings.skip
    edges = np.arange(settings.drawn + 1) * (n * own) // settings.drawn
    drawn = np.random.default_rng(settings.seed).integers(edges[:-1], edges[1:])
    places = np.stack([drawn // own, settings.skip + drawn % own], -1)
    return torch.from_numpy(places.astype(np.int32))


def _check(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if theirs.get(name) == value:
            continue
        told = f"with {name} {theirs.get(name)!r}, not {value!r}"
        if name == "windows":  # a digest tells nobody anything
            told = "of another text, or of more or less of it, or in windows of another length"
        raise VesicleError(f"{folder} holds contexts made {told}: use another folder, or remove it")
