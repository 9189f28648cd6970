"""What the records of all evaluations say: what was asked for, and what it was measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vesicle.records import Record


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """A record of an evaluation; subclasses add what was measured.

    Attributes:
        config: What was asked for, as JSON.
        config_hash: Identifies settings, data, model, modulator and versions together.
        seed: Of everything random.
        versions: Of this package and of what decides its numbers.
        hardware: CPU model, cores and threads.
        model: Name, sizes, fingerprint and number formats.
        modulator: Name, kind and fingerprint; empty without one.
    """

    what: ClassVar[str] = "an evaluation"

    config: dict[str, Any]
    config_hash: str
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, Any]
    modulator: dict[str, Any]
