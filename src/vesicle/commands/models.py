"""`vesicle models`: what can be named, what the cache holds, and fetching and removing it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.terminal import AnswerWriter, SafeConsole, one_line

if TYPE_CHECKING:
    from vesicle.models.cached import Cached


def models(
    fetch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Fetch and convert a model of the catalogue, and print its folder.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Remove what the cache holds of a model: a name as it is listed.",
            show_default=False,
        ),
    ] = None,
    packing: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Load a model, named as for other commands, and list how its matrices are packed "
            "and the largest error of each.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """List the models that go by a short name, and what the cache holds.

    Beside the catalogue it lists conversions of your own GGUF files. Models of the hub lie in the
    hub's own cache.

    [bold]Examples[/bold]

      vesicle models

      vesicle models --json

      vesicle models --fetch gemma3-270m

      vesicle models --remove gemma3-270m

      vesicle models --packing gemma3-270m
    """
    given = {
        "--fetch": fetch is not None,
        "--remove": remove is not None,
        "--packing": packing is not None,
        "--json": as_json and packing is None,
    }
    if sum(given.values()) > 1:
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise DataError(f"{names} are given together; give one")
    if packing is not None:
        _print_packing(packing, as_json)
    elif fetch is not None:
        from vesicle.models.fetch import ensure_model

        AnswerWriter(sys.stdout).write(f"{ensure_model(fetch)}\n")
    elif remove is not None:
        _remove(remove)
    elif as_json:
        _print_json()
    else:
        _print_list()


def _print_packing(model: str, as_json: bool) -> None:
    """How the engine packs a model's matrices, in the order of loading."""
    from dataclasses import asdict

    from vesicle.models import resolve_model

    folder = resolve_model(model, option="--packing")
    from vesicle.engine import Engine

    engine = Engine.from_pretrained(folder)
    if as_json:
        matrices = [asdict(p) for p in engine.packing]
        print_json({"weights": engine.weights_format, "matrices": matrices})
        return
    console = SafeConsole(highlight=False, markup=False, soft_wrap=True)
    if not engine.packing:
        console.print(f"nothing is packed: weights are {engine.weights_format}")
        return
    width = max(len(p.name) for p in engine.packing)
    title = "matrix, the first of those joined"
    console.print(f"{title:{width}}  file         bits  largest error")
    for p in engine.packing:
        kinds = ", ".join(p.kinds) or "-"
        error = f"{p.error:.2g}, {p.error / p.largest:.2%} of the largest" if p.error else "exact"
        console.print(f"{one_line(p.name):{width}}  {kinds:11}  {p.bits:4}  {error}")


def _remove(name: str) -> None:
    from vesicle.models.cached import remove_cached

    n_bytes = remove_cached(name)
    print(f"removed {name}: {_size(n_bytes)}" if n_bytes else f"nothing of {name} is cached")


def _print_json() -> None:
    from vesicle.files import cache_root
    from vesicle.models.cached import cached, conversions
    from vesicle.models.catalogue import CATALOGUE

    catalogue = []
    for entry in CATALOGUE.values():
        found = cached(entry)
        about = {
            "name": entry.name,
            "what": entry.what,
            "licence": entry.licence,
            "terms": entry.terms or None,
            "download_bytes": entry.download_bytes,
        }
        held = {"gguf_bytes": found.gguf_bytes, "gguf_ready": found.gguf_ready}
        held["parts_bytes"] = found.parts_bytes
        catalogue.append({**about, **_state(found), **held})
    own = [{"name": c.name, "source": c.source, **_state(c)} for c in conversions()]
    folder = str(cache_root() / "models")
    print_json({"folder": folder, "catalogue": catalogue, "conversions": own})


def _print_list() -> None:
    from vesicle.files import cache_root
    from vesicle.models.cached import cached, conversions
    from vesicle.models.catalogue import CATALOGUE

    rows = [
        (
            entry.name,
            entry.what,
            f"{entry.licence}; download {_size(entry.download_bytes)}; {_held(cached(entry))}",
        )
        for entry in CATALOGUE.values()
    ]
    for found in conversions():
        source = "an unknown file" if found.source is None else one_line(found.source)
        rows.append((found.name, f"converted from {source}", _held(found)))
    width = max(len(name) for name, *_ in rows)
    console = SafeConsole(highlight=False, markup=False, soft_wrap=True)
    for name, *lines in rows:
        for lead, line in zip((name, ""), lines, strict=True):
            console.print(f"{lead:{width}}  {line}")
    console.print(f"\nThe cache is {one_line(str(cache_root() / 'models'))}")


def _state(found: Cached) -> dict[str, Any]:
    """What both lists of the JSON tell."""
    return {
        "path": str(found.folder),
        "ready": found.ready,
        "folder_bytes": found.folder_bytes,
    }


def _held(found: Cached) -> str:
    folder = f"{_size(found.folder_bytes)}{'' if found.ready else ' (to be made anew)'}"
    gguf = f"GGUF {_size(found.gguf_bytes)}{'' if found.gguf_ready else ' (to be fetched anew)'}"
    parts = [
        folder if found.ready or found.folder_bytes else "",
        gguf if found.gguf_bytes else "",
        f"{_size(found.parts_bytes)} of the download" if found.parts_bytes else "",
    ]
    return "cached: " + (", ".join(part for part in parts if part) or "nothing")


def _size(n_bytes: int) -> str:
    """Megabytes; below ten of them, with a digit more."""
    return f"{n_bytes / 1e6:,.{0 if n_bytes >= 10_000_000 else 1}f} MB"
