"""What lm_eval's requests cost: executed work beside the dense model's for the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vesicle.cost import Cost, price_dense_span
from vesicle.engine import Sequence
from vesicle.phases import GENERATED
from vesicle.shapes import ModelShape


@dataclass
class Tally:
    """Executed work, and the dense model's for the same tokens; of generated ones apart."""

    shape: ModelShape
    tokens: int = 0
    executed: Cost = field(default_factory=Cost)
    dense: Cost = field(default_factory=Cost)
    generated: int = 0
    generated_dense: int = 0

    def add(self, sequence: Sequence, executed: Cost, start: int, stop: int, head: int) -> None:
        """Add the work on a sequence's tokens `start` to `stop`, with logits from `head` on."""
        self.tokens += stop - start
        self.executed += executed
        self.dense += price_dense_span(self.shape, start, stop, head)
        counted = sequence.phase(GENERATED)
        counted[:start] = counted[stop:] = False
        self.generated += sequence.cost_of(counted).flops_total
        self.generated_dense += sequence.dense_cost_of(counted).flops_total

    @property
    def generated_share(self) -> float:
        """Executed share of the dense FLOPs of generated and scored tokens; 1 without any."""
        return self.generated / self.generated_dense if self.generated_dense else 1.0

    @property
    def share(self) -> dict[str, float]:
        """Executed over dense, by quantity."""
        return self.executed.ratio(self.dense)

    def to_dict(self) -> dict[str, Any]:
        """As lm_eval writes it into its results."""
        return {
            "tokens": self.tokens,
            "executed": self.executed.summary(),
            "dense": self.dense.summary(),
            "share": self.share,
            "generated_share": self.generated_share,
        }
