"""The one place that knows how a Hugging Face model takes a cache and hands it on.

Up to transformers 5.23 the keyword of a model's forward is `past_key_values`, from 5.24 on it is
`cache` (the older name warns until 5.40), and attention modules have names of their own. So the
model is asked for its keyword, and a cache among keywords or outputs is known by what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which the model's forward takes a cache.

    Args:
        model: A Hugging Face causal LM, or its base model.
        cache: A cache to fill and to continue; None for one of the model's own, if it uses any.
    """
    parameters = inspect.signature(model.forward).parameters
    return {next((name for name in _NAMES if name in parameters), _NAMES[-1]): cache}


def find_cache(values: Mapping[str, Any]) -> Any | None:
    """The cache among a module's keyword arguments or a model's outputs; None if there is none."""
    from transformers.cache_utils import Cache

    return next((value for value in values.values() if isinstance(value, Cache)), None)
