"""Subject: the model and the modulator that are evaluated, and who executes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vesicle.evaluation.execution.executor import Executor
from vesicle.evaluation.execution.prompts import Codec
from vesicle.evaluation.run.provenance import digest, fingerprint
from vesicle.modulator import Modulator


@dataclass(kw_only=True)
class Subject:
    """What is evaluated.

    Attributes:
        executor: Who runs items.
        codec: The model's text side.
        ends: Tokens that end an answer.
        modulator: Under whose effectors controls act; None for dense and presses alone.
        model: Name and number formats, for the record.
        modulator_name: For the record.
        hugging_face: Loads the model in transformers, which presses read.
    """

    executor: Executor
    codec: Codec
    ends: frozenset[int]
    modulator: Modulator | None
    model: dict[str, Any]
    modulator_name: str = ""
    hugging_face: Callable[[], Any] | None = None

    def modulator_facts(self) -> dict[str, Any]:
        """What the record says of the modulator; empty without one."""
        modulator = self.modulator
        if modulator is None:
            return {}
        effectors = {name: e.to_dict() for name, e in modulator.effectors.items()}
        # Through JSON, so that tuples are lists, as they are when the record is read again.
        effectors = json.loads(json.dumps(effectors))
        return {
            "name": self.modulator_name,
            "kind": modulator.predictor.kind,
            "transmitters": list(modulator.predictor.config.transmitters),
            "trained_on": modulator.info.model_name,
            "effectors": effectors,
            "sha256": digest([fingerprint(modulator), effectors, modulator.info.dial]),
        }
