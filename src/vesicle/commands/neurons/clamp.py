"""`vesicle neurons clamp`: hold neurons, and see what becomes of tokens or of an answer."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vesicle.commands.inputs import MODEL, REVISION, check_writable, notice, read_prompt
from vesicle.commands.neurons.subject import DATA, MOST_SEED, check_strength
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError

_LENGTH = 24
"""Tokens of a prompt."""


class Kind(StrEnum):
    """By which projection neurons were decoded."""

    gate = "gate"
    up = "up"
    down = "down"


def clamp(
    decoded: Annotated[
        Path | None, typer.Option(help="A folder of vesicle neurons decode.", show_default=False)
    ] = None,
    neuron: Annotated[
        str | None,
        typer.Option(
            help="Hold this one, LAYER.NEURON, while the model answers PROMPT.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="What to answer with --neuron.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    kind: Annotated[
        Kind, typer.Option(help="What to hold: the neuron (down), or what its gate or up gives.")
    ] = Kind.down,
    strength: Annotated[
        float, typer.Option(help="Times the largest value that the neuron has in the text.")
    ] = 2.0,
    count: Annotated[int, typer.Option(min=1, help="Specialised neurons, and random ones.")] = 50,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that they are held in.")] = 16,
    data: Annotated[str | None, typer.Option(help=DATA, metavar="SOURCE")] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 40,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of prompts and random neurons.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file to write to, each neuron included.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Clamp neurons, and see what becomes of the tokens that they decode to.

    With --decoded, the most specialised neurons stand beside random ones of the same layers. With
    --neuron, one is held while a prompt is answered.

    [bold]Examples[/bold]

      vesicle neurons clamp --decoded runs/decoded

      vesicle neurons clamp --neuron 27.31 --strength 3 "What is your favourite animal?"
    """
    if (decoded is None) == (neuron is None):
        raise VesicleError("give one of --decoded and --neuron")
    if neuron is not None and prompt is None:
        raise VesicleError("--neuron needs PROMPT, which is answered while it is held")
    if decoded is not None and prompt is not None:
        raise VesicleError("PROMPT goes with --neuron; --decoded takes prompts from --data")
    if neuron is not None:
        prompt = read_prompt(prompt, None)
    check_strength(strength)
    check_writable(out, "--out")
    from vesicle.commands.neurons import subject as shared
    from vesicle.files import write_json
    from vesicle.neurons.clamping import clamp_specialised, largest_values, steer
    from vesicle.neurons.decoding.tokens import Decoded
    from vesicle.neurons.hooks import Hooked
    from vesicle.neurons.neuron import Neuron
    from vesicle.training.display import progress_bar

    known = None if decoded is None else Decoded.load(decoded)
    subject = shared.load(model, revision)
    hooked = Hooked(subject.model)
    one = None if neuron is None else Neuron.parse(neuron, hooked.shape)
    if prompt is not None:
        room = subject.text.context_window - len(subject.text.chat(prompt))
        if new_tokens > room:
            raise VesicleError(
                f"--new-tokens is {new_tokens}; allowed after this prompt: up to {max(0, room)}"
            )
    spans = shared.texts(
        subject,
        data,
        split,
        field,
        length=shared.span(subject),
        count=4 if data is None else 8,
        seed=seed,
    )
    most = largest_values(hooked, spans, kind.value)
    told: dict[str, Any]
    if known is not None:
        known.check(subject.model)
        ids = shared.texts(
            subject, data, split, field, length=_LENGTH, count=prompts, seed=seed + 1
        )
        with progress_bar("clamping", 2 * count, 0, sys.stderr.isatty() and not as_json) as bar:
            effect = clamp_specialised(
                hooked, known, kind.value, ids, most, count=count, strength=strength, seed=seed,
                show=bar,
            )  # fmt: skip
        told = effect.to_dict()
    else:
        assert one is not None
        assert prompt is not None
        value = strength * float(most[one.layer, one.index])
        told = {
            "neuron": str(one),
            "kind": kind.value,
            "value": value,
            "answers": steer(
                hooked, subject.text, prompt, one, kind.value, (0.0, value, -value), new_tokens
            ),
        }
    if out is not None:
        write_json(out, told, indent=2)
    if as_json:
        print_json(told)
        return
    _print(told)
    if out is not None:
        notice(f"wrote {out}")


def _print(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vesicle.terminal import visible

    console = Console()
    if "answers" in told:
        for answer in told["answers"]:
            held = "as it is" if answer["value"] is None else f"held at {answer['value']:.3g}"
            console.print(f"{told['neuron']} {held}:", style="bold")
            console.print(visible(answer["text"]), markup=False)
        return
    table = Table("tokens of", "nats", "95 %", title="rise of log probability")
    for name in (
        "specialised",
        "random",
        "other_token",
        "above_random",
        "above_other_token",
        "specialised_size",
        "random_size",
        "size_above_random",
    ):
        row = told[name]
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        table.add_row(name.replace("_", " "), f"{row['mean']:+.3f}", interval)
    console.print(table)
