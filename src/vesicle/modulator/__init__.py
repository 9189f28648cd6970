"""Modulator: releases levels for each token and layer, and turns them into a Plan.

`modulator.at(budget)` is the Method. One checkpoint serves every budget. A budget is a share of the
dense FLOPs of the tokens that it governs: the generated ones by default (see `phases`), or all. The
*dial* is the predictor's own scale, and a table measured on calibration text maps one to the other,
so that the executed share is the budget on such text. There are up to three tables: where every
token is governed, where prompts rest, and where GABA alone acts, which is measured in long texts.
"""

from vesicle.modulator.author import DECIMALS, ModulatorAuthor, plan_rows
from vesicle.modulator.info import Dial, Measured, ModulatorInfo, check_budget
from vesicle.modulator.method import ModulatorMethod, served
from vesicle.modulator.modulator import Modulator
from vesicle.modulator.saved import keep_modulator

__all__ = [
    "DECIMALS",
    "Dial",
    "Measured",
    "Modulator",
    "ModulatorAuthor",
    "ModulatorInfo",
    "ModulatorMethod",
    "check_budget",
    "keep_modulator",
    "plan_rows",
    "served",
]
