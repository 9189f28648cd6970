"""Models: where they come from and how their text is tokenised.

Importing this package is cheap: neither torch nor transformers is loaded.
"""

from vesicle.models.default import DEFAULT_MODEL, ensure_default_gguf, ensure_default_model
from vesicle.models.fetch import ensure_gguf, ensure_model
from vesicle.models.resolve import resolve_model
from vesicle.models.text import Text

__all__ = [
    "DEFAULT_MODEL",
    "Text",
    "ensure_default_gguf",
    "ensure_default_model",
    "ensure_gguf",
    "ensure_model",
    "resolve_model",
]
