"""The effectors: one file for each transmitter's effect."""

from __future__ import annotations

from vesicle.effectors.base import Effector
from vesicle.effectors.dopamine_precision import DopaminePrecision
from vesicle.effectors.gaba_sparsity import GabaSparsity
from vesicle.effectors.serotonin_depth import SerotoninDepth

EFFECTORS: dict[str, type[Effector]] = {
    "dopamine": DopaminePrecision,
    "serotonin": SerotoninDepth,
    "gaba": GabaSparsity,
}

__all__ = ["EFFECTORS", "DopaminePrecision", "Effector", "GabaSparsity", "SerotoninDepth"]
