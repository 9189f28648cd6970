"""`vesicle calibrate`: measure a modulator's dial, or make one without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import REVISION, notice


@recipe.holding_out
def calibrate(
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the modulator to.")],
    modulator: Annotated[
        str | None,
        typer.Option(help="Measure this one's dial; by default a new one is made, untrained."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A folder, a .gguf file, a hub id or a name that vesicle models lists."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "train",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    windows: Annotated[
        int,
        typer.Option(
            min=0,
            help="Windows used, from the beginning; with 0 only what --long-windows is for is "
            "measured anew.",
        ),
    ] = 32,
    held_out: Annotated[
        int,
        typer.Option(
            min=0, help="Windows at the end, on which the default budget is measured; 0 for none."
        ),
    ] = 0,
    long_length: Annotated[
        int,
        typer.Option(min=64, help="Tokens in a window on which GABA alone is measured."),
    ] = 4096,
    long_windows: Annotated[
        int, typer.Option(min=0, help="Such windows, from the end of the text; 0 for none.")
    ] = 0,
    gap: Annotated[
        float, typer.Option(help="Largest difference between neighbouring rows of the dial table.")
    ] = 0.03,
    predictor: Annotated[
        str, typer.Option(help="Of a new one, as vesicle train has them.")
    ] = "linear",
    hidden: Annotated[int, typer.Option(min=1, help="Its inner width, if it has one.")] = 16,
    transmitters: Annotated[
        str, typer.Option(help="Those it releases, with commas between.")
    ] = "dopamine,serotonin,gaba",
    small_ffns: Annotated[
        Path | None,
        typer.Option(
            help="A folder of vesicle distil: what FFNs become where serotonin has them small, in "
            "place of maps.",
            show_default=False,
        ),
    ] = None,
    ffn_rank: Annotated[int, typer.Option(min=1, help="Of its FFN stand-ins.")] = 32,
    attention_rank: Annotated[int, typer.Option(min=1, help="Of its attention stand-ins.")] = 16,
    head_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fit a preview of the LM head with so many directions, by which most words are "
            "told roughly.",
            show_default=False,
        ),
    ] = None,
    head_likeliest: Annotated[
        int,
        typer.Option(
            min=1, help="With --head-rank: words ranked exactly where one is to be chosen."
        ),
    ] = 256,
    head_logits: Annotated[
        int,
        typer.Option(min=1, help="With --head-rank: words whose logits are exact where all count."),
    ] = 8192,
) -> None:
    """Measure which dial position executes which share of the dense FLOPs.

    Without --modulator a new one is made by forward passes alone: stand-ins are fitted, and levels
    are set by how much each layer loses. It is the start that vesicle train improves on.

    [bold]Examples[/bold]

      vesicle calibrate --data train.jsonl --modulator runs/mine --out runs/mine

      vesicle calibrate --data train.jsonl --modulator runs/mine --out runs/mine --windows 0
      --long-windows 4

      vesicle calibrate --data train.txt --model owner/name --out runs/untrained

      vesicle calibrate --data train.jsonl --modulator runs/mine --head-rank 128 --out runs/mine
    """
    from vesicle.errors import DataError, VesicleError
    from vesicle.modulator import Modulator, keep_modulator
    from vesicle.phases import GABA_ALONE

    if not 0 < gap < 1:
        raise VesicleError(f"--gap is {gap}; allowed: between 0 and 1")
    if not windows and not (modulator and long_windows):
        raise VesicleError("--windows is 0; that needs a --modulator and --long-windows")
    if not windows and small_ffns is not None:
        raise VesicleError(
            f"--small-ffns is {small_ffns} and --windows 0; other FFNs need the dial measured anew"
        )
    if not windows and head_rank is not None:
        raise VesicleError(
            f"--head-rank is {head_rank} and --windows 0; a preview is fitted to windows of text"
        )
    if not windows and held_out:
        raise VesicleError(f"--held-out is {held_out}; allowed: 0 where --windows is 0")
    loaded = None if modulator is None else Modulator.from_pretrained(modulator)
    released = transmitters.split(",") if loaded is None else loaded.predictor.config.transmitters
    if head_rank is not None and "gaba" not in released:
        raise VesicleError(
            f"--head-rank is {head_rank}; allowed: none for a modulator that releases "
            f"{', '.join(released)}: the LM head is previewed where GABA is released"
        )
    if long_windows and not GABA_ALONE.only("gaba", released):
        raise VesicleError(
            f"--long-windows is {long_windows}; allowed: 0 for a modulator that releases "
            f"{', '.join(released)}: the table is for GABA, where others rest"
        )
    subject = recipe.load_subject(model, revision)
    small = recipe.read_small_ffns(subject, small_ffns, released)
    ids = recipe.read_windows(subject, data, split, field, sequence_length)
    if len(ids) <= held_out:
        raise DataError(
            f"the text has {len(ids)} windows of {sequence_length} tokens; --held-out {held_out} "
            "leaves none to measure the dial on"
        )
    long = None
    if long_windows:
        long = recipe.read_windows(subject, data, split, field, long_length)[-long_windows:]
    ids, last = ids[: len(ids) - held_out][:windows], ids[len(ids) - held_out :]
    cache = out / recipe.CALIBRATION
    if loaded is None:
        notice("measuring each layer, after fitting stand-ins if serotonin is released")
        loaded = recipe.new_modulator(
            subject,
            ids,
            cache,
            predictor=predictor,
            transmitters=transmitters.split(","),
            hidden=hidden,
            ffn_rank=ffn_rank,
            attention_rank=attention_rank,
            small_ffns=small,
        )
    else:
        from vesicle.evaluation.execution.language_modelling import model_shape

        loaded.check_fits(model_shape(subject.model))
        if small is not None:
            loaded.ffn_standin = small
    if head_rank is not None:
        notice("fitting the preview of the LM head")
        loaded = recipe.with_preview(
            subject, loaded, ids, head_rank, likeliest=head_likeliest, logits=head_logits
        )
    recipe.measure(subject, loaded, ids, last, gap=gap, cache=cache, long=long)
    if modulator is None or Path(modulator).resolve() != out.resolve():
        keep_modulator(out, notice)
    loaded.save_pretrained(out)
    found = loaded.info.gaba_alone if not windows else None
    least = (found.dial if found else loaded.info.dial)[0][0]
    notice(f"wrote {out}: budgets from {least:.3f} to 1; try vesicle run --modulator {out} PROMPT")
