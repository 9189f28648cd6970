"""What the settings of evaluations have in common: checks of ranges, and their form as JSON."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError
from vesicle.modulator import check_budget


def check_whole(config: Any, least: Mapping[str, int], optional: Collection[str] = ()) -> None:
    """Refuse settings that are no whole numbers, or too small.

    Args:
        config: The settings.
        least: Names, with the smallest number that is allowed.
        optional: Those that may be None.

    Raises:
        VesicleError: Naming the setting, its value and what is allowed.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or value < low:
            raise VesicleError(f"{name} is {value}; allowed: whole numbers from {low}")


def sorted_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    """Budgets from the highest on, without repetitions.

    Raises:
        BudgetError: One is outside (0, 1].
        VesicleError: There are none.
    """
    found = tuple(sorted({check_budget(b) for b in budgets}, reverse=True))
    if not found:
        raise VesicleError("budgets is empty; give at least one, above 0 and up to 1")
    return found


def as_json(config: Any) -> dict[str, Any]:
    """As JSON has it; of local `data` the name alone, as machines differ in folders."""
    values = asdict(config)
    if values["data"] is not None:
        local = Path(values["data"]).expanduser()
        values["data"] = local.name if local.exists() else values["data"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
