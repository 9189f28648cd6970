"""Does a description tell contexts where the neuron fires from random ones? Two detectors.

    model    log p(d | context) - log p(d), as `mutual_information` tells
    lexical  for a named class, whether the token is of it; for other descriptions the mean over
             their tokens of the nearest of the context's tokens,
             max over j of  0.95 ** j  cos(e(d), e(context token j before the last)),
             with e the model's input embeddings less their mean

A neuron's score is the AUC: the probability that a context of its own stands above a random one.
Within one description p(d) shifts all scores alike, and the AUC does not see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vesicle.errors import DataError
from vesicle.models import Text
from vesicle.neurons.descriptions.classes import CLASSES
from vesicle.neurons.descriptions.spots import Spot

_FADE = 0.95


class LexicalDetector:
    """Compares a description with a context's tokens, without running a model."""

    def __init__(self, model: nn.Module, text: Text) -> None:
        """Take a model's input embeddings.

        Args:
            model: A Hugging Face causal LM.
            text: Its text side.
        """
        loaded: Any = model
        self._table: Tensor = loaded.get_input_embeddings().weight.detach()
        self._mean = self._table.float().mean(0)
        self._text = text

    def scores(self, spots: Sequence[Spot], description: str) -> Tensor:
        """(M,) the higher, the likelier described.

        Raises:
            DataError: The description is blank.
        """
        if description in CLASSES:
            return torch.tensor([float(CLASSES[description](spot)) for spot in spots])
        if not description.strip():
            raise DataError(f"a description is {description!r}; allowed: visible characters")
        # As it begins a word and as it goes on with one.
        ways = [
            self._text.encode(start + description, control_tokens=False, continues=True)
            for start in (" ", "")
        ]
        return torch.stack([self._similarities(spots, ids) for ids in ways]).amax(0)

    def _similarities(self, spots: Sequence[Spot], ids: Sequence[int]) -> Tensor:
        described, found = self._embedded(ids), []
        for spot in spots:
            near = self._embedded(spot.ids) @ described.T  # (n, d)
            fading = _FADE ** torch.arange(len(spot.ids) - 1, -1, -1)
            found.append((fading[:, None] * near).amax(0).mean())
        return torch.stack(found)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """(n, D) unit vectors."""
        return normalize(self._table[list(ids)].float() - self._mean, dim=-1)
