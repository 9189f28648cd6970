"""What a decoder's neurons, or the features of an autoencoder on it, are on a text.

One interface for all that is compared: `activations(reader, ids)` gives (tokens, features), be they

- `Neurons`: hidden units of an FFN, dense (of any family) or of experts, there times their gates;
- `Dictionary`: features of a sparse autoencoder on the residual stream or on what an FFN gives;
- `Probe`: a linear read-out for each property, fitted to it: what a single direction could know;
- `Inputs`: no model at all, the newest tokens and the position: a control.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.errors import DataError, ModelError
from vesicle.families import find_family
from vesicle.neurons.experts.autoencoder import Autoencoder
from vesicle.neurons.experts.layer import ExpertFfn

SITES = ("residual", "ffn")
"""Where an autoencoder reads: the stream after a layer, or what the layer's FFN adds to it."""


class Reader(ABC):
    """Gives features of tokens."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """How many there are."""

    @abstractmethod
    def features(self, ids: Tensor) -> Tensor:
        """(B, T, F) features of texts (B, T); 0 is rest."""


@torch.no_grad()
def activations(reader: Reader, ids: Tensor, batch: int = 16) -> Tensor:
    """(B T, F) features of all tokens of texts (B, T), text by text.

    Args:
        reader: Of which model and features.
        ids: Texts.
        batch: Texts of a pass.

    Raises:
        DataError: There are no texts, or they have no two dimensions.
    """
    if ids.dim() != 2 or not len(ids):
        raise DataError(f"texts have shape {tuple(ids.shape)}; allowed: (B, T), B at least 1")
    return torch.cat([reader.features(part).flatten(0, 1) for part in ids.split(batch)])


class Neurons(Reader):
    """Hidden units of one layer's FFN."""

    def __init__(self, model: Any, layer: int) -> None:
        """Read a Hugging Face causal LM.

        Raises:
            ModelError: It has no such layer.
        """
        self.model, self.layer = model, layer
        decoder_layer = _decoder_layer(model, layer)
        own = [part for part in decoder_layer.modules() if isinstance(part, ExpertFfn)]
        self._experts = own[0] if own else None
        self._module: nn.Module
        if self._experts is not None:
            self._module, self._n = self._experts, self._experts.size.all_units
        else:
            out = find_family(model.config).modules(decoder_layer).ffn_out
            self._module, self._n = out, out.in_features

    @property
    def n_features(self) -> int:
        """Hidden units, of all experts."""
        return self._n

    def features(self, ids: Tensor) -> Tensor:
        """What the output projection is given."""
        given = _given(self.model, self._module, ids)
        return given if self._experts is None else self._experts.as_wide_mlp().hidden(given)


class Dictionary(Reader):
    """Features of an autoencoder on a decoder."""

    def __init__(self, model: Any, layer: int, autoencoder: Autoencoder, site: str) -> None:
        """Read a Hugging Face causal LM.

        Raises:
            ModelError: It has no such layer.
            ValueError: There is no such site.
        """
        if site not in SITES:
            raise ValueError(f"site is {site!r}; allowed: {', '.join(SITES)}")
        self.model, self.autoencoder = model, autoencoder
        self._module = _site(model, layer, site)

    @property
    def n_features(self) -> int:
        """Of the autoencoder."""
        return self.autoencoder.n_features

    def features(self, ids: Tensor) -> Tensor:
        """Of what is there."""
        return self.autoencoder.encode(_output(self.model, self._module, ids))

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Put the reconstruction in the place of what is there, inside the block."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.autoencoder(output[0]), *output[1:])
            return self.autoencoder(output)

        handle = self._module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class Probe(Reader):
    """A linear read-out for each property, by ridge regression; below 0 it is 0."""

    def __init__(self, model: Any, layer: int, site: str, weight: Tensor, bias: Tensor) -> None:
        """Read a Hugging Face causal LM with weight (D, P) and bias (P,).

        Raises:
            ModelError: It has no such layer.
        """
        self.model, self.weight, self.bias = model, weight, bias
        self._module = _site(model, layer, site)

    @property
    def n_features(self) -> int:
        """One for each property."""
        return len(self.bias)

    def features(self, ids: Tensor) -> Tensor:
        """How likely each property is taken to be."""
        read = _output(self.model, self._module, ids) @ self.weight + self.bias
        return read.clamp_min(0)


class Inputs(Reader):
    """The newest tokens and the position, one feature for each value: what needs no model."""

    def __init__(self, vocabulary: int, length: int, newest: int = 2, step: int = 8) -> None:
        """Of texts.

        Args:
            vocabulary: V.
            length: Most tokens of a text.
            newest: How many of the newest tokens are told.
            step: Positions that share a feature.
        """
        self._vocabulary, self._newest, self._step = vocabulary, newest, step
        self._steps = -(-length // step)

    @property
    def n_features(self) -> int:
        """One for each token and place, and for each range of positions and all that follow."""
        return self._newest * self._vocabulary + 2 * self._steps

    def features(self, ids: Tensor) -> Tensor:
        """0 or 1."""
        parts = []
        for back in range(self._newest):
            known = nn.functional.one_hot(ids, self._vocabulary).float()
            parts.append(nn.functional.pad(known, (0, 0, back, 0))[:, : ids.shape[1]])
        reached = torch.arange(ids.shape[1])[:, None] // self._step >= torch.arange(self._steps)
        for places in (reached.float(), (~reached).float()):
            parts.append(places.expand(len(ids), -1, -1))
        return torch.cat(parts, -1)


@torch.no_grad()
def vectors(model: Any, layer: int, site: str, ids: Tensor, batch: int = 16) -> Tensor:
    """(B T, D) what an autoencoder at a site of a layer reads on texts (B, T)."""
    module = _site(model, layer, site)
    return torch.cat([_output(model, module, part).flatten(0, 1) for part in ids.split(batch)])


def ffn_inputs(model: Any, layer: int, ids: Tensor) -> Tensor:
    """(B T, D) what the FFN of a layer of experts is given on texts (B, T)."""
    ffn = next(p for p in _decoder_layer(model, layer).modules() if isinstance(p, ExpertFfn))
    return _given(model, ffn, ids).flatten(0, 1)


def _decoder_layer(model: Any, layer: int) -> nn.Module:
    layers = find_family(model.config).layers(model)
    if not 0 <= layer < len(layers):
        raise ModelError(f"layer is {layer}; allowed: 0 to {len(layers) - 1}")
    return layers[layer]


def _site(model: Any, layer: int, site: str) -> nn.Module:
    decoder_layer = _decoder_layer(model, layer)
    if site == "residual":
        return decoder_layer
    own = [part for part in decoder_layer.modules() if isinstance(part, ExpertFfn)]
    return own[0] if own else find_family(model.config).modules(decoder_layer).ffn_end


def _given(model: Any, module: nn.Module, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    return _watched(model, ids, seen, module.register_forward_pre_hook(hook))


def _output(model: Any, module: nn.Module, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    return _watched(model, ids, seen, module.register_forward_hook(hook))


@torch.no_grad()
def _watched(model: Any, ids: Tensor, seen: list[Tensor], handle: Any) -> Tensor:
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return seen[0]
