"""`vesicle evolve`: a NAMM from scratch, or on from another."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice, numbers
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError

if TYPE_CHECKING:
    from vesicle.evolution import Question
    from vesicle.models import Text
    from vesicle.tasks.base import Task

_SILENT_S = 30
"""Seconds between notes of what is done where there is no progress bar."""
_DATA, _NAMM, _SEARCH = "What is to be remembered", "The NAMM", "Evolution"


@recipe.holding_out
def evolve(
    out: Annotated[Path, typer.Option(help="Folder to write to; a run in it is gone on with.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="A local folder of data sets, `sample` for filler that comes with Vesicle; the "
            "Hugging Face hub if none.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks with one right answer, with commas between.", rich_help_panel=_DATA
        ),
    ] = "needle",
    lengths: Annotated[
        str, typer.Option(help="Tokens of their prompts.", rich_help_panel=_DATA)
    ] = "1024",
    questions: Annotated[
        int, typer.Option(min=1, help="Of each task, to train on.", rich_help_panel=_DATA)
    ] = 20,
    held_out: Annotated[
        int,
        typer.Option(min=1, help="Of each task, to judge means by.", rich_help_panel=_DATA),
    ] = 10,
    held_out_split: Annotated[
        str | None,
        typer.Option(
            help="Where these are from; the task's own by default.", rich_help_panel=_DATA
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Running text to go on with, beside the tasks: a .txt, .jsonl or .jsonl.gz file, "
            "a folder of those, or a hub data set.",
            metavar="SOURCE",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_weight: Annotated[
        float, typer.Option(min=0, help="Of its loss a token.", rich_help_panel=_DATA)
    ] = 4.0,
    model: Annotated[
        str | None,
        typer.Option(help=MODEL),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Go on from this NAMM instead of a new one.", rich_help_panel=_NAMM),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Of a new one: bam, mlp or linear. \\[default: bam]",
            show_default=False,
            rich_help_panel=_NAMM,
        ),
    ] = None,
    evolves: Annotated[
        str,
        typer.Option(
            help="profile (how much each KV head holds), network (what of it) or both.",
            rich_help_panel=_NAMM,
        ),
    ] = "both",
    begin: Annotated[
        str,
        typer.Option(
            help="What a profile begins at: as-is, ablation (what is lost where each KV head alone "
            "forgets), or with gates: repetition (what is needed to repeat a text and to go on "
            "with it), decay (trained by gradient).",
            rich_help_panel=_NAMM,
        ),
    ] = "as-is",
    memory: Annotated[
        str,
        typer.Option(help="Shares of the cache, with commas between.", rich_help_panel=_SEARCH),
    ] = "0.25",
    generations: Annotated[int, typer.Option(help="How many.", rich_help_panel=_SEARCH)] = 60,
    population: Annotated[int, typer.Option(help="Candidates.", rich_help_panel=_SEARCH)] = 16,
    contexts: Annotated[
        int, typer.Option(help="On which each generation is tried.", rich_help_panel=_SEARCH)
    ] = 6,
    sigma: Annotated[float, typer.Option(help="First step.", rich_help_panel=_SEARCH)] = 0.3,
    held_out_every: Annotated[
        int, typer.Option(help="Generations between held-out scores.", rich_help_panel=_SEARCH)
    ] = 5,
    seed: Annotated[
        int, typer.Option(help="Of candidates and contexts.", rich_help_panel=_SEARCH)
    ] = 0,
    on_ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Try candidates on the free CPUs of the Ray cluster that this machine or "
            "RAY_ADDRESS belongs to, or of this machine alone.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw losses and profile, as a PNG file.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evolve a NAMM, which decides what the cache keeps, for a model that stays as it is.

    A run that was cut off goes on from its last generation when the same command is given again.

    [bold]Examples[/bold]

      vesicle evolve --data sample --out runs/namm --generations 10

      vesicle evolve --data data --evolves profile --begin repetition --out runs/gates

      vesicle evolve --data data --evolves network --start runs/gates --out runs/namm --ray
    """
    shares = tuple(numbers(memory, "--memory"))
    from vesicle.evolution import EvolveConfig
    from vesicle.namm import Namm, NammSettings
    from vesicle.tasks.registry import find_task

    try:
        config = EvolveConfig(
            evolves=evolves,
            begin=begin,
            memory=shares,
            generations=generations,
            population=population,
            contexts=contexts,
            sigma=sigma,
            held_out_every=held_out_every,
            seed=seed,
        )
        settings = NammSettings(network=network or "bam")
    except ValueError as error:
        name, _, rest = str(error).partition(" ")  # a setting's, as a Python call gives it
        raise DataError(f"--{name.replace('_', '-')} {rest}") from error
    first = None
    if start is not None:
        if network is not None:
            raise DataError("--start and --network are both given; a NAMM has its own network")
        first = Namm.load(start)
        settings = first.settings
    sizes = [int(n) for n in numbers(lengths, "--lengths")]
    if not sizes or min(sizes) < settings.observes:
        raise DataError(f"--lengths is {lengths}; allowed: {settings.observes} tokens and more")
    asked = [find_task(name.strip()) for name in tasks.split(",") if name.strip()]
    for task in asked:
        if task.kind != "generate":
            raise DataError(
                f"{task.name} is a task of kind {task.kind!r}; allowed: tasks that ask for an "
                "answer"
            )
    if not asked and (text is None or text_weight == 0):
        raise DataError("--tasks and --text name nothing to be remembered; name one")
    from vesicle.engine import Engine
    from vesicle.evolution.contexts import capacity_for
    from vesicle.models import Text, resolve_model

    folder = resolve_model(model, revision=revision)
    local = model is not None and Path(model).exists()
    spec = Path(model).absolute() if model and local else model  # workers are in other folders
    find = partial(resolve_model, spec, progress=False, revision=revision)
    codec = Text.from_folder(folder)
    train, judges = list[Any](), list[Any]()
    for task in asked:
        train += _asked(task, data, None, sizes, questions, seed, codec)
        judges += _asked(task, data, held_out_split, sizes, held_out, seed + 1, codec)
    if text is not None and text_weight > 0:
        train += _running(text, "train", sizes, questions, text_weight, codec)
        judges += _running(text, "held-out", sizes, held_out, text_weight, codec)
    # Contexts of a cluster are held there; what remains here is what a beginning is fitted on.
    held = [] if on_ray else [*train, *judges]
    engine = Engine.from_pretrained(
        folder, kv_capacity=capacity_for(folder, held) if held else None
    )
    if first is None:
        first = Namm.fresh(settings, engine.shape)
    elif not first.profile.size and evolves != "network":
        first = replace(first, profile=first.profile_of(engine.shape))
    first.check_fits(engine.shape)
    from vesicle.evolution import evolve as run
    from vesicle.evolution.cluster import on_cluster
    from vesicle.evolution.repetition import REQUEST
    from vesicle.training.display import progress_bar

    told, shows = {"next": time.monotonic() + _SILENT_S}, sys.stderr.isatty() and not as_json
    with progress_bar("evolving", generations, 0, shows) as show:

        def tell(line: dict[str, Any]) -> None:
            losses, judged = line["losses"], line.get("held_out")
            note = f"best {min(losses):.3f}  mean {sum(losses) / len(losses):.3f}"
            note += "" if judged is None else f"  held out {judged:.3f}"
            show(line["generation"], note)
            speak(f"generation {line['generation']}: {note}")

        def speak(note: str) -> None:  # in a log of a run in the background
            if not shows and time.monotonic() >= told["next"]:
                told["next"] = time.monotonic() + _SILENT_S
                notice(note)

        def wait(note: str) -> None:
            show(0, note)
            speak(note)

        found = run(
            engine,
            first,
            train,
            judges,
            config,
            out,
            request=codec.encode(REQUEST, control_tokens=False),
            load=lambda: recipe.load_subject(str(folder)).model.float(),
            say=notice,
            show=tell,
            wait=wait,
            read=on_cluster(find) if on_ray else None,
        )
    if plot:
        from vesicle.evolution.plots import save_plot

        notice(f"wrote {save_plot(found.lines, found.namm, out)}")
    if as_json:
        print_json(
            {
                "out": str(out),
                "generation": found.generation,
                "held_out_excess": found.held_out,
                "start_excess": found.started_at,
                "parameters": found.namm.n_numbers,
                "generations": found.lines,
            }
        )
        return
    best = "the start is the best"
    if found.generation:
        best = f"{found.held_out:.3f} after generation {found.generation}, the best"
    notice(
        f"held-out loss above the full cache's: {found.started_at:.3f} nats a token at the start; "
        f"{best}, written to {out}"
    )


def _asked(
    task: Task,
    data: str | None,
    split: str | None,
    lengths: list[int],
    count: int,
    seed: int,
    codec: Text,
) -> list[Question]:
    """Questions of a task."""
    from vesicle.evolution.questions import of_items
    from vesicle.tasks.base import Settings
    from vesicle.tasks.sources import load_items

    settings = Settings(
        seed=seed,
        encode=codec.encode,
        lengths=tuple(lengths),
        per_cell=-(-count // len(lengths)),
    )
    loaded = load_items(task, data=data, split=split, settings=settings, limit=count)
    return list(of_items(loaded.items, codec))


def _running(
    source: str, part: str, lengths: list[int], count: int, weight: float, codec: Text
) -> list[Question]:
    """Pieces of running text: the first four fifths of it to train on, the rest held out."""
    from vesicle.evolution.questions import of_text
    from vesicle.training.data import load_documents

    documents = load_documents(source, "train", "text", max_characters=4_000_000)
    joined = "\n\n".join(documents)
    edge = len(joined) * 4 // 5
    ids = codec.encode(joined[:edge] if part == "train" else joined[edge:], control_tokens=False)
    found = list(of_text(ids, max(lengths), 64, count, weight, f"text-{part}"))
    if not found:
        raise DataError(
            f"{source} has {len(ids)} tokens for {part}; needed: {max(lengths) + 64} for a context"
        )
    return found
