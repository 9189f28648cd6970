"""`vesicle neurons relations`: neurons that are specific to a relation, and what they do."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from rich.table import Table

    from vesicle.neurons.relations.facts import Relation


class RelationSet(StrEnum):
    """Which facts."""

    lre = "lre"
    pararel = "pararel"
    mpararel = "mpararel"


class Reading(StrEnum):
    """Which activation of a prompt."""

    mean = "mean"
    last = "last"


@recipe.holding_out
def relations(
    data: Annotated[
        str,
        typer.Option(
            help="A folder that holds relations_lre/, pararel/ or mpararel/; or sample, a few "
            "facts that come with Vesicle.",
            metavar="DIR",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; what is in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    kind: Annotated[RelationSet, typer.Option("--set", help="Which facts.")] = RelationSet.lre,
    names: Annotated[
        str | None,
        typer.Option(
            "--relations",
            help="Names with commas between. \\[default: the eight that the model knows best]",
            show_default=False,
        ),
    ] = None,
    neurons: Annotated[
        float, typer.Option(help="A relation's neurons, as a share of the model's.")
    ] = 0.005,
    facts: Annotated[
        int, typer.Option(help="Known facts of a relation, at most; half find neurons.")
    ] = 40,
    seeds: Annotated[int, typer.Option(help="Splits of the facts.")] = 3,
    reading: Annotated[
        Reading, typer.Option(help="Activations: their mean over a prompt, or its last one.")
    ] = Reading.mean,
    languages: Annotated[
        str | None,
        typer.Option(
            help="Of mpararel, with commas between: neurons are found in the first, and silenced "
            "in all. \\[default: en]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the neurons of relations, silence them, and test what was published of them.

    A relation's neurons are those whose activation tells its prompts from all others'. Beside each
    lesion stands one of random neurons of the same layers and counts. report.json has all of it.

    [bold]Examples[/bold]

      vesicle neurons relations --data sample --out runs/try --facts 16 --seeds 1

      vesicle neurons relations --data data --out runs/relations --relations "country language,
      landmark in country, landmark on continent"

      vesicle neurons relations --data data --set mpararel --languages en,de,fr --model gemma3-270m
      --out runs/languages
    """
    from vesicle.calibration.cache import sample_key
    from vesicle.commands.neurons import subject
    from vesicle.files import write_json
    from vesicle.neurons.hooks import Hooked
    from vesicle.neurons.relations.experiment import find_relation_neurons
    from vesicle.neurons.relations.settings import RelationSettings
    from vesicle.training.display import progress_bar

    settings = RelationSettings(neurons=neurons, facts=facts, seeds=seeds, reading=reading.value)
    settings.check()
    spoken = _list(languages, "--languages") if languages is not None else ["en"]
    found, others = _read(data, kind.value, names, spoken)
    loaded = subject.load(model, revision)
    about = {
        "model": loaded.name,
        "weights": sample_key(loaded.model),
        "set": kind.value,
        "languages": spoken,
    }
    with progress_bar("relations", 1, 0, sys.stderr.isatty() and not as_json) as bar:
        report = find_relation_neurons(
            Hooked(loaded.model),
            lambda text: loaded.text.encode(text, control_tokens=False),
            found,
            settings,
            out,
            facts=about,
            named=names is not None,
            languages=others,
            show=lambda done, total, what: bar(done, what, total),
        )
    write_json(out / "report.json", report)
    if as_json:
        print_json(report)
        return
    _print(report)
    notice(f"wrote {out / 'report.json'}")


def _read(
    data: str, kind: str, names: str | None, languages: list[str]
) -> tuple[list[Relation], dict[str, dict[str, Relation]]]:
    """Relations in the first language, and all of them in the others."""
    from vesicle.neurons.relations.facts import pick, read_relations

    first, *others = languages
    known = read_relations(data, kind, first)
    chosen = list(known.values()) if names is None else pick(known, _list(names, "--relations"))
    if len(chosen) < 2:
        raise DataError(
            f"--relations names {len(chosen)}: a relation's prompts are told from others'; "
            "allowed: 2 relations and more"
        )
    return chosen, {language: read_relations(data, kind, language) for language in others}


def _list(given: str, option: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise DataError(f"{option} is {given!r}; allowed: names with commas between")
    return list(dict.fromkeys(names))


def _print(report: dict[str, Any]) -> None:
    console = SafeConsole()
    for table in (_relations(report), _doses(report["doses"]), _claims(report)):
        console.print(table)


def _relations(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(
        "relation",
        "known of asked",
        "facts lost",
        "by random neurons",
        "AP on new facts",
        "shuffled labels",
        title=f"{report['neurons']} neurons of each relation",
    )
    specific = report["specificity"]
    for n, row in enumerate(report["relations"]):
        table.add_row(
            row["relation"],
            f"{row['known']} of {row['asked']}",
            _figures(row["lost"]),
            _figures(row["lost_random"]),
            f"{specific['held_out'][n]:.2f}",
            f"{specific['shuffled'][n]:.2f}",
        )
    return table


def _doses(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("neurons", "own facts lost", "by random neurons", "others' facts", title="sizes")
    table.add_column("shared by pairs (chance)")
    for row in rows:
        figures = [_figures(row[name]) for name in ("own", "random", "others")]
        table.add_row(str(row["neurons"]), *figures, f"{row['shared']:.3f} ({row['chance']:.3f})")
    return table


def _claims(report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("claim", "difference (95 %)", "control", "here", title="published")
    for row in [*report["claims"], *report.get("languages", {}).get("claims", [])]:
        table.add_row(row["name"], _figures(row["found"]), row["control"], row["verdict"])
    return table


def _figures(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
