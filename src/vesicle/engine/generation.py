"""What `Engine.generate` gives back: a text, and what was decided and spent for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vesicle.cost import Cost
from vesicle.plan import FloatArray, Plan

if TYPE_CHECKING:
    from vesicle.engine.sequence import Sequence


class Generation(NamedTuple):
    """New tokens after a prompt, and the sequence that they belong to.

    A named tuple, since `ids, sequence = engine.generate(...)` is how a generation is taken apart.

    Attributes:
        ids: The new tokens, without the one that ended the text.
        sequence: The whole text's, prompt included; it holds its cache until it is closed, and may
            go on.
    """

    ids: list[int]
    sequence: Sequence

    @property
    def text(self) -> str:
        """The new tokens as text, without special tokens.

        Raises:
            VesicleError: If the engine has no tokenizer.
        """
        return self.sequence.engine.text.decode(self.ids)

    @property
    def plan(self) -> Plan:
        """What was decided for every token, prompt included."""
        return self.sequence.plan

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5), prompt included; (0, L, 5) for methods that have none."""
        return self.sequence.levels

    @property
    def cost(self) -> Cost:
        """Counted work, prompt included."""
        return self.sequence.cost

    @property
    def dense_cost(self) -> Cost:
        """What the same work costs the dense model."""
        return self.sequence.dense_cost

    @property
    def share(self) -> float:
        """Executed FLOPs over dense FLOPs; exactly 1 at rest."""
        return self.sequence.share
