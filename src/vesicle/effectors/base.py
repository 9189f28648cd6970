"""Effector: turns a transmitter's level into decisions (discrete) and into masks (differentiable).

The hard side is a few `rules`, data that one function evaluates for both executors, so that one
level gives one decision everywhere. The soft side runs in torch inside the reference while
training; as its temperature falls the mask tends to the hard decision.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from vesicle.effectors.rules import Rules
from vesicle.shapes import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effector(ABC):
    """One transmitter's effect.

    Subclasses are frozen dataclasses whose fields are their configuration.
    """

    transmitter: ClassVar[str]

    @abstractmethod
    def rules(self, shape: ModelShape) -> Rules:
        """How levels become decisions on a model of `shape`."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration, as JSON writes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a configuration.

        Raises:
            ValueError: For unknown keys or values out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(
                f"unknown {cls.transmitter} setting {sorted(unknown)[0]!r}; "
                f"known: {', '.join(sorted(known))}"
            )
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)
