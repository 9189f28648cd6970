"""`vesicle kept`: what a method that forgets keeps of a text."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vesicle.commands.inputs import MODEL, REVISION, check_namm, check_writable, notice, read_prompt
from vesicle.commands.machine import announce_core, announce_fallback
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.files import atomic_path
from vesicle.models.default import DEFAULT_MODEL
from vesicle.shipped import namm_for
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from rich.table import Table

    from vesicle.eviction import Forgetful
    from vesicle.kept import Kept


class MemoryMethod(StrEnum):
    """What forgets, as `vesicle eval` names it."""

    namm = "namm"
    recency = "recency"
    heavy_hitters = "heavy-hitters"


def kept(
    prompt: Annotated[
        str | None, typer.Argument(help="The text; - reads standard input.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the text from a UTF-8 file.")
    ] = None,
    memory: Annotated[
        float,
        typer.Option(help="Share of the key-value cache to hold, above 0 and below 1."),
    ] = 0.25,
    method: Annotated[MemoryMethod, typer.Option(help="What forgets.")] = MemoryMethod.namm,
    namm: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a NAMM; the default is the one shipped for the model.",
            show_default=False,
        ),
    ] = None,
    code: Annotated[
        bool,
        typer.Option(
            "--code",
            help="The text is source code, whose tokens have other classes; the default is what "
            "the file's suffix says.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help=MODEL),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a page with all of it (.html).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a method that forgets keeps of a text.

    The text is read as it is, without a chat template.

    Without --out and --json two tables are printed: of classes of tokens, and of layers.

    [bold]Examples[/bold]

      vesicle kept --file report.txt --memory 0.25 --out kept.html

      vesicle kept --file train.py --memory 0.25

      vesicle kept --file report.txt --method heavy-hitters --json > kept.json
    """
    wanted = read_prompt(prompt, file)
    _check(memory, method, namm)
    check_writable(out, "--out")
    from vesicle.engine import Engine
    from vesicle.kept import classes, read
    from vesicle.kept.analysis import check_length, sees_entries, to_dict
    from vesicle.kept.page import Subject, page
    from vesicle.kept.source import is_source
    from vesicle.models import Text, resolve_model

    suffix = "" if file is None else file.suffix
    is_code = code or (file is not None and is_source(file))
    folder = resolve_model(model, revision=revision)
    text = Text.from_folder(folder)
    ids, spans = text.encode_spans(wanted, control_tokens=False)
    if len(ids) > text.context_window:
        raise DataError(
            f"the text has {len(ids)} tokens; the model's context window is "
            f"{text.context_window}: shorten it"
        )
    name = _name(method, namm, folder)
    forgets = _forgetful(name, memory, len(ids))
    check_length(len(ids), forgets.interval)
    announce_core()
    engine = Engine.from_pretrained(folder)
    announce_fallback(engine)
    with SafeConsole(stderr=True, quiet=not sys.stderr.isatty()).status("reading ...") as status:

        def show(length: int) -> None:
            status.update(f"reading: {length} of {len(ids)} tokens ...")

        found = read(engine, forgets, ids, show)
    named, pieces = classes(wanted, spans, suffix if is_code else None), text.pieces(ids)
    model_name = model or DEFAULT_MODEL
    looks = sees_entries(forgets)
    if out is not None:
        subject = Subject(
            text=wanted,
            spans=spans,
            classes=named,
            pieces=pieces,
            model=model_name,
            method=name,
            memory=memory,
            sees_entries=looks,
        )
        with atomic_path(out) as part:
            part.write_text(page(found, subject), encoding="utf-8", newline="\n")
        notice(f"wrote {out}")
    if as_json:
        about = {
            "model": model_name,
            "model_path": str(folder),
            "method": name,
            "memory": memory,
            "interval": forgets.interval,
            "sees": "entries" if looks else "positions",
            "code": is_code,
        }
        print_json({**about, **to_dict(found, named, ids, pieces)})
    elif out is None:
        _print(found, named, looks)


def _check(memory: float, method: MemoryMethod, namm: Path | None) -> None:
    """Refuse what can be refused before anything heavy is loaded."""
    if not 0 < memory < 1:
        raise DataError(f"--memory is {memory:g}; allowed: above 0 and below 1")
    if namm is None:
        return
    if method is not MemoryMethod.namm:
        raise DataError(
            f"--namm and --method {method.value} are both given; a NAMM is of --method namm"
        )
    check_namm(namm)


def _name(method: MemoryMethod, namm: Path | None, folder: Path) -> str:
    """The method as `memory_method` names it."""
    if namm is not None:
        return f"{MemoryMethod.namm}:{namm}"
    if method is MemoryMethod.namm and namm_for(folder) is None:
        notice("no NAMM is shipped for this model: the first and the newest entries stay")
        return MemoryMethod.recency.value
    return method.value


def _forgetful(name: str, memory: float, n_tokens: int) -> Forgetful:
    from vesicle.evaluation.methods.memory import memory_method
    from vesicle.eviction import Forgetful

    method = memory_method(name, memory, n_tokens)
    assert isinstance(method, Forgetful)
    return method


def _print(found: Kept, classes: list[str], looks: bool) -> None:
    """Tables for a terminal."""
    from vesicle.kept import by_class
    from vesicle.kept.page import POSITIONS_ALONE, ratio

    console = SafeConsole(highlight=False, markup=False)
    console.print(
        f"{found.n_tokens} tokens; held: {found.over_time[-1]:.3f} after {found.asked[-1]}, when "
        f"the method was asked last, {found.share:.3f} at the end",
        soft_wrap=True,
    )
    if not looks:
        console.print(POSITIONS_ALONE, soft_wrap=True)
    table = _table("class", "tokens", "share kept", "to the mean", "at the same age")
    for row in by_class(found, classes):
        cells = (f"{row.share:.3f}", ratio(row.to_mean), ratio(row.to_age))
        table.add_row(row.name, str(row.tokens), *cells)
    console.print()
    console.print(table)
    n_heads = found.held.shape[1]
    layers = _table("layer", "share held", *(f"head {head}" for head in range(n_heads)))
    for layer, row in zip(found.layers, found.held.mean(2), strict=True):
        layers.add_row(str(layer), f"{row.mean():.3f}", *(f"{share:.3f}" for share in row))
    console.print()
    console.print(layers)


def _table(first: str, *numbers: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
