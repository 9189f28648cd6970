"""The supported model families and how to find one."""

from __future__ import annotations

from typing import Any

from vesicle.errors import ModelError
from vesicle.families.base import DecoderConfig, Family
from vesicle.families.cached import cache_argument, find_cache
from vesicle.families.gemma3 import Gemma3Family
from vesicle.families.gpt_neox import GptNeoxFamily
from vesicle.families.llama import LlamaFamily
from vesicle.families.settings import SETTINGS, Setting, settings_of

FAMILIES: dict[str, type[Family]] = {
    "llama": LlamaFamily,
    "gemma3": Gemma3Family,
    "gpt_neox": GptNeoxFamily,
}

__all__ = [
    "FAMILIES",
    "SETTINGS",
    "DecoderConfig",
    "Family",
    "Setting",
    "cache_argument",
    "find_cache",
    "find_family",
    "settings_of",
    "supported_model_types",
]


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that a family answers for."""
    return tuple(t for family in FAMILIES.values() for t in family.model_types)


def find_family(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ModelError: If none answers for its `model_type`; the message lists what is supported.
    """
    for family in FAMILIES.values():
        if config.model_type in family.model_types:
            return family()
    raise ModelError(
        f"model type {config.model_type!r} is not supported; "
        f"supported: {', '.join(supported_model_types())}"
    )
