"""`vesicle run`: answer one prompt, and tell what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import (
    GOAL,
    PHASE,
    REVISION,
    Goal,
    argument_text,
    check_budget,
    check_namm,
    check_writable,
    notice,
    read_phases,
    read_prompt,
)
from vesicle.commands.machine import announce_core, announce_fallback
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError, VesicleError
from vesicle.models.default import DEFAULT_MODEL
from vesicle.models.shorten import Place, shorten
from vesicle.shipped import modulator_for, namm_for
from vesicle.terminal import AnswerWriter, SafeConsole

if TYPE_CHECKING:
    from vesicle.engine import Engine, Sampling, Sequence
    from vesicle.models import Text
    from vesicle.modulator import Modulator
    from vesicle.neurons.hnlpu import ChipReport
    from vesicle.phases import Phases
    from vesicle.plan import Method, Plan
    from vesicle.reading import Reading
    from vesicle.report import Answer

_WHAT, _HOW, _OUTPUT = "What runs", "How it is sampled", "What is shown and saved"
_WARM_UP_TOKENS = 8
_MOST_THREADS = 512
"""Far more than that, and PyTorch crashes where it cannot start them."""
_SHOWN_TOKENS = 4
_CUT_CHARACTER = "\ufffd"


class WeightFormat(StrEnum):
    """How weights are stored; `auto` is packed where the file is, or where int4 loses nothing."""

    auto = "auto"
    int4 = "int4"
    int8 = "int8"
    mixed = "mixed"
    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"


class PriceList(StrEnum):
    """Other hardware, whose prices are arithmetic and no measurement."""

    hnlpu = "hnlpu"


class KvFormat(StrEnum):
    """How keys and values are stored; `auto` is fp16 beside packed weights, else as the weights."""

    auto = "auto"
    int8 = "int8"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What every generation of one command shares."""

    engine: Engine
    text: Text
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - reads standard input.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a .gguf file, a hub id or a name that vesicle models lists; the "
            "default is SmolLM2-135M-Instruct, fetched once.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION, rich_help_panel=_WHAT)] = None,
    modulator: Annotated[
        str | None,
        typer.Option(
            help="A modulator's folder or hub id; the default is the one shipped for the model.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the dense FLOPs of generated tokens to spend, above 0 and up to 1; "
            "the default is the modulator's own.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(help=PHASE, metavar="WHERE", show_default=False, rich_help_panel=_WHAT),
    ] = None,
    goal: Annotated[
        Goal | None,
        typer.Option(help=f"{GOAL} \\[default: time]", show_default=False, rich_help_panel=_WHAT),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="Share of the key-value cache to hold, above 0 and up to 1: a NAMM forgets the "
            "rest as the text goes on.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    read: Annotated[
        int | None,
        typer.Option(
            help="Cached tokens that each new one reads, 128 and more; the others stay, and later "
            "ones may read them. Makes long texts faster, prompts too. A modulator acts besides "
            "if --budget or --modulator is given.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    namm: Annotated[
        Path | None,
        typer.Option(
            help="The folder of that NAMM; the default is the one shipped for the model.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Execute a plan that --plan saved.", rich_help_panel=_WHAT),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Answer once more, dense.", rich_help_panel=_WHAT),
    ] = False,
    weights: Annotated[
        WeightFormat,
        typer.Option(
            help="Format of the weights; auto packs those of a quantised file, and others as int4 "
            "if that loses nothing; else it is the file's own. In mixed, each has 4 or 8 bits.",
            rich_help_panel=_WHAT,
        ),
    ] = WeightFormat.auto,
    kv: Annotated[
        KvFormat,
        typer.Option(
            help="Format of cached keys and values; auto is fp16 beside packed weights, else that "
            "of the weights.",
            rich_help_panel=_WHAT,
        ),
    ] = KvFormat.auto,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_THREADS,
            help="CPU threads; the default is torch's, within a container's quota.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Instructions to the model.", rich_help_panel=_HOW)
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text: no chat template.", rich_help_panel=_HOW),
    ] = False,
    control_tokens: Annotated[
        bool,
        typer.Option(
            "--control-tokens",
            help="Special tokens spelt out in the prompt (<|im_end|>) are meant, not text.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="Leave out as much of a prompt's text as makes room for --max-new-tokens; "
            "--system and the chat template stay.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    truncate_at: Annotated[
        Place | None,
        typer.Option(
            help="Where --truncate leaves text out; the default is the middle, with --raw the "
            "start.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_HOW)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", rich_help_panel=_HOW)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Draw from the likeliest tokens with this much probability in all.",
            rich_help_panel=_HOW,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.", rich_help_panel=_HOW)
    ] = 0,
    price: Annotated[
        PriceList | None,
        typer.Option(
            help="Price what was executed on other hardware besides: hnlpu, a chip with the model "
            "in its metal (arithmetic on published numbers).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="Save what was decided for each token and layer (.safetensors).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object instead.", rich_help_panel=_OUTPUT),
    ] = False,
    no_heat: Annotated[
        bool,
        typer.Option("--no-heat", help="No coloured answer.", rich_help_panel=_OUTPUT),
    ] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="The answer alone.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Answer a prompt within a budget of compute.

    The answer goes to standard output, the report of what it cost to standard error.

    [bold]Examples[/bold]

      vesicle run "Why is the sky blue?"

      vesicle run "Why is the sky blue?" --budget 0.7 --compare

      vesicle run "Why is the sky blue?" --budget 0.7 --goal flops

      vesicle run "Why is the sky blue?" --budget 0.7 --phase all

      vesicle run --file report.txt --memory 0.25

      vesicle run --file report.txt --read 1024

      vesicle run --file question.txt --json > answer.json

      git diff | vesicle run - --system "Summarise this change." --truncate
    """
    wanted = read_prompt(prompt, file)
    system = None if system is None else argument_text(system, "--system")
    _check(budget, system, raw, replay, save_plan)
    read_phases(phase)  # refuses what means nothing, before the core is loaded
    if phase and replay is not None:
        raise DataError("--replay and --phase are both given; a saved plan has its own phases")
    if goal is not None and replay is not None:
        raise DataError("--replay and --goal are both given; a saved plan is executed as it is")
    _check_memory(memory, namm, replay)
    _check_read(read, replay)
    if price is not None and no_report and not as_json:
        raise DataError("--price is part of the report, which --no-report leaves out")
    show_progress = sys.stderr.isatty()

    with _status("loading", show_progress):
        from vesicle.engine import Engine, Sampling
        from vesicle.models import Text, resolve_model
        from vesicle.plan import Dense, Plan

        phases = read_phases(phase, goal or Goal.time)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        saved = Plan.load(replay) if replay else None
    folder = resolve_model(model, revision=revision)
    with _status("loading", show_progress):
        text = Text.from_folder(folder)
        if not raw and not text.has_chat_template:
            _tell_no_template(system)
        encode = _encoder(text, system, raw=raw, control_tokens=control_tokens)
        if not control_tokens:
            _tell_spelt(text, [wanted, system or ""])
        if truncate or truncate_at is not None:
            at = truncate_at or (Place.start if raw else Place.middle)
            ids = _fit(text, wanted, encode, max_new_tokens, at)
        else:
            ids = _whole(text, encode(wanted))
        limit = max_new_tokens if saved is None else _limit(saved, len(ids), max_new_tokens)
        source, loaded = None, None
        if read is None or budget is not None or modulator is not None:
            source, loaded = _find_modulator(modulator, folder, budget, quiet=saved is not None)
        if loaded is None:
            budget = None
        elif saved is None and budget is None:
            budget = loaded.default_budget(phases)
        if loaded is not None and budget is not None and saved is None:
            _tell_reach(loaded, budget, phases)
        reading = None if read is None else _reading(read, folder)
        method = _method(loaded, saved, budget, phases, reading)
        if memory is not None and memory < 1:
            opening = 0 if system is None else _system_turn(ids, encode)
            method = _remembering(method, memory, namm, folder, len(ids), opening)
        if compare and isinstance(method, Dense):
            raise VesicleError(
                "--compare has nothing to compare: without a modulator, --memory and --read the "
                "run is dense"
            )
        announce_core()
        engine = Engine.from_pretrained(
            folder,
            weights=None if weights is WeightFormat.auto else weights.value,
            kv=None if kv is KvFormat.auto else kv.value,
            threads=threads,
        )
        announce_fallback(engine)
        engine.start(method)  # refuses what does not fit, before anything is generated

    settings = _Settings(
        engine=engine, text=text, prompt=ids, max_new_tokens=limit, sampling=sampling
    )
    if compare:
        _warm_up(settings, [method, Dense()])
    write = _discard if as_json else AnswerWriter(sys.stdout).write
    with _status("generating", show_progress and as_json):
        answer, sequence = _generate(settings, method, write)
    write("\n")
    if save_plan is not None:
        sequence.plan.save(save_plan)
    if saved is not None and limit < max_new_tokens and len(answer.token_ids) == limit:
        notice(f"stopped at the end of the plan, after {saved.n_tokens} tokens")
    elif sequence.length >= text.context_window and len(answer.token_ids) < limit:
        notice(f"stopped at the end of the context window, after {text.context_window} tokens")
    dense = None
    if compare:
        with _status("generating once more, dense", show_progress):
            dense, _ = _generate(settings, Dense(), _discard)
    priced = None if price is None else _priced(sequence)

    if as_json:
        source_namm = (namm or namm_for(folder)) if memory is not None and memory < 1 else None
        about: dict[str, Any] = {
            "memory": memory,
            "read": read,
            "model": model or DEFAULT_MODEL,
            "model_path": str(folder),
            "modulator": source,
            "namm": None if source_namm is None else str(source_namm),
        }
        if priced is not None:
            about["price"] = {"machine": "hnlpu", **priced.to_dict()}
        print_json({**answer.to_dict(), "budget": budget, **about, **_compared(dense)})
    elif not no_report:
        from vesicle.report import show

        console = SafeConsole(stderr=True, highlight=False)
        show(answer, console, budget=budget, compared=dense, heat=not no_heat)
        if priced is not None:
            from vesicle.neurons.hnlpu import tables

            for table in tables(priced):
                console.print()
                console.print(table)
    elif dense is not None:
        notice("the dense answer is part of the report, which --no-report leaves out")


def _check(
    budget: float | None, system: str | None, raw: bool, replay: Path | None, plan: Path | None
) -> None:
    """Refuse what can be refused before anything heavy is loaded."""
    check_budget(budget)
    if raw and system is not None:
        raise DataError(
            "--system and --raw are both given; without a chat template there is no system turn"
        )
    if replay is not None and budget is not None:
        raise DataError("--replay and --budget are both given; a saved plan has its own budget")
    if replay is not None and not replay.is_file():
        raise DataError(f"--replay {replay}: no such file")
    check_writable(plan, "--plan")


def _check_memory(memory: float | None, namm: Path | None, replay: Path | None) -> None:
    if memory is not None and not 0 < memory <= 1:
        raise DataError(f"--memory is {memory:g}; allowed: above 0 and up to 1")
    if memory is not None and replay is not None:
        raise DataError("--replay and --memory are both given; a saved plan says what it forgets")
    if namm is None:
        return
    if memory is None:
        raise DataError("--namm has no effect without --memory, the share of the cache to hold")
    check_namm(namm)


def _check_read(read: int | None, replay: Path | None) -> None:
    if read is None:
        return
    if replay is not None:
        raise DataError("--read and --replay are both given; a saved plan says what is read")
    from vesicle.reading import LEAST_TOKENS

    if read < LEAST_TOKENS:
        raise DataError(f"--read is {read}; allowed: {LEAST_TOKENS} and above")


def _reading(entries: int, folder: Path) -> Reading:
    """A method that reads so many entries, dealt out by what the model's NAMM knows of heads."""
    from vesicle.families import find_family
    from vesicle.models.checks import read_config
    from vesicle.namm import Namm
    from vesicle.reading import Reading

    config = read_config(folder)
    shape = find_family(config).decoder_config(config).shape
    source = namm_for(folder)
    profile = None if source is None else Namm.load(source).profile_of(shape)
    return Reading(entries, shape, profile=profile)


def _system_turn(ids: list[int], encode: Callable[[str], list[int]]) -> int:
    """Leading tokens of a prompt that are there whatever is asked."""
    from vesicle.models.text import n_common

    return min(n_common(ids, encode("\n")), n_common(ids, encode("a")))


def _remembering(
    method: Method, memory: float, namm: Path | None, folder: Path, n_tokens: int, opening: int
) -> Method:
    """A method that holds a share of the cache.

    Args:
        method: Decides everything else.
        memory: The share, below 1.
        namm: Whose; the model's shipped one if none.
        folder: Of the model.
        n_tokens: Of the prompt.
        opening: Of these, tokens up to the end of the system turn, which stay where there is room.
    """
    from vesicle.namm import Namm, NammMemory

    source = namm or namm_for(folder)
    if source is None:
        notice("no NAMM is shipped for this model: the first and the newest entries stay")
    found = Namm.fresh() if source is None else Namm.load(source)
    if opening > memory * n_tokens:
        notice(
            f"the system turn has {opening} tokens, more than {memory:g} of the prompt's "
            f"{n_tokens}: it may be forgotten"
        )
        opening = 0
    spans = [(0, opening)] if opening else []
    interval = found.settings.interval
    if n_tokens < interval:
        notice(
            f"--memory forgets for the first time after {interval} tokens: the prompt's {n_tokens} "
            "are held whole until then"
        )
    return NammMemory(found, memory=memory, protects=spans, inner=method)


def _encoder(
    text: Text, system: str | None, *, raw: bool, control_tokens: bool
) -> Callable[[str], list[int]]:
    """What a person asks, to the ids of the whole prompt."""

    def encode(prompt: str) -> list[int]:
        if raw:
            return text.encode(prompt, control_tokens=control_tokens)
        return text.chat(prompt, system, control_tokens=control_tokens)

    return encode


def _tell_no_template(system: str | None) -> None:
    """Say that a model was not made for chats, and refuse what would be lost on it."""
    if system is not None:
        raise DataError(
            "--system is given, and this model has no chat template; without one there is no "
            "system turn"
        )
    notice(
        "this model has no chat template, so the text is continued as it is; --raw says that this "
        "is meant"
    )


def _tell_spelt(text: Text, parts: list[str]) -> None:
    spelt = list(dict.fromkeys(token for part in parts for token in text.control_tokens(part)))
    if spelt:
        shown = ", ".join(spelt[:_SHOWN_TOKENS]) + (", ..." if len(spelt) > _SHOWN_TOKENS else "")
        notice(f"the prompt spells out {shown}: taken as text; --control-tokens takes it as meant")


def _whole(text: Text, ids: list[int]) -> list[int]:
    """The prompt's tokens, if they are some and not too many."""
    window = text.context_window
    if len(_some(ids)) > window:
        raise DataError(
            f"the prompt has {len(ids)} tokens; the model's context window is {window}: "
            "shorten it, or leave a part out with --truncate"
        )
    return ids


def _fit(
    text: Text, prompt: str, encode: Callable[[str], list[int]], max_new_tokens: int, at: Place
) -> list[int]:
    """The prompt's tokens, with less of its text where they would leave no room for an answer."""
    window = text.context_window
    room = window - max_new_tokens
    if room < 1:
        raise DataError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context "
            f"window of {window}"
        )
    n_all = len(_some(encode(prompt)))
    found = shorten(
        prompt,
        room,
        prompt=encode,
        encode=lambda part: text.encode(part, control_tokens=False, continues=True),
        # A character that is cut in two is left out whole.
        decode=lambda ids: text.decode(ids).strip(_CUT_CHARACTER),
        at=at,
    )
    if found is None or not found.ids:
        raise DataError(
            f"the prompt has {n_all} tokens, and without any of its text more than the {room} that "
            f"--max-new-tokens {max_new_tokens} leaves of the model's context window of {window}"
        )
    if found.n_left_out:
        n_kept = found.n_text - found.n_left_out
        kept = {
            Place.middle: f"in its middle: the first {n_kept - n_kept // 2} and the last "
            f"{n_kept // 2} are kept",
            Place.start: f"at its start: the last {n_kept} are kept",
            Place.end: f"at its end: the first {n_kept} are kept",
        }
        notice(
            f"the prompt has {n_all} tokens, and there is room for {room}; of its text's "
            f"{found.n_text}, {found.n_left_out} are left out {kept[at]}"
        )
    return found.ids


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise DataError("the prompt has no tokens")
    return ids


def _limit(plan: Plan, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens a Plan's rows last for; the last one drawn needs none."""
    if prompt_tokens > plan.n_tokens:
        raise DataError(
            f"the plan covers {plan.n_tokens} tokens; the prompt alone has {prompt_tokens}"
        )
    return min(max_new_tokens, plan.n_tokens - prompt_tokens + 1)


def _find_modulator(
    spec: str | None, folder: Path, budget: float | None, *, quiet: bool
) -> tuple[str | None, Modulator | None]:
    """The modulator to use and where it is from; None for both, and a line that says why."""
    from vesicle.modulator import Modulator

    if spec is not None:
        return spec, Modulator.from_pretrained(spec)
    shipped = modulator_for(folder)
    if shipped is not None:
        return str(shipped), Modulator.from_pretrained(shipped)
    if not quiet:
        ignored = "" if budget is None else f" and --budget {budget:g} has no effect"
        notice(
            f"no modulator is shipped for this model, so it runs dense{ignored}; "
            "vesicle train --help tells how to make one"
        )
    return None, None


def _method(
    modulator: Modulator | None,
    saved: Plan | None,
    budget: float | None,
    phases: Phases,
    reading: Reading | None,
) -> Method:
    from vesicle.plan import FFN_SMALL, Dense, Replay

    if saved is None:
        if modulator is None or budget is None:
            return reading or Dense()
        return modulator.at(budget, phases, reading)
    if modulator is None and ((saved.ffn == FFN_SMALL).any() or (saved.attention == 0).any()):
        raise VesicleError(
            "this plan lands on stand-ins: name the --modulator that it was made with"
        )
    previews = bool(saved.likeliest.any() or saved.logits.any())
    if previews and (modulator is None or modulator.head_preview is None):
        raise VesicleError(
            "this plan previews the LM head: name the --modulator that it was made with"
        )
    return Replay(saved, None if modulator is None else modulator.stand_ins)


def _tell_reach(modulator: Modulator, budget: float, phases: Phases) -> None:
    """Say so where a budget cannot be met."""
    transmitters = modulator.predictor.config.transmitters
    if budget < 1 and all(getattr(phases, name) in ("prompt", "never") for name in transmitters):
        notice(
            "--budget counts generated tokens, and under this --phase or --goal no transmitter "
            "acts on them: they are executed whole; --goal flops lets all act"
        )
    elif line := modulator.below_reach(budget, phases):
        notice(line)


def _warm_up(settings: _Settings, methods: list[Method]) -> None:
    """Touch weights and kernels once, so that the run timed first is not the slower for it."""
    for method in methods:
        sequence = settings.engine.start(method)
        stream = settings.engine.stream(
            sequence, settings.prompt[:_WARM_UP_TOKENS], max_new_tokens=2
        )
        for _ in stream:
            pass


def _generate(
    settings: _Settings, method: Method, write: Callable[[str], None]
) -> tuple[Answer, Sequence]:
    """Generate with one method, handing text on as it is complete."""
    from vesicle.report import Answer

    engine, text = settings.engine, settings.text
    sequence = engine.start(method)
    stream = engine.stream(
        sequence,
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        stop=text.eos_ids,
    )
    decoder, parts, ids = text.stream(), list[str](), list[int]()
    prefill_s = decode_s = 0.0
    while True:
        begun = time.perf_counter()
        token = next(stream, None)
        spent_s = time.perf_counter() - begun
        if sequence.length == len(settings.prompt) and not ids:
            prefill_s = spent_s
        else:
            decode_s += spent_s
        if token is None:
            break
        ids.append(token)
        parts.append(decoder.push(token))
        write(parts[-1])
    parts.append(decoder.flush())
    write(parts[-1])
    answer = Answer.of(
        sequence,
        prompt_tokens=len(settings.prompt),
        text="".join(parts),
        token_ids=ids,
        pieces=text.pieces(ids),
        prefill_s=prefill_s,
        decode_s=decode_s,
    )
    return answer, sequence


def _priced(sequence: Sequence) -> ChipReport:
    """What was executed, on a hardwired chip."""
    from vesicle.neurons.hnlpu import report

    engine = sequence.engine
    return report(
        sequence.cost, sequence.dense_cost, engine.shape, sequence.length, plan=sequence.plan
    )


def _compared(dense: Answer | None) -> dict[str, Any]:
    if dense is None:
        return {}
    return {
        "compare": {
            "text": dense.text,
            "executed": dense.executed.summary(),
            "prefill_tokens_per_s": dense.prefill_tokens_per_s,
            "decode_tokens_per_s": dense.decode_tokens_per_s,
        }
    }


@contextmanager
def _status(what: str, shown: bool) -> Iterator[None]:
    """A spinner on standard error while something loads."""
    if not shown:
        yield
        return
    with SafeConsole(stderr=True).status(f"{what} ..."):
        yield


def _discard(part: str) -> None:
    pass
