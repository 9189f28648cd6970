"""`vesicle oracle`: which FFNs of a pretrained model may be small, token by token."""

from __future__ import annotations

import sys
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError, VesicleError

if TYPE_CHECKING:
    from torch import Tensor

_SELECTION = 2
"""Texts on which the fixed pattern is chosen."""
_FITTED = 48
"""Other texts that the router is fitted to."""


@recipe.holding_out
def oracle(
    data: Annotated[
        str,
        typer.Option(
            help="A .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set. With "
            "--tasks: a folder of data sets, sample, or hub.",
            metavar="SOURCE",
        ),
    ],
    small_ffns: Annotated[Path, typer.Option(help="A folder of vesicle distil.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; a search in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Search the ends of these tasks' prompts and answers, with commas between, and "
            "tell difficulty by task.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    texts: Annotated[int, typer.Option(min=1, help="Texts, evenly spread; of tasks, of each.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 257,
    most: Annotated[
        int | None,
        typer.Option(
            help="Small FFNs at most. \\[default: half of the layers]", show_default=False
        ),
    ] = None,
    search: Annotated[
        str, typer.Option(help="gains (fast), greedy or beam (many more passes).")
    ] = "gains",
    random: Annotated[int, typer.Option(min=1, help="Random patterns of each number.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of those, and of drawn labels.")] = 0,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html and report.json.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Search the best pattern of big and small FFNs for each token, and tell how difficult it is.

    The model is a Llama. Beside the oracles stand one pattern for all tokens, random patterns, and
    what is luck. Each token's patterns, losses and difficulty are kept in texts/ as safetensors.

    [bold]Examples[/bold]

      vesicle oracle --data test.jsonl --small-ffns runs/small --out runs/oracle

      vesicle oracle --data test.jsonl --small-ffns runs/small --out runs/six --most 6 --search
      greedy --texts 2

      vesicle oracle --tasks squad,cnn_dailymail --data data --small-ffns runs/small --out
      runs/tasks --texts 4
    """
    from vesicle.calibration.cache import fingerprint, sample_key
    from vesicle.duo import fit_error_router, load_small_ffns, make_duo_of
    from vesicle.evaluation.execution.language_modelling import model_shape
    from vesicle.figures import new_figure
    from vesicle.files import atomic_path, write_json
    from vesicle.studies.deep_oracle import SearchSettings, executed, page, search_texts, summary
    from vesicle.training.display import progress_bar

    names = [] if tasks is None else recipe.task_names_of(tasks)
    if as_json and not report:
        raise VesicleError("--json prints the report, and --no-report makes none")
    if report:
        new_figure(1, 1)  # what is missing for the report is told before the search
    subject = recipe.load_subject(model, revision)
    subject.model.float()  # differences of losses need more digits than bf16 has
    shape = model_shape(subject.model)
    settings = SearchSettings(
        most=max(1, shape.n_layers // 2) if most is None else most,
        search=search,
        n_random=random,
        seed=seed,
    )
    settings.check(shape.n_layers)
    small = load_small_ffns(small_ffns, shape)
    weights = sample_key(subject.model)
    chosen, selection, others, named = _texts(
        subject, data, split, field, length, texts, names, seed
    )
    router = fit_error_router(subject.model, small, others[:_FITTED]) if report else None
    choices = make_duo_of(subject.model, small)
    facts = {
        "model": subject.name,
        "weights": weights,
        "texts": fingerprint([chosen, selection]),
        "small_ffns": fingerprint(list(small.parameters())),
    }
    with progress_bar("searching", len(chosen), 0, sys.stderr.isatty() and not as_json) as bar:
        found = search_texts(subject.model, chosen, selection, settings, out, facts=facts, show=bar)
    if router is None:
        notice(f"wrote {len(chosen)} texts to {out / 'texts'}")
        return
    taken, had = executed(subject.model, choices, found, settings.counts, router)
    told = summary(found, subject.text, settings, others.flatten(), taken, had, named)
    write_json(out / "report.json", told)
    with atomic_path(out / "report.html") as part:
        part.write_text(page(told), encoding="utf-8")
    if as_json:
        print_json(told)
        return
    notice(f"wrote {out / 'report.html'} and report.json")


def _texts(
    subject: recipe.Subject,
    data: str,
    split: str,
    field: str,
    length: int,
    texts: int,
    names: list[str],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Texts to search, texts to choose the fixed pattern on, others; and whose tasks the first are.

    Of tasks each has as many texts, and others are what they have beside those.
    """
    import torch

    if names:
        least = texts + -(-_SELECTION // len(names))
        of_tasks = recipe.read_task_windows(
            subject, names, data, length, least=least, most=texts + _FITTED, seed=seed
        )
        searched = torch.cat([own[:texts] for own in of_tasks.values()])
        # Of all tasks by turns.
        spare = [own[texts:].unbind() for own in of_tasks.values()]
        rest = torch.stack([w for turn in zip_longest(*spare) for w in turn if w is not None])
        others = rest[_SELECTION:] if len(rest) > _SELECTION else searched
        kept = [name for name in of_tasks for _ in range(texts)]
        return searched, rest[:_SELECTION], others, kept
    ids = recipe.read_windows(subject, data, split, field, length)
    if len(ids) < texts + _SELECTION:
        raise DataError(
            f"the text has {len(ids)} windows of {length} tokens; --texts {texts} needs "
            f"{texts + _SELECTION}, of which {_SELECTION} choose the fixed pattern"
        )
    at = torch.linspace(0, len(ids) - 1, texts + _SELECTION).round().long()
    return ids[at[_SELECTION:]], ids[at[:_SELECTION]], _others(ids, at), []


def _others(ids: Tensor, at: Tensor) -> Tensor:
    """Windows (N, T) without those at some places; all where no other is left."""
    taken = set(at.tolist())
    left = [i for i in range(len(ids)) if i not in taken]
    return ids[left] if left else ids
