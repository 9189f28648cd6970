"""Fixtures shared by all tests; the builders behind them are in `tests/tiny.py`."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import CONFIGS, SHAPE, tiny_model, tiny_modulator, tokens
from vesicle.engine import core
from vesicle.engine.core import library
from vesicle.modulator import Modulator
from vesicle.shapes import ModelShape


def pytest_configure() -> None:
    """Where native code is required, nothing may be skipped or run in PyTorch for want of it."""
    if os.environ.get(library.REQUIRE) != "1":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason follows
        wanted, found = os.environ.get(core.INSTRUCTIONS), core.instructions()
    problem = core.fallback()
    if problem is None and wanted not in (None, found):
        problem = f"{core.INSTRUCTIONS} is {wanted!r}, and the native core runs {found}"
    if problem is not None:
        pytest.exit(
            f"{library.REQUIRE} is 1, but {problem}", returncode=pytest.ExitCode.TESTS_FAILED
        )


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads, and one thread repeats itself exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(
    params=[
        *((family, "sdpa") for family in CONFIGS),
        ("llama", "eager"),
        ("gpt_neox_parallel", "eager"),
    ],
    ids="-".join,
)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every family and variant, and both attention implementations: (family, attention)."""
    return request.param


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    """Every family and variant."""
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    """A tiny random model of every family, fp64, with sdpa attention."""
    return tiny_model(family)


@pytest.fixture
def llama() -> Any:
    """One tiny random model, fp64, for what does not depend on the family."""
    return tiny_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    """(1, 70) tokens: four complete blocks of cached positions and a part of the fifth."""
    return tokens(70)


@pytest.fixture
def modulator() -> Modulator:
    """A modulator for the tiny Llama."""
    return tiny_modulator(SHAPE)


@pytest.fixture
def shape() -> ModelShape:
    """The shape of the tiny Llama."""
    return SHAPE
