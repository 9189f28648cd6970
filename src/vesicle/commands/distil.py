"""`vesicle distil`: small FFNs for a pretrained model, and how they compare with other kinds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError, VesicleError

_FITTED = 16
"""Windows by which hidden units are ordered, and on which maps are fitted."""


@recipe.holding_out
def distil(
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; a run in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "train",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    ratio: Annotated[
        int, typer.Option(min=1, help="Hidden units of a big FFN for each one of a small FFN.")
    ] = 4,
    passes: Annotated[
        int, typer.Option(min=1, help="Forward passes of the model, each over new windows.")
    ] = 200,
    windows: Annotated[int, typer.Option(min=1, help="Windows of a pass.")] = 4,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    coded: Annotated[
        bool,
        typer.Option(
            "--coded/--plain",
            help="Round weights to 4-bit codes at the end, which packed engines read.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of windows and tokens.")] = 0,
    held_out: Annotated[
        int,
        typer.Option(
            min=0, help="Windows at the end of the text on which kinds are compared; 0 for none."
        ),
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Distil a small FFN for every layer of a model, by forward passes of it alone.

    A modulator in which serotonin has them run is made with vesicle calibrate --small-ffns.

    [bold]Examples[/bold]

      vesicle distil --data train.jsonl --out runs/small

      vesicle distil --data train.jsonl --out runs/tiny --ratio 16 --passes 50 --held-out 0
    """
    from dataclasses import asdict

    from vesicle.calibration.cache import fingerprint, sample_key
    from vesicle.duo import Distillation, distil, importance, nested, own_ffns, save_small_ffns
    from vesicle.evaluation.execution.language_modelling import model_shape
    from vesicle.figures import new_figure
    from vesicle.files import atomic_path, write_json
    from vesicle.studies.small_ffns import compare_kinds, counts, kinds_of, page, table
    from vesicle.terminal import SafeConsole
    from vesicle.training.display import progress_bar

    how = Distillation(
        passes=passes, windows=windows, learning_rate=learning_rate, seed=seed, coded=coded
    )
    if held_out:
        new_figure(1, 1)  # what is missing for the page is told before all else
    elif as_json:
        raise VesicleError("--json prints the comparison, and --held-out 0 makes none")
    subject = recipe.load_subject(model, revision)
    subject.model.float()  # sums of errors need more digits than bf16 has
    own = own_ffns(subject.model)
    ids = recipe.read_windows(subject, data, split, field, sequence_length)
    if len(ids) <= held_out:
        raise DataError(
            f"the text has {len(ids)} windows of {sequence_length} tokens; --held-out {held_out} "
            "leaves none to learn from"
        )
    ids, last = ids[: len(ids) - held_out], ids[len(ids) - held_out :]
    units = max(1, own.units // ratio)
    few = ids[:_FITTED].split(4)
    matters = importance(subject.model, own, few)
    small = nested(own, matters, units)
    facts = {
        "model": subject.name,
        "weights": sample_key(subject.model),
        "units": units,
        "text": fingerprint([ids]),
    }
    with progress_bar("distilling", how.steps, 0, sys.stderr.isatty() and not as_json) as bar:
        errors = distil(
            subject.model,
            ids,
            small,
            how,
            out / "run",
            facts=facts,
            show=lambda step, error: bar(step, f"relative error {error:.3f}"),
        )
    shape = model_shape(subject.model)
    trained = {**facts, **asdict(how), "sequence_length": sequence_length, "revision": revision}
    save_small_ffns(small, out, model=shape, trained={**trained, "last_error": errors[-1]})
    notice(f"wrote small FFNs of {units} hidden units to {out}")
    if not held_out:
        return
    kinds = kinds_of(subject.model, own, matters, small, ids[:_FITTED])
    total = len(kinds) * (shape.n_layers + len(counts(shape.n_layers)))
    with progress_bar("comparing", total, 0, sys.stderr.isatty() and not as_json) as bar:
        found = compare_kinds(subject.model, last, shape, kinds, show=bar)
    write_json(out / "comparison.json", found)
    with atomic_path(out / "comparison.html") as part:
        part.write_text(page(found), encoding="utf-8")
    if as_json:
        print_json(found)
        return
    SafeConsole().print(table(found))
    notice(f"wrote {out / 'comparison.html'} and comparison.json")
