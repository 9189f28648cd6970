"""Presses by name: `SnapKV`, `SnapKV(window_size=32)`, `AdaKV(Knorm, alpha_safeguard=0.1)`.

A name is a class of kvpress, in any case, with or without the ending `Press`. In brackets stand its
constructor's arguments: literals by keyword, and other presses for wrappers. The share of entries
to drop comes apart from the name, and is the same for every press in it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from vesicle.errors import VesicleError

_ABSTRACT = ("BasePress", "ScorerPress")
_INSTALL = "pip install 'vesicle[kvpress]'"


def press_names() -> list[str]:
    """Names, without the ending `Press`, of presses that need nothing but a compression ratio.

    Some of them need more of the model than its weights, and will say so when they run.

    Raises:
        VesicleError: If kvpress is missing, or too old or new a transformers is installed with it.
    """
    return sorted(
        _short(name)
        for name, kind in _classes().items()
        if "compression_ratio" in (parameters := inspect.signature(kind).parameters)
        and all(p.default is not p.empty for n, p in parameters.items() if n != "compression_ratio")
    )


def make_press(name: str, compression_ratio: float) -> Any:
    """Build a press of kvpress.

    Args:
        name: As in the module docstring.
        compression_ratio: Share of the entries to drop, in [0, 1).

    Raises:
        VesicleError: If the ratio is out of range, the name does not parse, no such press exists or
            it takes other arguments, or kvpress is missing.
    """
    if not 0 <= compression_ratio < 1:
        raise VesicleError(f"compression ratio is {compression_ratio}; allowed: 0 to below 1")
    try:
        node = ast.parse(name.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # ValueError: a null byte
        raise _unreadable(name) from None
    return _build(node, float(compression_ratio), name)


def check_press(name: str) -> None:
    """Refuse what `make_press` cannot build at any ratio.

    Raises:
        VesicleError: As `make_press`.
    """
    make_press(name, 0.0)


def _build(node: ast.expr, ratio: float, whole: str) -> Any:
    """The press that a part of a name stands for."""
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise _unreadable(whole)
    kind = _find(node.func.id)
    settings: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _unreadable(whole)
        settings[keyword.arg] = _argument(keyword.value, ratio, whole)
    inner = [_build(argument, ratio, whole) for argument in node.args]
    if "compression_ratio" in settings:
        raise VesicleError(f"{whole!r} sets compression_ratio, which is given apart from the name")
    if "compression_ratio" in inspect.signature(kind).parameters:
        settings["compression_ratio"] = ratio
    try:
        press = kind(*inner, **settings)
        if "compression_ratio" not in settings:
            _set_ratio(press, ratio)
    except VesicleError:
        raise
    except Exception as error:  # a constructor of kvpress may check with anything
        raise VesicleError(f"cannot build {whole!r}: {error or type(error).__name__}") from error
    return press


def _argument(node: ast.expr, ratio: float, whole: str) -> Any:
    """A literal, or another press."""
    if isinstance(node, ast.Name | ast.Call):
        return _build(node, ratio, whole)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise _unreadable(whole) from None


def _set_ratio(press: Any, ratio: float) -> None:
    """Set the ratio of a wrapper, which hands it on; refuse presses that have none to set."""
    try:
        if not isinstance(getattr(type(press), "compression_ratio", None), property):
            raise AttributeError
        press.compression_ratio = ratio
    except AttributeError:
        raise VesicleError(
            f"{type(press).__name__} takes no compression ratio; build it with kvpress and hand "
            "the press itself to press_method"
        ) from None


def _find(name: str) -> type[Any]:
    """A press's class by its name, in any case."""
    known = {_short(full).lower(): kind for full, kind in _classes().items()}
    wanted = _short(name).lower()
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(_short(known[n].__name__) for n in near)}?" if near else ""
    raise VesicleError(f"kvpress has no press {name!r}; {hint or f'it has {_listed(known)}'}")


def _listed(known: dict[str, type[Any]]) -> str:
    return ", ".join(sorted(_short(kind.__name__) for kind in known.values()))


def _short(name: str) -> str:
    """A class's name without the ending `Press`."""
    return name[:-5] if name.lower().endswith("press") else name


def _unreadable(name: str) -> VesicleError:
    return VesicleError(
        f"cannot read press {name!r}; allowed: a name such as SnapKV, with keyword arguments that "
        "are literals, such as SnapKV(window_size=32), or other presses, such as AdaKV(SnapKV)"
    )


def _classes() -> dict[str, type[Any]]:
    """Every press of kvpress by its class's name."""
    kvpress = find_kvpress()
    return {
        name: kind
        for name, kind in inspect.getmembers(kvpress, inspect.isclass)
        if issubclass(kind, kvpress.BasePress) and name not in _ABSTRACT
    }


def find_kvpress() -> ModuleType:
    """The package kvpress.

    Raises:
        VesicleError: If it is missing, or does not work with the transformers that is installed.
    """
    try:
        needs = metadata.requires("kvpress") or []
    except metadata.PackageNotFoundError:
        raise VesicleError(f"presses need kvpress, which is missing: {_INSTALL}") from None
    from packaging.requirements import Requirement

    installed = metadata.version("transformers")
    for needed in map(Requirement, needs):
        if needed.name == "transformers" and not needed.specifier.contains(installed):
            raise VesicleError(
                f"kvpress {metadata.version('kvpress')} needs transformers {needed.specifier}; "
                f"{installed} is installed: {_INSTALL}"
            )
    try:
        return import_module("kvpress")
    except ImportError as error:
        raise VesicleError(f"kvpress does not import ({error}): {_INSTALL}") from error
