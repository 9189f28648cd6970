"""Directions of the residual stream as scores of tokens.

Davies 2025 ("Decoding specialised feature neurons in LLMs with the final projection layer") reads a
neuron's weights through the LM head as if they were a final hidden state. Here a direction v goes
through all that follows the last layer: logits = W_U (g * v / rms(v)), with g the final norm's gain
(of LayerNorm, v less its mean). So a direction has no length, and its probabilities are those of
a hidden state that holds nothing else.

With a lens, v is carried from its layer to the last first: logits = W_U (g * J v / rms(J v)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.families import find_family
from vesicle.families.base import Affine
from vesicle.shapes import ModelShape

KINDS = ("gate", "up", "down")
"""The projections that a neuron has weights of; `gate` of gated FFNs alone."""


class Readout:
    """A model's neurons as directions, and directions as scores of tokens.

    Attributes:
        shape: Of the model.
        kinds: Projections that it has.
        head: (V, D).
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the weights of a Hugging Face causal LM.

        Args:
            model: Of a supported family, in fp32.

        Raises:
            ModelError: Its family is not supported.
        """
        loaded: Any = model
        self._family = find_family(loaded.config)
        self._config = self._family.decoder_config(loaded.config)
        parameters = dict(loaded.named_parameters(remove_duplicate=False))
        self._lookup = parameters.get
        whole = self._family.model_tensors(self._lookup)
        self.shape: ModelShape = self._config.shape
        self.kinds = KINDS if self.shape.gated else KINDS[1:]
        self.head = whole.head.detach().float()
        self._norm = whole.final_norm

    def directions(self, layer: int, kind: str) -> Tensor:
        """(F, D) of every neuron of a layer.

        Of `gate` and `up` the direction of the residual stream that excites it most, the norm's
        gain included; of `down` the direction that it writes, with the gain of a norm after it.
        """
        own = self._family.layer_tensors(self._config, layer, self._lookup)
        if kind == "down":
            written = own.down.weight.detach().float().T
            return written if own.ffn_post_norm is None else written * _gain(own.ffn_post_norm)
        read = own.gate if kind == "gate" else own.up
        assert read is not None
        return read.weight.detach().float() * _gain(own.ffn_norm)

    def normed(self, directions: Tensor, lens: Tensor | None = None) -> Tensor:
        """(N, D) what the LM head reads of directions (N, D), carried by a lens (D, D) if any."""
        v = directions if lens is None else directions @ lens.T
        if not self._config.rms_norm:
            v = v - v.mean(-1, keepdim=True)
        rms = v.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        return v / rms * _gain(self._norm)

    def logits(self, directions: Tensor, lens: Tensor | None = None) -> Tensor:
        """(N, V) of directions (N, D)."""
        return self.normed(directions, lens) @ self.head.T


def _gain(norm: Affine) -> Tensor:
    return norm.weight.detach().float()


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """The likeliest tokens of N directions, and of their opposites.

    Attributes:
        ids: (N, 2, k) of tokens, int32.
        chances: (N, 2, k) their probabilities.
        scores: (N, 2) by how many standard deviations of all tokens' logits the first one stands
            above their mean. Probabilities of directions saturate, and scores do not.
    """

    ids: Tensor
    chances: Tensor
    scores: Tensor


def likeliest(logits: Tensor, k: int) -> Likeliest:
    """Of directions' logits (N, V), the k likeliest tokens both ways."""
    spread, mean = torch.std_mean(logits, dim=-1)
    ids, chances, scores = [], [], []
    for own, middle in ((logits, mean), (-logits, -mean)):
        value, token = own.topk(k, dim=-1)
        ids.append(token.int())
        chances.append((value - own.logsumexp(-1, keepdim=True)).exp())
        scores.append((value[:, 0] - middle) / spread.clamp_min(1e-12))
    return Likeliest(
        ids=torch.stack(ids, 1), chances=torch.stack(chances, 1), scores=torch.stack(scores, 1)
    )
