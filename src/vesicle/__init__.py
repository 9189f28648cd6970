"""Vesicle: neurotransmitters for language models, which spend compute per token and layer.

The names below are imported when they are first used, so that `import vesicle` loads no torch.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing itself is not imported: Ctrl-C would find nobody here to take it
if TYPE_CHECKING:
    from vesicle.cost import Cost, price, price_dense
    from vesicle.engine import Engine, Sampling
    from vesicle.errors import VesicleError
    from vesicle.models import Text, resolve_model
    from vesicle.modulator import Modulator
    from vesicle.phases import Phases
    from vesicle.plan import Dense, Method, Plan, Replay
    from vesicle.reference.attach import attach
    from vesicle.shipped import load_default_modulator

_HOMES = {
    "Cost": "vesicle.cost",
    "Dense": "vesicle.plan",
    "Engine": "vesicle.engine",
    "Method": "vesicle.plan",
    "Modulator": "vesicle.modulator",
    "Phases": "vesicle.phases",
    "Plan": "vesicle.plan",
    "Replay": "vesicle.plan",
    "Sampling": "vesicle.engine",
    "Text": "vesicle.models",
    "VesicleError": "vesicle.errors",
    "attach": "vesicle.reference.attach",
    "load_default_modulator": "vesicle.shipped",
    "price": "vesicle.cost",
    "price_dense": "vesicle.cost",
    "resolve_model": "vesicle.models",
}

__all__ = [
    "Cost",
    "Dense",
    "Engine",
    "Method",
    "Modulator",
    "Phases",
    "Plan",
    "Replay",
    "Sampling",
    "Text",
    "VesicleError",
    "__version__",
    "attach",
    "load_default_modulator",
    "price",
    "price_dense",
    "resolve_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
