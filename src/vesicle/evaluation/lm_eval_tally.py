"""What lm_eval's requests cost: executed work beside the dense model's for the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vesicle.cost import Cost, price_dense_span
from vesicle.shapes import ModelShape


@dataclass
class Tally:
    """Executed work, and the dense model's for the same tokens."""

    shape: ModelShape
    tokens: int = 0
    executed: Cost = field(default_factory=Cost)
    dense: Cost = field(default_factory=Cost)

    def add(self, executed: Cost, start: int, stop: int, head: int) -> None:
        """Add the work on a sequence's tokens `start` to `stop`, with logits from `head` on."""
        self.tokens += stop - start
        self.executed += executed
        self.dense += price_dense_span(self.shape, start, stop, head)

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
        }
