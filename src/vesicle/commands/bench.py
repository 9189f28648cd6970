"""`vesicle bench`: this engine's speed beside its rivals', on this machine."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vesicle import processors
from vesicle.commands.inputs import (
    GOAL,
    MODEL,
    REVISION,
    Goal,
    check_budget,
    check_folder,
    check_writable,
    notice,
)
from vesicle.errors import VesicleError
from vesicle.folders import locked, set_aside
from vesicle.shipped import modulator_for
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from vesicle.bench import Report

_WHO, _WHAT, _OUTPUT = "Who takes part", "What is measured", "What is written"
_LONGEST, _QUICK = (128, 512, 2048, 8192), (32,)
_ROUNDS, _NEW, _QUICK_ROUNDS, _QUICK_NEW = 5, 64, 1, 4


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help=MODEL,
            rich_help_panel=_WHO,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION, rich_help_panel=_WHO)] = None,
    modulator: Annotated[
        str | None,
        typer.Option(
            help="A modulator's folder or hub id; the default is the one shipped for the model.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the dense FLOPs; the default is the modulator's own.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    goal: Annotated[Goal, typer.Option(help=GOAL, rich_help_panel=_WHO)] = Goal.time,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead",
            help="Also the modulator at rest: all levels computed, nothing skipped.",
            rich_help_panel=_WHO,
        ),
    ] = False,
    gaba: Annotated[
        str | None,
        typer.Option(
            help="Also with every query reading this share of the KV blocks; commas between.",
            metavar="SHARES",
            rich_help_panel=_WHO,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Rivals, commas between: hf, hf-bf16, llamacpp, llamacpp-q4_0, llamacpp-q4_k_s, "
            "openvino, onnx.",
            metavar="NAMES",
            rich_help_panel=_WHO,
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="The model for llama.cpp and OpenVINO; the default model's is fetched once.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weight format of this engine.", rich_help_panel=_WHO)
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Cache format of this engine.", rich_help_panel=_WHO)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt lengths in tokens [default: {','.join(map(str, _LONGEST))}].",
            metavar="LENGTHS",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Decode steps after each prompt [default: {_NEW}].",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            help="Sequences side by side, commas between.", metavar="SIZES", rich_help_panel=_WHAT
        ),
    ] = "1",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of each contender; the default is all usable cores.", rich_help_panel=_WHAT
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu.", rich_help_panel=_WHAT)] = "cpu",
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Turns of each contender [default: {_ROUNDS}].",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to read; a text of our own by default.", rich_help_panel=_WHAT
        ),
    ] = None,
    limit: Annotated[
        float,
        typer.Option(help="Seconds after which a turn is given up.", rich_help_panel=_WHAT),
    ] = 900.0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Does everything run? One short round; its numbers say little.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    allow_busy: Annotated[
        bool,
        typer.Option(
            "--allow-busy",
            help="Measure without waiting for an idle machine, and exit with 0 all the same.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write the report here.", rich_help_panel=_OUTPUT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for bench.json, table.md and speed.png.", rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> None:
    """Measure speed side by side: this engine at rest, at a budget, and its rivals.

    Contenders take turns in one run, each in a process of its own. Medians and quartiles of the
    rounds are reported. On a busy machine the result is marked as not valid, and the exit status
    is 1.

    [bold]Examples[/bold]

      vesicle bench --quick

      vesicle bench --prompt 128,512 --budget 0.7 --against hf,llamacpp --out runs/bench

      vesicle bench --prompt 1024,4096 --new 128 --against llamacpp,llamacpp-q4_0,openvino,onnx

      vesicle bench --prompt 8192 --gaba 0.25 --against llamacpp --rounds 3

      vesicle bench --prompt 128 --batch 1,4,8 --overhead --threads 2
    """
    check_budget(budget)
    prompts: tuple[int, ...] = _QUICK if quick else _LONGEST
    if prompt is not None:
        prompts = _integers(prompt, "--prompt")
    batches = _integers(batch, "--batch")
    steps = new or (_QUICK_NEW if quick else _NEW)
    rivals = _names(against)
    shares = _shares(gaba)
    json_path, table_path, plot_path = _outputs(json_path, out)

    from vesicle.bench import BenchConfig, line_up, run_bench
    from vesicle.bench.contenders import ONNX, READ_GGUF, RIVALS, check_installed
    from vesicle.bench.display import showing
    from vesicle.bench.prompts import read_stream
    from vesicle.bench.weights_file import converted_to_onnx, files_for, find_gguf
    from vesicle.models import Text, resolve_model

    check_installed(rivals)
    folder = resolve_model(model, revision=revision)
    tokenizer = Text.from_folder(folder)
    config = BenchConfig(
        prompts=_within(prompts, tokenizer.context_window, steps),
        batches=batches,
        new_tokens=steps,
        rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        threads=threads or processors.threads(),
        limit_s=limit,
        allow_busy=allow_busy,
        bandwidth_repeats=2 if quick else 5,
    )
    files: dict[str, Path] = {}
    if any(RIVALS[name] in READ_GGUF for name in rivals):
        files = files_for(rivals, find_gguf(model, folder, gguf), tell=notice)
    elif gguf is not None:
        raise VesicleError(
            f"--gguf is {gguf}, and nobody in --against reads it; those who do: "
            + ", ".join(name for name, runner in RIVALS.items() if runner in READ_GGUF)
        )
    if ONNX in rivals:
        if max(batches) > 1:
            raise VesicleError(f"--batch is {batch}; allowed with --against onnx: 1")
        files[ONNX] = converted_to_onnx(folder, tell=notice)
    contenders = line_up(
        folder=folder,
        files=files,
        modulator=_modulator(modulator, folder, budget),
        budget=budget,
        overhead=overhead,
        gaba=shares,
        against=rivals,
        threads=config.threads,
        goal=goal.value,
        device=device,
        weights=weights,
        kv=kv,
    )
    stream = read_stream(tokenizer, text, max(config.prompts) + steps + 1, config.rows_read)

    finished: list[Report] = []

    def save(report: Report) -> None:
        if out is not None and not finished:
            kept = set_aside(out, ("bench.json", "table.md", "speed.png"))
            if kept is not None:
                notice(f"the results of an earlier run are kept in {kept}")
        finished[:] = [report]
        if json_path is not None:
            report.save(json_path)

    try:
        with locked(out) if out else nullcontext(), showing() as display:
            report = run_bench(
                config,
                contenders,
                stream,
                command=shlex.join(["vesicle", *sys.argv[1:]]),
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                progress=display,
                save=save,
            )
    finally:
        # Also what an interrupted run had finished.
        for shown in finished:
            _show(shown)
            _write(shown, table_path, plot_path)
    if not report.valid and not allow_busy:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    """Tables on standard output."""
    from vesicle.bench.table import TITLES, head, notes, rich_table, step_lines

    console = SafeConsole(highlight=False)
    if not console.is_terminal:
        # A file or pipe has no width of its own, and folded cells help nobody.
        console = SafeConsole(highlight=False, width=240)
    for line in head(report):
        console.print(line, markup=False)
    for cell in report.cells:
        for title in TITLES:
            console.print(rich_table(report, cell, title))
        for line in step_lines(report, cell):
            console.print(line, markup=False)
    for line in notes(report):
        console.print(line, markup=False)


def _write(report: Report, table: Path | None, plot: Path | None) -> None:
    """The other files; the JSON is written as the run goes."""
    if table is not None:
        from vesicle.bench.table import markdown
        from vesicle.files import atomic_path

        with atomic_path(table) as part:
            part.write_text(markdown(report), encoding="utf-8")
    if plot is not None:
        from vesicle.bench.plots import save_plot
        from vesicle.figures import MissingPlots

        try:
            save_plot(report, plot)
        except MissingPlots as missing:
            notice(f"no plot: {missing}")


def _outputs(json_path: Path | None, out: Path | None) -> tuple[Path | None, ...]:
    """Files to write: JSON, table, plot."""
    if out is None:
        check_writable(json_path, "--json")
        return json_path, None, None
    check_writable(json_path, "--json")
    check_folder(out)
    written = json_path or out / "bench.json", out / "table.md", out / "speed.png"
    for path in written[json_path is not None :]:
        check_writable(path, "--out")
    return written


def _modulator(given: str | None, folder: Path, budget: float | None) -> str | None:
    """What was given, or what is shipped for the model."""
    if given is not None:
        return given
    shipped = modulator_for(folder)
    if shipped is None and budget is not None:
        raise VesicleError(f"--budget is {budget:g}, and no modulator is shipped for this model")
    return None if shipped is None else str(shipped)


def _within(prompts: tuple[int, ...], window: int, steps: int) -> tuple[int, ...]:
    """Prompt lengths that leave room for the new tokens in the model's context window."""
    room = window - steps
    if room < 1:
        raise VesicleError(f"--new {steps} leaves no room in the context window of {window} tokens")
    for length in prompts:
        if length > window:
            raise VesicleError(
                f"--prompt is {length}; allowed: up to the model's context window of {window}"
            )
        if length > room:
            notice(f"prompts of {length} are cut to {room}, so that {steps} tokens can follow")
    return tuple(dict.fromkeys(min(length, room) for length in prompts))


def _integers(given: str, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in given.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise VesicleError(f"{option} is {given!r}; allowed: numbers from 1 up, commas between")
    return tuple(dict.fromkeys(values))


def _shares(given: str | None) -> tuple[float, ...]:
    if given is None:
        return ()
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise VesicleError(
            f"--gaba is {given!r}; allowed: numbers between 0 and 1, commas between"
        ) from error


def _names(given: str | None) -> tuple[str, ...]:
    return () if given is None else tuple(part.strip() for part in given.split(","))
