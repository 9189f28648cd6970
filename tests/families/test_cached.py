"""How models take a cache and hand it on, whatever the installed transformers calls it."""

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.tiny import tokens
from vesicle.families import cache_argument, find_cache

SOURCE = Path(__file__).parents[2] / "src" / "vesicle"


class Named(nn.Module):
    """A model whose forward takes its cache as transformers did from 5.0 to 5.23."""

    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


class Renamed(nn.Module):
    """The same as of 5.24."""

    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(("kind", "name"), [(Named, "past_key_values"), (Renamed, "cache")])
def test_the_models_own_name_is_used(kind: type[nn.Module], name: str):
    assert cache_argument(kind(), "a cache") == {name: "a cache"}


@pytest.mark.parametrize("base", [False, True], ids=["lm", "base"])
def test_a_cache_is_taken_filled_and_found_without_a_warning(model: Any, base: bool):
    module, cache = (model.base_model if base else model), DynamicCache()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = module(tokens(5), **cache_argument(module, cache))
    assert find_cache(out) is cache
    assert cache.get_seq_length() == 5


def test_nothing_is_found_where_there_is_no_cache(llama: Any):
    assert find_cache(llama(tokens(5), use_cache=False)) is None
    assert find_cache({"input_ids": tokens(5), "cache": None}) is None


def test_one_place_knows_the_name():
    """Names of arguments and attributes only: a docstring may say what it likes."""
    knowing = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case (
                    ast.keyword(arg="past_key_values")
                    | ast.Attribute(attr="past_key_values")
                    | ast.Constant(value="past_key_values" | "layer_past")
                ):
                    knowing.add(str(path.relative_to(SOURCE)))
    assert knowing == {"families/cached.py"}
