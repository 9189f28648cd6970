"""EvalConfig: what `vesicle regret` is asked for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from vesicle.errors import VesicleError
from vesicle.evaluation.methods.descent import OracleConfig
from vesicle.evaluation.methods.names import ON_A_TEXT as METHODS
from vesicle.evaluation.methods.names import check_name
from vesicle.evaluation.report.results import TEXT, Key
from vesicle.evaluation.run.settings import as_json, check_whole, sorted_budgets
from vesicle.evaluation.run.task_config import TaskConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_ORACLE = OracleConfig()
_USUAL = tuple(name for name in METHODS if name != "static-shape")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        data: A file, a folder or a hub data set, as `vesicle.training.data` tells.
        split: Which part of it.
        field: The field of JSON lines that holds the text.
        length: Tokens in a window.
        limit: Windows, spread evenly over the text; None for all.
        budgets: Shares of the dense FLOPs, each in (0, 1].
        methods: Of `METHODS`; all but `static-shape` by default, whose search takes long.
        seed: Of random controls and bootstraps.
        best_of: Random tables among which `best-of-n` selects.
        selection_windows: Evaluated windows on which it selects: the first ones.
        selection_length: Their tokens, from the beginning.
        oracle_windows: Evaluated windows that the oracle searches on, spread evenly.
        oracle_length: Their tokens, from the beginning.
        oracle: How it searches.
        dtype: Of the model: `bfloat16`, `float32` or `float64`; the predictor stays as it is.
        batch: Windows in a forward pass.
    """

    data: str
    split: str = "test"
    field: str = "text"
    length: int = 1024
    limit: int | None = 16
    budgets: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6)
    methods: tuple[str, ...] = _USUAL
    seed: int = 0
    best_of: int = 100
    selection_windows: int = 2
    selection_length: int = 512
    oracle_windows: int = 2
    oracle_length: int = 512
    oracle: OracleConfig = _ORACLE
    dtype: str = "bfloat16"
    batch: int = 2

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        least = {
            "length": 2,
            "limit": 1,
            "seed": 0,
            "best_of": 1,
            "selection_windows": 1,
            "selection_length": 2,
            "oracle_windows": 1,
            "oracle_length": 2,
            "batch": 1,
        }
        check_whole(self, least, optional=("limit",))
        object.__setattr__(self, "budgets", sorted_budgets(self.budgets))
        if not self.methods:
            raise VesicleError(f"methods is empty; known: {', '.join(METHODS)}")
        for method in self.methods:
            check_name(method, METHODS)
        object.__setattr__(self, "methods", tuple(m for m in METHODS if m in self.methods))
        if self.dtype not in DTYPES:
            raise VesicleError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it; of a local source the name alone."""
        return as_json(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a configuration.

        Raises:
            VesicleError: For unknown keys or values out of range.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise VesicleError(
                    f"unknown evaluation setting {name!r}; known: {', '.join(known)}"
                )
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if isinstance(given.get("oracle"), dict):
            given["oracle"] = OracleConfig(**given["oracle"])
        return cls(**given)

    def rules(self) -> TaskConfig:
        """How rows are run, as all tasks have it."""
        return TaskConfig(
            tasks=("wikitext2",),
            methods=self.methods,
            budgets=self.budgets,
            seed=self.seed,
            best_of=self.best_of,
            selection=self.selection_windows,
        )

    def keys(self) -> list[Key]:
        """The rows of the evaluation, in the order in which they are computed.

        At a budget of 1 every method is the dense model, so that the learnt one alone is run, as a
        check.
        """
        keys = self.rules().keys(TEXT)
        if 1 in self.budgets and "learnt" in self.methods:
            keys.insert(1, (TEXT, "learnt", 1.0))
        return keys + self.rules().oracle_keys(TEXT)
