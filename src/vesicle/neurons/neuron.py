"""One neuron, written `LAYER.NEURON` as in `12.345`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from vesicle.errors import DataError
from vesicle.shapes import ModelShape

_WRITTEN = re.compile(r"(\d{1,9})\.(\d{1,9})")


@dataclass(frozen=True, order=True)
class Neuron:
    """A hidden unit of a layer's FFN.

    Attributes:
        layer: From 0.
        index: From 0, as `blocks.N.mlp.hook_post` has it.
    """

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @classmethod
    def parse(cls, text: str, shape: ModelShape) -> Self:
        """Read what `str` writes.

        Args:
            text: Such as `12.345`.
            shape: Of the model that is to have the neuron.

        Raises:
            DataError: It is written otherwise, or the model has no such neuron.
        """
        return cls.parse_within(text, shape.n_layers, shape.ffn_width)

    @classmethod
    def parse_within(cls, text: str, n_layers: int, width: int) -> Self:
        """The same where there is no model at hand.

        Args:
            text: Such as `12.345`.
            n_layers: L of the model that is to have the neuron.
            width: Neurons of each layer.

        Raises:
            DataError: It is written otherwise, or there is no such neuron.
        """
        found = _WRITTEN.fullmatch(text.strip())
        allowed = f"LAYER.NEURON, 0.0 to {n_layers - 1}.{width - 1}"
        if found is None:
            raise DataError(f"a neuron is {text.strip()!r}; allowed: {allowed}")
        neuron = cls(int(found[1]), int(found[2]))
        if neuron.layer >= n_layers or neuron.index >= width:
            raise DataError(f"there is no neuron {neuron} in this model; allowed: {allowed}")
        return neuron
