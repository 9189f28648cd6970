"""`vesicle train`: calibrate a fresh modulator, train it, measure its dial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.errors import VesicleError

_TEXT, _MODULATOR, _TRAINING = "Text", "A new modulator", "Training"


@recipe.holding_out
def train(
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set. With "
            "--tasks: a folder of data sets, sample, or hub.",
            metavar="SOURCE",
            rich_help_panel=_TEXT,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; a run in it is gone on with.")],
    model: Annotated[
        str | None,
        typer.Option(help=MODEL),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    modulator: Annotated[
        str | None, typer.Option(help="Go on from this one instead of a new one.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew although --out holds a run.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Train on the answers of these tasks, with commas between, and not on text.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Most items of each task.", rich_help_panel=_TEXT)
    ] = 1000,
    split: Annotated[
        str, typer.Option(help="Which part of the data.", rich_help_panel=_TEXT)
    ] = "train",
    field: Annotated[
        str, typer.Option(help="The field of JSON lines with the text.", rich_help_panel=_TEXT)
    ] = "text",
    calibration_windows: Annotated[
        int,
        typer.Option(
            min=1, help="Windows for stand-ins and the dial, the first ones.", rich_help_panel=_TEXT
        ),
    ] = 32,
    predictor: Annotated[
        str,
        typer.Option(
            help="linear, mlp, recurrent, quadratic, dendrites, delays, gain or pooled.",
            rich_help_panel=_MODULATOR,
        ),
    ] = "linear",
    hidden: Annotated[
        int, typer.Option(min=1, help="Its inner width, if any.", rich_help_panel=_MODULATOR)
    ] = 16,
    transmitters: Annotated[
        str, typer.Option(help="Released, with commas between.", rich_help_panel=_MODULATOR)
    ] = "dopamine,serotonin,gaba",
    small_ffns: Annotated[
        Path | None,
        typer.Option(
            help="A folder of vesicle distil: what FFNs become where serotonin has them small, in "
            "place of maps.",
            show_default=False,
            rich_help_panel=_MODULATOR,
        ),
    ] = None,
    ffn_rank: Annotated[
        int, typer.Option(min=1, help="Of FFN stand-ins.", rich_help_panel=_MODULATOR)
    ] = 32,
    attention_rank: Annotated[
        int, typer.Option(min=1, help="Of attention stand-ins.", rich_help_panel=_MODULATOR)
    ] = 16,
    warm_start: Annotated[
        bool,
        typer.Option(
            "--warm-start",
            help="Fit read-outs to oracle labels first, by forward passes.",
            rich_help_panel=_MODULATOR,
        ),
    ] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=_TRAINING)] = 1000,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens in a window.", rich_help_panel=_TRAINING)
    ] = 512,
    batch_size: Annotated[
        int, typer.Option(help="Windows in a micro-step.", rich_help_panel=_TRAINING)
    ] = 1,
    accumulation: Annotated[
        int, typer.Option(help="Micro-steps in a step.", rich_help_panel=_TRAINING)
    ] = 4,
    loss_positions: Annotated[
        int,
        typer.Option(
            help="Positions of a window that the loss compares; 0: all.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    learning_rate: Annotated[
        float, typer.Option(help="Of the predictor's weights.", rich_help_panel=_TRAINING)
    ] = 3e-3,
    scale_learning_rate: Annotated[
        float, typer.Option(help="Of offsets and slopes.", rich_help_panel=_TRAINING)
    ] = 2e-2,
    warm_up: Annotated[
        int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=_TRAINING)
    ] = 20,
    budget_low: Annotated[
        float, typer.Option(help="Least budget asked for.", rich_help_panel=_TRAINING)
    ] = 0.55,
    budget_high: Annotated[
        float, typer.Option(help="Greatest budget asked for.", rich_help_panel=_TRAINING)
    ] = 0.98,
    price: Annotated[
        float, typer.Option(help="Nats per squared share off budget.", rich_help_panel=_TRAINING)
    ] = 30.0,
    one_sided: Annotated[
        bool,
        typer.Option("--one-sided", help="Price overspending alone.", rich_help_panel=_TRAINING),
    ] = False,
    label_weight: Annotated[
        float,
        typer.Option(
            help="Of the cross-entropy of the text or the answers.", rich_help_panel=_TRAINING
        ),
    ] = 0.0,
    task_temperature: Annotated[
        float,
        typer.Option(
            help="Mixes tasks: 1 by how many lessons they have, higher more alike.",
            rich_help_panel=_TRAINING,
        ),
    ] = 2.0,
    temperature_start: Annotated[
        float, typer.Option(help="Of soft masks; 0: straight-through.", rich_help_panel=_TRAINING)
    ] = 0.0,
    temperature_end: Annotated[
        float, typer.Option(help="At the last step.", rich_help_panel=_TRAINING)
    ] = 0.0,
    clip: Annotated[
        float, typer.Option(help="Greatest gradient norm.", rich_help_panel=_TRAINING)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Of windows and budgets.", rich_help_panel=_TRAINING)
    ] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_TRAINING)
    ] = 20,
    eval_every: Annotated[
        int, typer.Option(help="Steps between evaluations; 0: none.", rich_help_panel=_TRAINING)
    ] = 50,
    eval_windows: Annotated[
        int, typer.Option(help="Held-out windows, the last ones.", rich_help_panel=_TRAINING)
    ] = 8,
    patience: Annotated[
        int,
        typer.Option(help="Bad evaluations before stopping; 0: never.", rich_help_panel=_TRAINING),
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the model: float32 or bfloat16.", rich_help_panel=_TRAINING)
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_TRAINING)] = "cpu",
) -> None:
    """Train a modulator for a model, which stays as it is.

    A run that was cut off goes on from its newest checkpoint when the same command is given again.

    [bold]Examples[/bold]

      vesicle train --data train.jsonl --out runs/mine

      vesicle train --data owner/name:configuration --model owner/model --out runs/other

      vesicle train --data train.txt --out runs/quick --steps 20 --sequence-length 128

      vesicle train --tasks squad,race,cnn_dailymail --data data --out runs/tasks

      torchrun --nproc-per-node 2 -m vesicle train --data train.txt --out runs/mine
    """
    given = dict(locals())
    from dataclasses import fields

    from vesicle.training.processes import Processes, check_shares, rank
    from vesicle.training.trainer import TrainConfig
    from vesicle.training.trainer import train as run_training

    try:
        config = TrainConfig(**{f.name: given[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise VesicleError(str(error)) from error
    check_shares(config.accumulation)
    names = None if tasks is None else recipe.task_names_of(tasks)
    tell = notice if rank() == 0 else _nothing  # of several processes one speaks
    if modulator is None:
        recipe.check_predictor(predictor, tasks)
    from vesicle.modulator import Modulator
    from vesicle.training.lessons import Lessons

    start = None if modulator is None else Modulator.from_pretrained(modulator)
    subject = recipe.load_subject(model, revision)
    released = transmitters.split(",") if start is None else start.predictor.config.transmitters
    small = recipe.read_small_ffns(subject, small_ffns, released)
    if start is not None and small is not None:
        start.ffn_standin = small
    held = eval_windows if eval_every else 0
    if names is None:
        lessons = Lessons.of_text(recipe.read_windows(subject, data, split, field, sequence_length))
    else:
        lessons = recipe.read_lessons(subject, names, data, sequence_length, limit, seed)
        told = ", ".join(
            f"{int((lessons.task == k).sum())} of {name}" for k, name in enumerate(lessons.names)
        )
        tell(f"{told} fit into {sequence_length} tokens")
    kept, held_out = lessons.held_out(held) if held else (lessons, None)
    windows = kept.packed()
    few, cache = windows[:calibration_windows], out / recipe.CALIBRATION
    team = Processes(device)
    if start is None:
        tell("measuring each layer, after fitting stand-ins if serotonin is released")
        with team.first_first():  # the others read what it measured
            start = recipe.new_modulator(
                subject,
                few,
                cache,
                predictor=predictor,
                transmitters=transmitters.split(","),
                hidden=hidden,
                ffn_rank=ffn_rank,
                attention_rank=attention_rank,
                small_ffns=small,
            )
        if warm_start:
            from vesicle.training.warm_start import warm_start as fit_labels

            tell("fitting read-outs to oracle labels")
            fit_labels(subject.model, start, few)
    result = run_training(
        subject.model,
        start,
        kept,
        held_out,
        config,
        out,
        data=Path(data).name if Path(data).exists() else data,
        restart=restart,
        say=tell,
    )
    if not team.first:
        return
    unseen = None if held_out is None else held_out.packed()
    recipe.measure(subject, start, windows[: recipe.DIAL_WINDOWS], unseen, cache=cache)
    start.save_pretrained(out)
    tell(f"wrote {out} after {result.step} steps; try vesicle run --modulator {out} PROMPT")


def _nothing(line: str) -> None:
    pass
