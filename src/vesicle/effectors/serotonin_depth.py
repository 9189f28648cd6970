"""Serotonin: which module each FFN runs, and whether the next layer's attention runs.

The level is a ladder. At `ffn_below` and above everything runs; under it the FFN runs its small
stand-in; under `attention_below` the next layer's attention is replaced by its stand-in as well
(keys and values are still written, so later tokens can attend to this one); under `bypass_below`
the FFN is skipped outright. Zeroing a module of a pretrained model is ruinous, so `bypass_below` is
0 by default: a skip lands on a stand-in fitted to the module that it replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vesicle.effectors.base import Effector
from vesicle.effectors.rules import Ladder, Rules
from vesicle.plan import FFN_BIG, FFN_SKIP, FFN_SMALL
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class SerotoninDepth(Effector):
    """Level to FFN module and attention run.

    Attributes:
        ffn_below: The FFN runs small under this level.
        attention_below: The next layer's attention is replaced under this level.
        bypass_below: The FFN is skipped under this level.
    """

    transmitter: ClassVar[str] = "serotonin"
    ffn_below: float = 0.5
    attention_below: float = 0.25
    bypass_below: float = 0.0

    def __post_init__(self) -> None:
        """Check the order of the ladder."""
        if not 0 <= self.bypass_below <= self.attention_below <= self.ffn_below <= 1:
            raise ValueError(
                f"serotonin steps are bypass {self.bypass_below}, "
                f"attention {self.attention_below}, ffn {self.ffn_below}; "
                "they must rise in that order within [0, 1]"
            )

    def rules(self, shape: ModelShape) -> Rules:
        """The FFN's module, and whether the next layer's attention runs."""
        ffn = ((self.ffn_below, FFN_BIG), (self.bypass_below, FFN_SMALL))
        runs = ((self.attention_below, 1),)
        who = self.transmitter
        return (
            Ladder(field="ffn", transmitter=who, steps=ffn, below=FFN_SKIP),
            Ladder(field="attention", transmitter=who, next_layer=True, steps=runs, below=0),
        )

    def mask(self, level: Tensor, step: float, temperature: float) -> Tensor:
        """Soft probability that a step of the ladder is passed.

        Args:
            level: (B, T).
            step: One of the three thresholds.
            temperature: Width of the sigmoid; 0 gives the hard step with the gradient of 0.1.

        Returns:
            (B, T) in [0, 1]; exactly 1 at level 1.
        """
        width = temperature if temperature > 0 else 0.1
        soft = torch.sigmoid((level - step) / width)
        if temperature == 0:
            soft = (level >= step).to(soft.dtype) + (soft - soft.detach())
        return torch.where(level >= 1.0, torch.ones_like(soft), soft)
