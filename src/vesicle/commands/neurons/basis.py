"""`vesicle neurons basis`: the Local Interaction Basis, beside PCA and random rotations."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError

if TYPE_CHECKING:
    from vesicle.neurons.basis import BasisReport, Graph, LayerStudy

    Found = tuple[BasisReport, dict[str, Graph]]


class What(StrEnum):
    """What the basis is found of."""

    modular = "modular"
    model = "model"


@recipe.holding_out
def basis(
    what: Annotated[
        What,
        typer.Argument(help="Networks for modular addition, trained here, or a language model."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; what is done in it is kept.")],
    seeds: Annotated[int, typer.Option(help="modular: networks to train.")] = 3,
    modulus: Annotated[int, typer.Option(help="modular: addition modulo this number.")] = 113,
    steps: Annotated[int, typer.Option(help="modular: training steps.")] = 1500,
    pairs: Annotated[int, typer.Option(help="modular: pairs of numbers to measure on.")] = 1000,
    parts: Annotated[
        int | None,
        typer.Option(
            help="Parts of the path of integrated gradients. \\[default: modular 8, model 1]",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="model: two adjacent layers, from 0, with a comma between.")
    ] = "10,11",
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="model: a .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set.",
            metavar="SOURCE",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    windows: Annotated[int, typer.Option(help="model: windows that bases come from.")] = 32,
    held_out: Annotated[int, typer.Option(help="model: others, to measure on.")] = 8,
    length: Annotated[int, typer.Option(min=3, help="model: tokens of a window.")] = 64,
    probes: Annotated[
        int, typer.Option(help="model: random cotangents of a window, for each layer.")
    ] = 16,
    features: Annotated[
        int | None,
        typer.Option(
            help="model: compare so many features, the most important. \\[default: all]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="model: of texts and random numbers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the features of layers that interact sparsely, and tell how sparsely.

    The Local Interaction Basis (Bushnaq et al. 2024) stands beside PCA, PCA scaled by importance,
    and a random rotation, all with as many features. Writes report.json, report.html and the
    interaction graphs as SVG.

    [bold]Examples[/bold]

      vesicle neurons basis modular --out runs/modular

      vesicle neurons basis modular --modulus 53 --seeds 1 --out runs/one

      vesicle neurons basis model --layers 10,11 --data test.txt --out runs/layers
    """
    if what is What.modular:
        parts = 8 if parts is None else parts
        found = _modular(seeds, modulus, steps, pairs, parts, out, not as_json)
    else:
        from vesicle.neurons.basis import LayerStudy

        study = LayerStudy(
            layer=_first_of(layers),
            windows=windows,
            held_out=held_out,
            probes=probes,
            parts=1 if parts is None else parts,
            features=features,
            seed=seed,
        )
        if data is None:
            raise VesicleError("--data is missing: a model needs text, such as --data test.txt")
        found = _model(study, model, revision, data, split, field, length, out, not as_json)
    _finish(*found, out, as_json)


def _modular(
    seeds: int, modulus: int, steps: int, pairs: int, parts: int, out: Path, shows: bool
) -> Found:
    from vesicle.neurons.basis import ModularConfig, ModularStudy, study_modular
    from vesicle.training.display import progress_bar

    study = ModularStudy(
        config=ModularConfig(modulus=modulus, steps=steps), seeds=seeds, pairs=pairs, parts=parts
    )
    with progress_bar("basis", 1000 * seeds, 0, shows and sys.stderr.isatty()) as bar:
        return study_modular(study, out, bar)


def _model(
    study: LayerStudy,
    model: str | None,
    revision: str | None,
    data: str,
    split: str,
    field: str,
    length: int,
    out: Path,
    shows: bool,
) -> Found:
    from vesicle.calibration.cache import fingerprint, sample_key
    from vesicle.commands.neurons import subject as shared
    from vesicle.neurons.basis import study_layers
    from vesicle.neurons.basis.layer_study import steps
    from vesicle.training.display import progress_bar

    subject = shared.load(model, revision)
    n_layers = subject.model.config.num_hidden_layers
    study.check(n_layers)
    ids = shared.texts(
        subject,
        data,
        split,
        field,
        length=length,
        count=study.windows + study.held_out,
        seed=study.seed,
    )
    facts = {"weights": sample_key(subject.model), "texts": fingerprint([ids])}
    total = steps(study, n_layers)
    with progress_bar("basis", total, 0, shows and sys.stderr.isatty()) as bar:
        return study_layers(
            subject.model, ids, study, out, name=subject.name, facts=facts, show=bar
        )


def _first_of(layers: str) -> int:
    """The first of two adjacent layers, as `--layers` has them."""
    try:
        first, second = (int(part) for part in layers.split(","))
    except ValueError:
        first, second = 0, 0
    if second != first + 1:
        raise VesicleError(
            f"--layers is {layers!r}; allowed: two adjacent layers, such as 10,11, from 0"
        )
    return first


def _finish(report: BasisReport, graphs: dict[str, Graph], out: Path, as_json: bool) -> None:
    """Write the report and its drawings, and print it."""
    from vesicle.files import atomic_path
    from vesicle.neurons.basis import svg
    from vesicle.neurons.basis.page import page, title

    report.save(out / "report.json")
    texts = {f"graph-{kind}.svg": svg(graph, title(kind)) for kind, graph in graphs.items()}
    for name, text in {**texts, "report.html": page(report, graphs)}.items():
        with atomic_path(out / name) as part:
            part.write_text(text, encoding="utf-8")
    if as_json:
        print_json(report.to_dict())
        return
    _print(report)
    notice(f"wrote {out / 'report.html'}, report.json, graph-lib.svg and graph-pca.svg")


def _print(report: BasisReport) -> None:
    from rich.table import Table

    from vesicle.neurons.basis.comparison import LIB, PCA, verdict
    from vesicle.neurons.basis.page import MEASURES, NAMES, ORDER, figures, number
    from vesicle.terminal import SafeConsole

    console = SafeConsole()
    console.print(f"Local Interaction Basis (LIB) of {report.subject}")
    if "held_out_accuracy" in report.facts:
        told = ", ".join(f"{value:.4f}" for value in report.facts["held_out_accuracy"])
        console.print(f"accuracy on pairs that were not trained on: {told}")
    names = [NAMES[kind] for kind in ORDER]
    for pair in report.compared:
        title = f"{pair.source} to {pair.target}, {pair.n_source} and {pair.n_target} features"
        table = Table("", *names, "LIB less PCA", "LIB is", title=title)
        for measure in pair.bases[LIB]:
            means = [number(pair.bases[kind][measure].mean) for kind in ORDER]
            less = pair.less[PCA][measure]
            table.add_row(MEASURES[measure], *means, figures(less), verdict(measure, less))
        console.print(table)
    if "losses" in report.facts:
        losses = report.facts["losses"]
        table = Table("features", *names, title="nats a token more with the first features alone")
        for at, count in enumerate(losses["counts"]):
            rises = [losses["rise"][kind][at]["mean"] for kind in ORDER]
            table.add_row(str(count), *(f"{rise:.3f}" for rise in rises))
        console.print(table)
