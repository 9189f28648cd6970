"""`vesicle neurons languages`: neurons that are specific or related to languages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from vesicle.neurons.hooks import Hooked
    from vesicle.neurons.languages.experiment import Languages


@recipe.holding_out
def languages(
    data: Annotated[
        str,
        typer.Option(
            help="A folder that holds flores200/; or sample, a few sentences in five languages.",
            metavar="DIR",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; what is in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--languages",
            help="Such as eng_Latn,deu_Latn. \\[default: all that the data have]",
            show_default=False,
        ),
    ] = None,
    sentences: Annotated[int, typer.Option(help="By which neurons are found.")] = 100,
    judged: Annotated[
        int, typer.Option(help="Other sentences, by which lesions are judged; 0 for no lesions.")
    ] = 6,
    lesioned: Annotated[
        str | None,
        typer.Option(
            help="Languages whose neurons are silenced. \\[default: the eight with the most]",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(help="Of the model's neurons that are selected by entropy.")
    ] = 0.01,
    seeds: Annotated[int, typer.Option(help="Draws of random neurons.")] = 3,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another checkpoint of the same model: which neurons change their class.",
            show_default=False,
        ),
    ] = None,
    align: Annotated[
        int | None,
        typer.Option(
            help="Tune the model on translations (multi30k/ of --data) for so many steps, and "
            "compare.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the neurons of languages, silence them, and test what was published of them.

    Neurons are classified by how often they fire in parallel sentences: in one language, in
    several, in all. Beside lesions stand random neurons of the same layers and counts, beside
    classes languages that were mixed. report.json has all of it.

    [bold]Examples[/bold]

      vesicle neurons languages --data sample --out runs/try --sentences 16 --judged 4

      vesicle neurons languages --data data --model gemma3-270m --out runs/languages

      vesicle neurons languages --data data --model gemma3-270m --out runs/aligned --languages
      eng_Latn,deu_Latn,fra_Latn,ces_Latn,rus_Cyrl --judged 0 --align 200
    """
    if against is not None and align is not None:
        raise DataError("--against and --align are both given; allowed: one of them")
    from vesicle.calibration.cache import sample_key
    from vesicle.commands.neurons import subject
    from vesicle.files import write_json
    from vesicle.models import resolve_model
    from vesicle.neurons.hooks import Hooked
    from vesicle.neurons.languages.experiment import Languages, check_lesioned
    from vesicle.neurons.languages.parallel import read_pairs, read_parallel
    from vesicle.neurons.languages.settings import LanguageSettings
    from vesicle.training.display import progress_bar

    settings = LanguageSettings(sentences=sentences, judged=judged, share=share, seeds=seeds)
    settings.check()
    chosen, silenced = _list(names, "--languages"), _list(lesioned, "--lesioned")
    parallel = read_parallel(data, chosen, sentences, judged)
    check_lesioned(silenced, parallel)
    if align is not None:
        if align < 1:
            raise DataError(f"--align is {align}; allowed: 1 and above")
        read_pairs(data)  # what is wrong with them is told before a model runs
    loaded = subject.load(model, revision)
    about = {"model": loaded.name, "weights": sample_key(loaded.model)}
    with progress_bar("languages", 1, 0, sys.stderr.isatty() and not as_json) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar(done, what, total)

        found = Languages(
            lambda text: loaded.text.encode(text, control_tokens=False),
            loaded.text.decode,
            parallel,
            settings,
            out,
            facts=about,
            lesioned=silenced,
            show=show,
        )
        hooked = Hooked(loaded.model)
        report = found.find(hooked)
        if align is not None:
            source = resolve_model(model, revision=revision)
            against = _aligned(loaded, source, data, align, out / "alignment", show)
        if against is not None:
            report["compared"] = _compared(found, hooked, against)
    write_json(out / "report.json", report)
    if as_json:
        print_json(report)
        return
    _print(report)
    notice(f"wrote {out / 'report.json'}")


def _list(given: str | None, option: str) -> list[str] | None:
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise DataError(f"{option} is {given!r}; allowed: names with commas between")
    return list(dict.fromkeys(names))


def _compared(found: Languages, hooked: Hooked, folder: Path) -> dict[str, Any]:
    """The model beside another checkpoint."""
    from vesicle.calibration.cache import sample_key
    from vesicle.commands.neurons import subject
    from vesicle.neurons.hooks import Hooked

    other = subject.load(str(folder), None)
    key = sample_key(other.model)
    return found.against(hooked, Hooked(other.model), key[:12], {"against": key})


def _aligned(
    loaded: recipe.Subject,
    source: Path,
    data: str,
    steps: int,
    out: Path,
    show: Callable[[int, int, str], None],
) -> Path:
    """The folder of the tuned model, which is made once."""
    import copy
    import shutil

    from vesicle.calibration.cache import sample_key
    from vesicle.files import atomic_folder
    from vesicle.neurons.finished import Finished
    from vesicle.neurons.languages.alignment import align
    from vesicle.neurons.languages.parallel import read_pairs

    target = out / "model"

    def make() -> dict[str, Any]:
        tuned = copy.deepcopy(loaded.model)
        losses = align(
            tuned,
            lambda text: loaded.text.encode(text, control_tokens=False, continues=True),
            read_pairs(data),
            steps,
            show=show,
        )
        with atomic_folder(target) as part:
            tuned.save_pretrained(part)
            for path in source.glob("*.json"):
                if path.name.startswith(("tokenizer", "special_tokens")):
                    shutil.copy(path, part)
        return {"losses": losses}

    done = Finished(out, {"steps": steps, "weights": sample_key(loaded.model)})
    done.values("losses", make)
    return target


def _print(report: dict[str, Any]) -> None:
    console = SafeConsole()
    console.print(_languages(report))
    console.print(_parts(report["parts"]))
    if "lesions" in report:
        console.print(_matrix(report["lesions"]))
    console.print(_claims("published", report["claims"]))
    if "compared" in report:
        console.print(_claims("before and after", report["compared"]["claims"]))


def _languages(report: dict[str, Any]) -> Table:
    from rich.table import Table

    own = report["classes"]
    table = Table(
        "language",
        "specific neurons",
        "related neurons",
        "tokens read",
        title=f"{own['specific']} specific, {own['related']} related, {own['general']} general",
    )
    for row in report["languages"]:
        figures = [str(row[name]) for name in ("specific", "related", "tokens")]
        table.add_row(row["language"], *figures)
    return table


def _parts(parts: dict[str, Any]) -> Table:
    from rich.table import Table

    from vesicle.neurons.languages.parts import NAMES

    table = Table("part", "from layer", "language neurons", "general neurons", title="layers")
    for name, start, *shares in zip(
        NAMES, parts["starts"], parts["language"], parts["general"], strict=False
    ):
        table.add_row(name, str(start), *(f"{share:.2%}" for share in shares))
    return table


def _matrix(lesions: dict[str, Any]) -> Table:
    from rich.table import Table

    names = lesions["languages"]
    table = Table(
        "silenced",
        "neurons",
        *(name.partition("_")[0] for name in names),
        "random: own",
        title="nats more a token, by language that is read",
    )
    for k, row in enumerate(lesions["language"]):
        own = f"{lesions['random'][k][k]:+.3f}"
        neurons = str(lesions["neurons"][k]["language"])
        table.add_row(names[k], neurons, *(f"{value:+.3f}" for value in row), own)
    return table


def _claims(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("claim", "difference (95 %)", "control", "here", title=title)
    for row in rows:
        found = row["found"]
        figures = [f"{found[name]:.4g}" for name in ("mean", "low", "high")]
        table.add_row(row["name"], "{} ({} to {})".format(*figures), row["control"], row["verdict"])
    return table
