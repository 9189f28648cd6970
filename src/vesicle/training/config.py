"""How to train: every number that the loop depends on, and the schedules that follow from them.

The learning rate warms up linearly and falls along a cosine. Budgets follow a golden-ratio
sequence, which spreads any run of consecutive micro-steps evenly over the range.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch

from vesicle.training.objectives import TemperatureSchedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOLDEN = (math.sqrt(5) - 1) / 2
"""Between the budgets of steps: any run of them is spread evenly."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        sequence_length: Tokens in a window.
        batch_size: Windows in a micro-step; they share a budget.
        accumulation: Micro-steps in an optimizer step.
        loss_positions: Positions of a window whose next-token distributions are compared, drawn
            anew for each micro-step; 0 for all. The LM head runs for these alone.
        learning_rate: Of the predictor's weights, at its peak (Adam).
        scale_learning_rate: The same for `offset`, `log_slope` and `position_weight`.
        warm_up: Steps of linear warm-up; a cosine then falls to 0.
        budget_low: Least budget asked for, a share of the dense FLOPs.
        budget_high: Greatest.
        price: Nats per squared share off the budget.
        one_sided: Whether only overspending is priced.
        label_weight: Of the cross-entropy of what is taught, beside the distance to the dense
            model.
        task_temperature: At which tasks are mixed; at 1 all of their lessons are as frequent.
        temperature_start: Of the soft masks; 0 is straight-through.
        temperature_end: At the last step.
        clip: Greatest gradient norm.
        seed: Of the order of windows and the budgets.
        checkpoint_every: Steps between checkpoints.
        eval_every: Steps between evaluations on held-out windows; 0 for none.
        eval_windows: Held-out windows used, each at its own budget.
        patience: Evaluations without improvement before stopping; 0 to never stop early.
        dtype: Of the base model, `float32` or `bfloat16`; the predictor stays in float32.
        device: `cpu` or `cuda`.
    """

    steps: int = 1000
    sequence_length: int = 512
    batch_size: int = 1
    accumulation: int = 4
    loss_positions: int = 0
    learning_rate: float = 3e-3
    scale_learning_rate: float = 2e-2
    warm_up: int = 20
    budget_low: float = 0.55
    budget_high: float = 0.98
    price: float = 30.0
    one_sided: bool = False
    label_weight: float = 0.0
    task_temperature: float = 2.0
    temperature_start: float = 0.0
    temperature_end: float = 0.0
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 20
    eval_every: int = 50
    eval_windows: int = 8
    patience: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check that every number is in its range, and that `dtype` is known.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        whole = {
            "steps": 1,
            "sequence_length": 2,
            "batch_size": 1,
            "accumulation": 1,
            "loss_positions": 0,
            "warm_up": 0,
            "checkpoint_every": 1,
            "eval_every": 0,
            "eval_windows": 1,
            "patience": 0,
            "seed": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value}; allowed: whole numbers from {least}")
        if self.loss_positions > self.sequence_length:
            raise ValueError(
                f"loss_positions is {self.loss_positions}; allowed: up to sequence_length, "
                f"{self.sequence_length}"
            )
        for name in ("learning_rate", "scale_learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: above 0")
        for name in ("price", "label_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 and above, finite")
        if not self.task_temperature > 0:
            raise ValueError(f"task_temperature is {self.task_temperature}; allowed: above 0")
        if not 0 < self.budget_low <= self.budget_high < 1:
            raise ValueError(
                f"budgets go from {self.budget_low} to {self.budget_high}; "
                "allowed: rising, above 0 and below 1"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        TemperatureSchedule(start=self.temperature_start, end=self.temperature_end)

    def to_dict(self) -> dict[str, Any]:
        """The configuration, as JSON writes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a configuration.

        Raises:
            ValueError: For unknown keys or values out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown training setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def rate(self, step: int) -> float:
        """Factor on the learning rates in optimizer step `step`, counted from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def budget(self, micro_step: int) -> float:
        """The budget of a micro-step, counted from 0."""
        # The seed moves the sequence's start; 0.5 puts that of seed 0 in the middle of the range.
        place = (0.5 + self.seed * math.sqrt(2) + micro_step * GOLDEN) % 1.0
        return self.budget_low + (self.budget_high - self.budget_low) * place
