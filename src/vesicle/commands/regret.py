"""`vesicle regret`: a modulator's loss beside controls and an oracle, at equal executed cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, check_folder, notice, numbers
from vesicle.errors import VesicleError
from vesicle.folders import check_free
from vesicle.shipped import modulator_for
from vesicle.terminal import SafeConsole

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


def regret(
    modulator: Annotated[
        str | None,
        typer.Argument(
            help="A modulator's folder or hub id; the default is the shipped one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder to write to; finished rows in it are kept.")
    ] = Path("runs/regret"),
    model: Annotated[
        str | None,
        typer.Option(help=MODEL),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget finished rows.")] = False,
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set.",
            metavar="SOURCE",
        ),
    ] = WIKITEXT,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    limit: Annotated[int, typer.Option(help="Windows, evenly spread; 0 for all.")] = 16,
    budgets: Annotated[
        str, typer.Option(help="Shares of the dense FLOPs, with commas between.")
    ] = "1.0,0.9,0.8,0.7,0.6",
    methods: Annotated[
        str, typer.Option(help="The modulator (learnt) and controls, with commas between.")
    ] = "learnt,uniform,uniform-mix,per-layer,random,shuffled,best-of-n,oracle",
    seed: Annotated[int, typer.Option(help="Of random controls and bootstraps.")] = 0,
    best_of: Annotated[int, typer.Option(help="Random tables that best-of-n tries.")] = 100,
    selection_windows: Annotated[int, typer.Option(help="Windows it selects on.")] = 2,
    selection_length: Annotated[int, typer.Option(help="Their tokens.")] = 512,
    oracle_windows: Annotated[int, typer.Option(help="Windows the oracle searches on.")] = 2,
    oracle_length: Annotated[int, typer.Option(help="Their tokens.")] = 512,
    dtype: Annotated[
        str, typer.Option(help="Of the model: bfloat16, float32 or float64.")
    ] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Windows in a pass.")] = 2,
) -> None:
    """Score a text under a modulator, every control and an oracle, at equal executed cost.

    Rows are written as they finish; the same command goes on where it was cut off.

    [bold]Examples[/bold]

      vesicle regret runs/mine --out runs/mine/regret

      vesicle regret --limit 2 --length 256 --budgets 0.9,0.8 --methods learnt,uniform
    """
    given = dict(locals())
    from dataclasses import fields

    from vesicle.evaluation.report.table import rich_tables
    from vesicle.evaluation.run.text import evaluate
    from vesicle.evaluation.run.text_config import EvalConfig
    from vesicle.models import resolve_model
    from vesicle.modulator import Modulator

    given["budgets"] = numbers(budgets, "--budgets")
    given["methods"] = tuple(name.strip() for name in methods.split(","))
    given["limit"] = limit or None
    names = [f.name for f in fields(EvalConfig) if f.name != "oracle"]
    config = EvalConfig(**{name: given[name] for name in names})
    check_folder(out)
    check_free(out)
    source = modulator or modulator_for(resolve_model(model, revision=revision))
    if source is None:
        raise VesicleError("no modulator is shipped for this model: name one")
    loaded = Modulator.from_pretrained(source)
    subject = recipe.load_subject(model, revision)
    result = evaluate(
        subject.model,
        subject.text,
        loaded,
        config,
        out,
        model_name=subject.name,
        modulator_name=Path(source).name,
        restart=restart,
        say=notice,
    )
    console = SafeConsole()
    for table in rich_tables(result):
        console.print(table)
    notice(f"wrote {out}")
