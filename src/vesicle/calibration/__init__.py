"""Calibration: what is fitted by forward passes alone, before and after training.

- `standins`: the small maps that skipped modules land on;
- `sensitivity`: what lowering each level costs and saves, and a static allocation from it;
- `preview`: the directions by which the LM head is previewed;
- `dial`: which position of the dial executes which share of the dense FLOPs;
- `long_texts`: the same where GABA alone acts, in long texts.

Everything takes a Hugging Face model and windows of token ids (N, T).
"""

from __future__ import annotations

from vesicle.calibration.dial import measure_dial
from vesicle.calibration.long_texts import measure_long
from vesicle.calibration.preview import fit_preview
from vesicle.calibration.sensitivity import Sensitivity, allocate, measure_sensitivity
from vesicle.calibration.standins import StandInErrors, fit_standins

__all__ = [
    "Sensitivity",
    "StandInErrors",
    "allocate",
    "fit_preview",
    "fit_standins",
    "measure_dial",
    "measure_long",
    "measure_sensitivity",
]
