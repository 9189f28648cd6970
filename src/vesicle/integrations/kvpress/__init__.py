"""The kvpress bridge: any press that only selects cache entries, as an author of retention Plans.

A *press* (NVIDIA kvpress) decides which key-value entries of a context are kept. It runs inside one
forward pass of transformers; `kept_by` reads off which positions survived, and `press_method` hands
them to the engine, which really frees the rest.

The other way round, `namm_press.NAMMPress` is a NAMM as a press. It is not imported here: it needs
kvpress, which wraps all attention functions of its process.
"""

from vesicle.integrations.kvpress.kept import kept_by, press_method
from vesicle.integrations.kvpress.names import check_press, make_press, press_names

__all__ = ["check_press", "kept_by", "make_press", "press_method", "press_names"]
