"""`vesicle info`: what a modulator is, and what the engine finds on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from vesicle.commands.machine import machine_rows
from vesicle.errors import DataError
from vesicle.models.catalogue import DEFAULT_MODEL
from vesicle.shipped import shipped_modulators
from vesicle.terminal import SafeConsole


def info(
    modulator: Annotated[
        str | None,
        typer.Argument(
            help="A modulator's folder or hub id; the default is the shipped one.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of the catalogue: tell of the modulator that is shipped for it."),
    ] = None,
) -> None:
    """Tell what a modulator is, and what the engine finds on this machine.

    Of the modulator: its model, effectors, dial and training. Of the machine: whether the native
    core is there, its instruction set, threads, and whether there is a GPU.

    [bold]Examples[/bold]

      vesicle info

      vesicle info runs/mine

      vesicle info --model gemma3-270m
    """
    if modulator is not None and model is not None:
        raise DataError("a modulator and --model are both given; a modulator has its own model")
    shipped = shipped_modulators()
    source = modulator or shipped.get(model or DEFAULT_MODEL)
    if source is None:
        raise DataError(
            f"no modulator is shipped for {model or DEFAULT_MODEL}; there are some for: "
            f"{', '.join(shipped) or 'none'}"
        )
    import json

    from rich.table import Table

    from vesicle.modulator import Measured, Modulator
    from vesicle.report import scaled

    loaded = Modulator.from_pretrained(source)
    about, config = loaded.info, loaded.predictor.config
    tensors = loaded.state_dict()
    size = sum(
        t.numel() * (2 if "standin" in name or "preview" in name else t.element_size())
        for name, t in tensors.items()
    )
    table = Table.grid(padding=(0, 2))
    table.add_row("modulator", str(source))
    table.add_row("made for", about.model_name or "a model without a name")
    table.add_row("model", "  ".join(f"{name} {value}" for name, value in about.model.items()))
    table.add_row(
        "predictor", f"{loaded.predictor.kind}, releases {', '.join(config.transmitters)}"
    )
    for name, effector in loaded.effectors.items():
        settings = ", ".join(f"{key} {value}" for key, value in effector.to_dict().items())
        table.add_row(f"  {name}", f"{type(effector).__name__}: {settings}")
    sizes = [
        f"{where}: " + ", ".join(f"{key} {value}" for key, value in module.size.items())
        for where, module in (("FFN", loaded.ffn_standin), ("attention", loaded.attention_standin))
    ]
    table.add_row("small modules", "; ".join(sizes))
    if loaded.head_preview is not None:
        table.add_row("LM head's preview", f"rank {loaded.head_preview.rank}")
    numbers = sum(t.numel() for t in tensors.values())
    table.add_row("size", f"{scaled(numbers, '')} parameters, {scaled(size, 'B')}")
    measured = {"all": Measured(dial=about.dial, default_budget=about.default_budget)}
    if about.generated is not None:
        measured["generated"] = about.generated
    if about.gaba_alone is not None:
        measured["GABA alone"] = about.gaba_alone
    for phase, found in measured.items():
        rows = "  ".join(f"{budget:g} at {dial:.3f}" for budget, dial in found.dial)
        table.add_row(f"dial, {phase}", rows)
        table.add_row(f"default budget, {phase}", f"{found.default_budget:g}")
    for name, value in about.training.items():
        table.add_row(f"training {name}", value if isinstance(value, str) else json.dumps(value))
    for row in machine_rows():
        table.add_row(*row)
    SafeConsole(highlight=False, markup=False, soft_wrap=True).print(table)
