"""The kvpress bridge under its short name; see `vesicle.integrations.kvpress`."""

from vesicle.integrations.kvpress import (
    check_press,
    kept_by,
    make_press,
    press_method,
    press_names,
)

__all__ = ["check_press", "kept_by", "make_press", "press_method", "press_names"]
