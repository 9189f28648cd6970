"""`vesicle neurons hnlpu`: what a Plan would cost with the model in the metal of a chip."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import (
    MODEL,
    REVISION,
    argument_text,
    check_budget,
    notice,
    read_phases,
)
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.terminal import SafeConsole

if TYPE_CHECKING:
    from rich.table import Table

    from vesicle.cost import Cost
    from vesicle.plan import Plan
    from vesicle.shapes import ModelShape

_WHAT, _PLAN, _CHIP = "What is priced, one of these", "The Plan", "The chips"


def hnlpu(
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this, and price what was executed.", rich_help_panel=_WHAT),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A file of vesicle run --json.", metavar="FILE", rich_help_panel=_WHAT
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="A Plan of vesicle run --plan; the predictor's work is not in it.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="All that was published beside what the ledger gives, and what each kind of "
            "decision alone saves on the paper's chips.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    constants: Annotated[
        bool,
        typer.Option(
            "--constants", help="Every constant and where it is from.", rich_help_panel=_WHAT
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help=MODEL, rich_help_panel=_PLAN)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION, rich_help_panel=_PLAN)] = None,
    modulator: Annotated[
        str | None,
        typer.Option(
            help="With --prompt: a modulator's folder or hub id. \\[default: the model's own]",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="With --prompt: share of the dense FLOPs of generated tokens, above 0 and up to "
            "1; the default is the modulator's own.",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="With --prompt: on which tokens transmitters act, as vesicle run has it.",
            metavar="WHERE",
            show_default=False,
            rich_help_panel=_PLAN,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="With --prompt: longest answer.", rich_help_panel=_PLAN)
    ] = 64,
    cast_bits: Annotated[
        int, typer.Option(help="Bits of a weight in metal: 4, 8 or 16.", rich_help_panel=_CHIP)
    ] = 4,
    systems: Annotated[
        int, typer.Option(help="Copies of all chips that serve.", rich_help_panel=_CHIP)
    ] = 1,
    years: Annotated[float, typer.Option(help="Of service, above 0.", rich_help_panel=_CHIP)] = 3.0,
    updates: Annotated[
        int, typer.Option(help="Times that the weights change.", rich_help_panel=_CHIP)
    ] = 2,
    used: Annotated[
        float,
        typer.Option(
            help="Share of the time in which the pipeline is full, above 0 and up to 1.",
            rich_help_panel=_CHIP,
        ),
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Price a Plan in energy, time, area and money on a chip with the model in its metal.

    A hardwired language processing unit (HNLPU, Liu et al. 2026) exists on paper. All of this is
    arithmetic on published constants; where an assumption drives a number, it has a range.

    [bold]Examples[/bold]

      vesicle neurons hnlpu --prompt "Why is the sky blue?" --budget 0.8

      vesicle neurons hnlpu --from answer.json --systems 50

      vesicle neurons hnlpu --check

      vesicle neurons hnlpu --constants
    """
    _check_one(prompt=prompt, source=source, plan=plan, check=check, constants=constants)
    check_budget(budget)
    if prompt is None and (budget is not None or modulator is not None or phase):
        raise DataError("--budget, --modulator and --phase need --prompt, which is not given")

    from vesicle.neurons.hnlpu import Chip, Deployment, check_bits

    check_bits(cast_bits)
    deployment = Deployment(systems=systems, years=years, updates=updates, used=used)
    if check:
        _show_check(as_json)
        return
    if constants:
        _show_constants(as_json)
        return
    if prompt is not None:
        subject = _answered(prompt, model, revision, modulator, budget, phase, max_new_tokens)
    elif source is not None:
        subject = _read(source, model, revision)
    else:
        assert plan is not None
        subject = _planned(plan, model, revision)

    from vesicle.neurons.hnlpu import report, tables

    found = report(
        subject.executed,
        subject.dense,
        subject.shape,
        subject.n_tokens,
        plan=subject.plan,
        chip=Chip.of(subject.shape, bits=cast_bits),
        deployment=deployment,
    )
    if as_json:
        print_json({**subject.about, **found.to_dict()})
        return
    _print(tables(found))


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is priced, and `about`, what JSON says of where it is from."""

    executed: Cost
    dense: Cost
    shape: ModelShape
    n_tokens: int
    plan: Plan | None
    about: dict[str, Any]


def _check_one(
    *, prompt: str | None, source: Path | None, plan: Path | None, check: bool, constants: bool
) -> None:
    """Refuse all but one of the options that say what is priced."""
    options = {
        "--prompt": prompt is not None,
        "--from": source is not None,
        "--plan": plan is not None,
        "--check": check,
        "--constants": constants,
    }
    given = [option for option, is_given in options.items() if is_given]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "nothing to price is given"
        raise DataError(f"{found}; give one of {', '.join(options)}")


def _answered(
    prompt: str,
    model: str | None,
    revision: str | None,
    modulator: str | None,
    budget: float | None,
    phase: list[str] | None,
    max_new_tokens: int,
) -> _Subject:
    """An answer to a prompt."""
    wanted = argument_text(prompt, "--prompt")
    if not wanted.strip():
        raise DataError("--prompt is empty; a prompt needs at least one visible character")
    from vesicle.engine import Engine
    from vesicle.models import resolve_model
    from vesicle.modulator import Modulator
    from vesicle.shipped import modulator_for

    phases = read_phases(phase) if phase else None
    folder = resolve_model(model, revision=revision)
    chosen = modulator_for(folder) if modulator is None else modulator
    if chosen is None and (budget is not None or phase):
        raise DataError(
            "--budget and --phase need a modulator, and none is shipped for this model: give "
            "--modulator"
        )
    if chosen is None:
        notice("no modulator is shipped for this model, so it runs dense")
    loaded = None if chosen is None else Modulator.from_pretrained(chosen)
    engine = Engine.from_pretrained(folder)
    sequence = engine.start(loaded, budget, phases)
    chat = [{"role": "user", "content": wanted}] if engine.text.has_chat_template else wanted
    tokens = list(engine.stream(sequence, chat, max_new_tokens=max_new_tokens))
    return _Subject(
        executed=sequence.cost,
        dense=sequence.dense_cost,
        shape=engine.shape,
        n_tokens=sequence.length,
        plan=sequence.plan,
        about={
            "model": str(folder) if model is None else model,
            "modulator": None if chosen is None else str(chosen),
            "budget": budget,
            "text": engine.text.decode(tokens),
        },
    )


def _read(source: Path, model: str | None, revision: str | None) -> _Subject:
    """A file that `vesicle run --json` wrote."""
    from vesicle.files import read_json
    from vesicle.neurons.hnlpu import cost_from

    values = read_json(source)
    if not isinstance(values, dict):
        raise DataError(f"{source} holds no object; allowed: what vesicle run --json prints")
    executed = cost_from(values.get("executed"), f"{source}: executed")
    dense = cost_from(values.get("dense"), f"{source}: dense")
    n_tokens = _tokens(values.get("by_phase"), source)
    folder = _folder_of(values, model, revision)
    shape = _shape(folder)
    _check_dense(dense, shape, n_tokens, source)
    notice(
        "a file does not tell which modules were skipped: the middle scenario takes none to be; "
        "--plan and --prompt know"
    )
    return _Subject(
        executed=executed,
        dense=dense,
        shape=shape,
        n_tokens=n_tokens,
        plan=None,
        about={"model": str(folder) if model is None else model, "from": str(source)},
    )


def _planned(path: Path, model: str | None, revision: str | None) -> _Subject:
    """A saved Plan."""
    from vesicle.cost import price, price_dense
    from vesicle.models import resolve_model
    from vesicle.plan import Plan

    saved = Plan.load(path)
    folder = resolve_model(model, revision=revision)
    shape = _shape(folder)
    saved.check(shape)
    return _Subject(
        executed=price(saved, shape),
        dense=price_dense(shape, saved.n_tokens),
        shape=shape,
        n_tokens=saved.n_tokens,
        plan=saved,
        about={"model": str(folder) if model is None else model, "plan": str(path)},
    )


def _shape(folder: Path) -> ModelShape:
    from vesicle.families import find_family
    from vesicle.models.checks import read_config

    config = read_config(folder)
    return find_family(config).decoder_config(config).shape


def _folder_of(values: dict[str, Any], model: str | None, revision: str | None) -> Path:
    """Of a file's model: what --model says, else the folder that the file names, else its name."""
    from vesicle.models import resolve_model

    if model is None and revision is None:
        path, name = values.get("model_path"), values.get("model")
        if isinstance(path, str) and (Path(path) / "config.json").is_file():
            return Path(path)
        model = name if isinstance(name, str) else None
    return resolve_model(model, revision=revision)


def _tokens(by_phase: Any, source: Path) -> int:
    """How many tokens a file's cost is of."""
    try:
        counts = [by_phase[phase]["tokens"] for phase in ("prompt", "generated")]
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{source}: by_phase does not tell the tokens of prompt and generated; allowed: what "
            "vesicle run --json prints"
        ) from error
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
        raise DataError(f"{source}: by_phase counts {counts} tokens; allowed: whole numbers")
    return sum(counts)


def _check_dense(dense: Cost, shape: ModelShape, n_tokens: int, source: Path) -> None:
    """Refuse a file of another model: what its dense projections take is known exactly."""
    from vesicle.cost import price_dense

    expected = n_tokens * price_dense(shape, 1).flops_linear
    if n_tokens and dense.flops_linear != expected:
        raise DataError(
            f"{source}: the dense model's projections took {dense.flops_linear} FLOPs on "
            f"{n_tokens} tokens; this model's take {expected}: name the model with --model"
        )


def _show_check(as_json: bool) -> None:
    from vesicle.neurons.hnlpu import given_back, single_decisions
    from vesicle.neurons.hnlpu.listing import check_tables

    rows, decisions = given_back(), single_decisions()
    if as_json:
        print_json(
            {
                "given_back": [row.to_dict() for row in rows],
                "single_decisions": [decision.to_dict() for decision in decisions],
            }
        )
        return
    _print(check_tables(rows, decisions))


def _show_constants(as_json: bool) -> None:
    from vesicle.neurons.hnlpu import constants
    from vesicle.neurons.hnlpu.listing import constants_table

    found = constants()
    if as_json:
        print_json({"constants": [asdict(constant) for constant in found]})
        return
    _print([constants_table(found)])


def _print(shown: list[Table]) -> None:
    console = SafeConsole(highlight=False)
    for number, table in enumerate(shown):
        if number:
            console.print()
        console.print(table)
