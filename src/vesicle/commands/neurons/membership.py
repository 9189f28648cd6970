"""`vesicle neurons membership`: was a document in a model's training set?"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import MODEL, REVISION, check_folder, notice, numbers
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError
from vesicle.folders import check_free
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from rich.table import Table

    from vesicle.neurons.membership import Precision

_SILENT_S = 30
"""Seconds between notes where there is no progress bar."""
_HERE, _OWN = "Decoders that are trained here", "A model of your own"


class MembershipScale(StrEnum):
    """How large."""

    debug = "debug"
    small = "small"


def membership(
    out: Annotated[Path, typer.Option(help="Folder to write to; what is in it is gone on with.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Documents: a .jsonl, .jsonl.gz or .txt file or a folder of those, rows with a "
            "field text, article or document; or sample (enough for debug).",
            metavar="SOURCE",
            show_default=False,
            rich_help_panel=_HERE,
        ),
    ] = None,
    scale: Annotated[
        MembershipScale,
        typer.Option(help="debug: see that it runs; small: half an hour or more a seed."),
    ] = MembershipScale.debug,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs; more can follow later.", rich_help_panel=_HERE)
    ] = 3,
    documents: Annotated[
        int | None,
        typer.Option(
            help="Most documents. \\[default: 40 of debug, 600 of small]",
            show_default=False,
            rich_help_panel=_HERE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="How often members are read. \\[default: 4]",
            show_default=False,
            rich_help_panel=_HERE,
        ),
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(help="Documents that it was trained on, as --data.", rich_help_panel=_OWN),
    ] = None,
    others: Annotated[
        Path | None,
        typer.Option(help="Documents that it was not trained on.", rich_help_panel=_OWN),
    ] = None,
    unknown: Annotated[
        Path | None,
        typer.Option(help="Documents that may be either.", rich_help_panel=_OWN),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL, rich_help_panel=_OWN)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION, rich_help_panel=_OWN)] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Shares of the dense FLOPs at which the model is attacked too, with commas "
            "between. \\[default: 1,0.8,0.7; 1 of a model of your own]",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits of its weights, likewise: 16, 8, 4, 3 or 2. \\[default: 8,4,3,2; none of a "
            "model of your own]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Infer which documents a model was trained on, from the probabilities of their tokens.

    With --data decoders are trained here on a random half of the documents, and attacked: whole,
    by parts of documents, and at lower precision. With --members and --others it is a model of your
    own, whose members you know, that tells of --unknown ones. Beside every attack stand controls
    that must stay at 0.5.

    [bold]Examples[/bold]

      vesicle neurons membership --data sample --out runs/try --seeds 1

      vesicle neurons membership --data data/cnn_dailymail --scale small --out runs/membership

      vesicle neurons membership --model runs/mine --members seen.jsonl --others unseen.jsonl
      --unknown asked.jsonl --scale small --out runs/mine/membership
    """
    own = members is not None or others is not None
    _check_sources(data, members, others, unknown, model)
    precisions = _precisions(
        budget if budget is not None else "1" if own else "1,0.8,0.7",
        bits if bits is not None else "" if own else "8,4,3,2",
    )
    check_folder(out)
    check_free(out)
    from vesicle.neurons.membership import read_documents, run_experiment, settings_of
    from vesicle.training.display import progress_bar

    shows = sys.stderr.isatty() and not as_json
    with progress_bar("membership", 1, 0, shows) as bar:
        show = _teller(bar, shows)
        if data is not None:
            settings = settings_of(
                scale.value, seeds=seeds, precisions=precisions, documents=documents, epochs=epochs
            )
            report = run_experiment(read_documents(data), out, settings, show)
        else:
            sources = (members, others, unknown)
            report = _own_model(model, revision, sources, out, scale.value, precisions, show)
    if as_json:
        print_json(report)
        return
    _print(report)
    notice(f"wrote {out / 'report.json'}")


def _check_sources(
    data: str | None,
    members: Path | None,
    others: Path | None,
    unknown: Path | None,
    model: str | None,
) -> None:
    """Refuse options that do not go together.

    Raises:
        VesicleError: Naming what is missing or too much.
    """
    if (members is None) != (others is None):
        missing = "--others" if others is None else "--members"
        raise VesicleError(f"{missing} is missing; allowed: --members and --others together")
    if (data is None) == (members is None):
        found = "neither is given" if data is None else "both are given"
        raise VesicleError(f"{found}; allowed: --data, or --members and --others")
    if data is not None:
        for name, value in (("--unknown", unknown), ("--model", model)):
            if value is not None:
                raise VesicleError(
                    f"{name} is {value}, but with --data decoders are trained here; allowed: "
                    "with --members and --others"
                )


def _precisions(budget: str, bits: str) -> tuple[Precision, ...]:
    """Precisions of two lists of numbers, the full one first.

    Raises:
        VesicleError: A number is not allowed.
    """
    from vesicle.neurons.membership import Precision

    few = numbers(bits, "--bits")
    for number in few:
        if number != int(number):
            raise VesicleError(f"--bits has {number:g}; allowed: 16, 8, 4, 3, 2")
    asked = [Precision(budget=share) for share in numbers(budget, "--budget")]
    asked += [Precision(bits=int(number)) for number in few]
    return tuple(dict.fromkeys([Precision(), *asked]))


def _teller(bar: Callable[..., None], shows: bool) -> Callable[[int, int, str], None]:
    """Shows what goes on, or notes it now and then where there is no progress bar."""
    last = [time.monotonic()]

    def show(done: int, total: int, what: str) -> None:
        bar(done, what, total)
        if not shows and time.monotonic() - last[0] >= _SILENT_S:
            last[0] = time.monotonic()
            notice(f"part {done + 1} of {total}, {what}")

    return show


def _own_model(
    model: str | None,
    revision: str | None,
    sources: tuple[Path | None, Path | None, Path | None],
    out: Path,
    scale: str,
    precisions: tuple[Precision, ...],
    show: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """The report of a model of the user's own; documents are read before it is loaded."""
    from vesicle.neurons.membership import (
        KnownDocuments,
        attacked_of,
        infer_membership,
        read_documents,
    )

    read = [[] if source is None else read_documents(source) for source in sources]
    known = KnownDocuments(members=read[0], others=read[1], unknown=read[2])
    from vesicle.commands.neurons import subject

    loaded = subject.load(model, revision)
    attacked = attacked_of(scale, precisions)
    return infer_membership(loaded.model, loaded.text, known, out, attacked, show)


def _print(report: dict[str, Any]) -> None:
    console = SafeConsole()
    for own in report.get("decoders", [{**report, "attacks": report["precisions"][0]["attacks"]}]):
        console.print(_attacks(own, report["bag_of_words"]))
        console.print(_lengths(own))
    console.print(_precision_table(report["precisions"]))
    if "claims" in report:
        console.print(_claims(report["claims"]))
    if "unknown" in report:
        console.print(_unknown(report["unknown"]))


def _attacks(own: dict[str, Any], words: dict[str, Any]) -> Table:
    from rich.table import Table

    title = f"{own['decoder']} decoder" if "decoder" in own else "whole documents"
    table = Table("attack", "AUC (95 %)", "by seed", "chance", title=title)
    for row in own["attacks"]:
        by_chance = _range(own["other_splits"]) if row["attack"] == _judged()[0] else ""
        table.add_row(row["attack"], _figures(row), _by_seed(row), by_chance)
    table.add_section()
    table.add_row(
        "control: bag of words", _figures(words), _by_seed(words), _range(words["chance"])
    )
    table.add_row("control: other splits", f"{own['other_splits']['mean']:.3f}", "", "")
    return table


def _lengths(own: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("first tokens", *_judged(), title="parts of documents, AUC (95 %)")
    for row in own["lengths"]:
        table.add_row(str(row["tokens"]), *_judged_figures(row))
    return table


def _precision_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    heads = ("precision", "FLOPs", "bytes", "loss: members", "others", *_judged())
    table = Table(*heads, title="precision: shares of dense, nats, AUC (95 %)")
    for row in rows:
        table.add_row(
            row["precision"],
            f"{row['flops_share']:.2f}",
            f"{row['weight_share']:.2f}",
            f"{row['loss']['members']:.3f}",
            f"{row['loss']['others']:.3f}",
            *_judged_figures(row),
        )
    return table


def _claims(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("may be so", "published", "difference (95 %)", "here", title="claims")
    for row in rows:
        table.add_row(row["claim"], row["published"], _figures(row, "+"), row["verdict"])
    return table


def _unknown(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("begins", "chance of a member", title="documents of unknown membership")
    for row in rows:
        table.add_row(" ".join(row["begins"].split()), f"{row['chance']:.2f}")
    return table


def _judged() -> tuple[str, ...]:
    from vesicle.neurons.membership.report import JUDGED

    return JUDGED


def _judged_figures(row: dict[str, Any]) -> list[str]:
    """AUCs of a row by the judged attacks."""
    areas = {own["attack"]: own for own in row["attacks"]}
    return [_figures(areas[name]) for name in _judged()]


def _range(row: dict[str, float]) -> str:
    return f"{row['low']:.2f}, {row['high']:.2f}"


def _by_seed(row: dict[str, Any]) -> str:
    return " ".join(f"{one['auc']:.3f}" for one in row["by_seed"])


def _figures(row: dict[str, Any], sign: str = "") -> str:
    return f"{row['auc']:{sign}.3f} ({row['low']:{sign}.2f}, {row['high']:{sign}.2f})"
