"""`vesicle eval`: tasks under methods, with cost beside quality."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import (
    GOAL,
    MODEL,
    PHASE,
    REVISION,
    Goal,
    check_folder,
    notice,
    numbers,
    read_phases,
)
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError
from vesicle.folders import check_free
from vesicle.shipped import modulator_for
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from vesicle.evaluation.run.subject import Subject


_BUDGETS = "1.0,0.8"


class Through(StrEnum):
    """Who executes: our engine, the reference in transformers, or transformers as it is."""

    engine = "engine"
    reference = "reference"
    transformers = "transformers"


def evaluate(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Task names; --list tells them.", metavar="TASK...")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="learnt (the modulator), dense, a control, oracle (on a text), what holds or "
            "reads a share of the cache (namm, recency, heavy-hitters; reading), or kvpress:NAME; "
            "repeat, or put commas between. \\[default: learnt]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Shares of the dense FLOPs of generated and scored tokens, or of the cache, with "
            "commas between. \\[default: 1.0,0.8]",
            show_default=False,
        ),
    ] = None,
    phase: Annotated[
        list[str] | None, typer.Option(help=PHASE, metavar="WHERE", show_default=False)
    ] = None,
    goal: Annotated[Goal, typer.Option(help=GOAL)] = Goal.flops,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder in the local format, or 'sample' for the few rows that are shipped; "
            "the Hugging Face hub if none.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which part; each task's own if none.", show_default=False)
    ] = None,
    limit: Annotated[
        int, typer.Option(help="Items of a task, drawn at random; 0 for all.", min=0)
    ] = 50,
    seed: Annotated[int, typer.Option(help="Of draws, controls and intervals.", min=0)] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder to write to; finished items in it are kept.")
    ] = Path("runs/eval"),
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of tables.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Also write table.md.")] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also plot quality against cost, as PNG files.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help=MODEL),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    modulator: Annotated[
        str | None,
        typer.Option(
            help="A modulator's folder or hub id; the shipped one for the default model.",
            show_default=False,
        ),
    ] = None,
    through: Annotated[
        Through,
        typer.Option(help="Who executes. Only the engine skips work and measures it."),
    ] = Through.engine,
    weights: Annotated[
        str, typer.Option(help="The engine's weights: auto, int4, int8, mixed, bf16, fp32 or fp64.")
    ] = "auto",
    kv: Annotated[
        str, typer.Option(help="The engine's cache: auto, int8, fp16, bf16, fp32 or fp64.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; PyTorch's choice if none.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and answer; longer contexts lose their middle. "
            "The context window if none.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens in a window of a text (wikitext).", show_default=False),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            help="How many of them are a prompt, read and not scored: the loss behind a long "
            "prompt.",
            min=0,
        ),
    ] = 0,
    lengths: Annotated[
        str, typer.Option(help="Prompt tokens of generated tasks, with commas between.")
    ] = "",
    depths: Annotated[
        str, typer.Option(help="Depths of generated tasks, 0 to 1, with commas between.")
    ] = "",
    per_cell: Annotated[
        int | None,
        typer.Option(help="Items of each length and depth or kind.", show_default=False),
    ] = None,
    dial: Annotated[
        str,
        typer.Option(
            help="tuned: turned until the prompts execute the budget; shipped: as calibrated."
        ),
    ] = "tuned",
    best_of: Annotated[int, typer.Option(help="Random tables that best-of-n tries.")] = 20,
    selection: Annotated[int, typer.Option(help="Items that best-of-n selects on.")] = 4,
    oracle_windows: Annotated[
        int, typer.Option(help="Windows of a text that the oracle searches on.")
    ] = 2,
    oracle_length: Annotated[int, typer.Option(help="Their tokens.")] = 512,
    restart: Annotated[bool, typer.Option("--restart", help="Forget finished items.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List tasks and methods.")] = False,
) -> None:
    """Score tasks under a modulator, controls and baselines, with executed cost beside quality.

    Items are written as they finish; the same command goes on where it was cut off.

    [bold]Examples[/bold]

      vesicle eval squad race --limit 20

      vesicle eval squad --data DIR --method learnt,uniform,shuffled --budget 1,0.9,0.8 --plot

      vesicle eval needle --lengths 1024 --method kvpress:SnapKV --budget 0.5 --json
    """
    if list_:
        return _list()
    if not tasks:
        raise VesicleError("no task is named; vesicle eval --list tells them")
    from vesicle.evaluation.run.task_config import TaskConfig
    from vesicle.evaluation.run.tasks import evaluate_tasks

    # Written out, so that a record says what acted on whatever processor it is read.
    phases = tuple(phase or ())
    if goal is Goal.time:
        phases = tuple(f"{t}={place}" for t, place in read_phases(phase, goal).to_dict().items())
    config = TaskConfig(
        tasks=tuple(tasks),
        methods=_names(method or ["learnt"]),
        budgets=numbers(_BUDGETS if budget is None else budget, "--budget"),
        data=data,
        split=split,
        limit=limit or None,
        seed=seed,
        max_length=max_length,
        window=window,
        context=context,
        lengths=tuple(int(n) for n in numbers(lengths, "--lengths")),
        depths=numbers(depths, "--depths"),
        per_cell=per_cell,
        dial=dial,
        best_of=best_of,
        selection=selection,
        oracle_windows=oracle_windows,
        oracle_length=oracle_length,
        phases=phases,
    )
    if budget is not None and set(config.methods) == {"dense"} and min(config.budgets) < 1:
        notice(f"--budget {budget} has no effect: dense, which alone is asked for, is run whole")
    check_folder(out)
    check_free(out)
    subject = _subject(model, revision, modulator, through, weights, kv, threads)
    result = evaluate_tasks(subject, config, out, restart=restart, say=notice)
    from vesicle.evaluation.report.table import markdown, rich_tables

    if table:
        from vesicle.files import atomic_path

        with atomic_path(out / "table.md") as part:
            part.write_text(markdown(result), encoding="utf-8")
    if plot:
        from vesicle.evaluation.report.plots import save_plots

        save_plots(result, out)
    if json:
        print_json(result.to_dict())
    else:
        console = SafeConsole()
        for found in rich_tables(result):
            console.print(found)
    notice(f"wrote {out}")


def _list() -> None:
    from rich.table import Table

    from vesicle.evaluation.methods import memory
    from vesicle.evaluation.methods.names import NAMES
    from vesicle.tasks.registry import find_task, task_names

    table = Table()
    for name in ("task", "what", "metrics", "splits", "hub"):
        table.add_column(name)
    for name in task_names():
        task = find_task(name)
        metrics = ", ".join(m.title for m in task.metrics)
        hub = "generated" if task.hub is None else task.hub.path
        table.add_row(name, task.title, metrics, ", ".join(task.splits), hub)
    SafeConsole().print(table)
    names = (*NAMES, *memory.NAMES, "namm:FOLDER", "kvpress:NAME")
    SafeConsole().print(f"methods: {', '.join(names)}", highlight=False)


def _subject(
    model: str | None,
    revision: str | None,
    modulator: str | None,
    through: Through,
    weights: str,
    kv: str,
    threads: int | None,
) -> Subject:
    """Load what is evaluated."""
    from vesicle.engine import Engine
    from vesicle.evaluation.execution.engine_executor import EngineExecutor
    from vesicle.evaluation.execution.executor import Executor
    from vesicle.evaluation.execution.transformers_executor import TransformersExecutor
    from vesicle.evaluation.run.subject import Subject
    from vesicle.files import folder_fingerprint
    from vesicle.models import Text, resolve_model
    from vesicle.models.default import DEFAULT_MODEL
    from vesicle.modulator import Modulator

    folder = resolve_model(model, revision=revision)
    source = modulator or modulator_for(folder)
    loaded = None if source is None else Modulator.from_pretrained(source)

    def hugging_face() -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    name = DEFAULT_MODEL if model is None else Path(model).name
    facts: dict[str, Any] = {
        "name": name,
        "fingerprint": folder_fingerprint(folder),
        "through": str(through),
    }
    executor: Executor
    if through is Through.engine:
        engine = Engine.from_pretrained(
            folder,
            weights=None if weights == "auto" else weights,
            kv=None if kv == "auto" else kv,
            threads=threads,
        )
        executor = EngineExecutor(engine)
        facts |= {"weights": engine.weights_format, "kv": engine.pool.kv}
    else:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        executor = TransformersExecutor(hugging_face(), attached=through is Through.reference)
        facts |= {"weights": "fp32", "kv": "fp32"}
    text = Text.from_folder(folder)
    return Subject(
        executor=executor,
        codec=text,
        ends=text.eos_ids,
        modulator=loaded,
        model=facts,
        modulator_name="" if source is None else Path(source).name,
        hugging_face=hugging_face,
    )


def _names(parts: list[str]) -> tuple[str, ...]:
    """Names with commas between; those in brackets belong to a press's arguments."""
    split = (name.strip() for part in parts for name in re.split(r",(?![^()]*\))", part))
    return tuple(name for name in split if name)
