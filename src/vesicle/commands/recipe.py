"""The steps that training and calibrating share: a model and text in, a modulator out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.commands.inputs import check_folder, notice
from vesicle.errors import DataError, VesicleError
from vesicle.folders import locked
from vesicle.models.default import DEFAULT_MODEL
from vesicle.training.processes import rank

if TYPE_CHECKING:
    from torch import Tensor

    from vesicle.evaluation.execution.answers import Pair
    from vesicle.models import Text
    from vesicle.modulator import Modulator
    from vesicle.small_modules import SmallModule
    from vesicle.training.lessons import Lessons

SENSITIVITY_WINDOWS, DIAL_WINDOWS = 1, 4
_ANY = 1 << 30
"""More tokens than any prompt has."""

_APART = 1_000_003
"""Between the seeds of what is trained on and of what is judged by."""

CALIBRATION = "calibration"
"""Folder inside the output that keeps measurements, so that going on repeats none."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A Hugging Face model, its text side, and what it is called."""

    model: Any
    text: Text
    name: str


def holding_out(command: Callable[..., None]) -> Callable[..., None]:
    """A command that holds its folder `out` from beginning to end, see `vesicle.folders`."""

    @functools.wraps(command)
    def held(**given: Any) -> None:
        check_folder(given["out"])
        # Of several processes that train together, the first holds the folder.
        with locked(given["out"]) if rank() == 0 else nullcontext():
            command(**given)

    return held


def load_subject(spec: str | None, revision: str | None = None) -> Subject:
    """Find and load a model for the reference executor.

    Raises:
        ModelError: It cannot be found, read or supported.
    """
    from vesicle.models import Text, resolve_model

    folder = resolve_model(spec, revision=revision)
    text = Text.from_folder(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    name = DEFAULT_MODEL if spec is None else Path(spec).name if Path(spec).exists() else spec
    return Subject(model=model.eval(), text=text, name=name)


def read_windows(subject: Subject, data: str, split: str, field: str, length: int) -> Tensor:
    """Windows (N, length) of token ids.

    Raises:
        DataError: The text is missing, malformed, or too short for a window.
    """
    from vesicle.training.data import load_documents, token_windows

    _check_length(subject, length)
    return token_windows(load_documents(data, split, field), subject.text.encode, length)


def check_predictor(kind: str, tasks: str | None) -> None:
    """Refuse a predictor that cannot be trained so, before anything is measured.

    Raises:
        VesicleError: It is unknown, or carries state and is to be trained on tasks.
    """
    from vesicle.predictors import PREDICTORS

    fitting = [name for name, p in PREDICTORS.items() if tasks is None or not p.remembers]
    if kind not in fitting:
        on = "" if tasks is None else " with --tasks"
        raise VesicleError(f"predictor is {kind!r}; allowed{on}: {', '.join(fitting)}")


def task_names_of(given: str) -> list[str]:
    """The names in a list with commas between, each once.

    Raises:
        VesicleError: One of them is empty, or there is no such task.
    """
    from vesicle.tasks.registry import find_task

    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise VesicleError(f"--tasks is {given!r}; allowed: names of tasks with commas between")
    for name in names:
        find_task(name)
    return list(dict.fromkeys(names))


def _check_length(subject: Subject, length: int) -> None:
    if length > subject.text.context_window:
        raise DataError(
            f"windows have {length} tokens; the model's context window is "
            f"{subject.text.context_window}"
        )


def read_lessons(
    subject: Subject, tasks: Sequence[str], data: str, length: int, limit: int, seed: int
) -> Lessons:
    """Prompts and answers of tasks' training splits.

    Args:
        subject: The model that they are for.
        tasks: Names of tasks.
        data: A local folder of data sets, `sample`, or `hub`.
        length: Tokens of prompt and answer together.
        limit: Most items of each task.
        seed: Of the draw.

    Raises:
        DataError: A source cannot be read, or nothing of it fits.
        VesicleError: There is no such task.
    """
    from vesicle.tasks.registry import find_task
    from vesicle.training.lessons import Lessons

    _check_length(subject, length)
    for name in tasks:
        if "train" not in find_task(name).splits:
            raise VesicleError(
                f"{name} has no training split: what it is judged by would be trained on"
            )
    try:
        # Generated tasks make their items from the seed: not those that they are judged by.
        found = _pairs(subject, tasks, data, length, limit, seed + _APART, "train")
    except DataError as error:
        # What an evaluation calls the longest prompt is a window here.
        raise DataError(str(error).replace("--max-length", "--sequence-length")) from error
    return Lessons.of_answers(found, length, min(subject.text.eos_ids, default=0))


def read_task_windows(
    subject: Subject,
    tasks: Sequence[str],
    data: str,
    length: int,
    *,
    least: int,
    most: int,
    seed: int,
) -> dict[str, Tensor]:
    """Windows (N, length) by task: the ends of prompts with their answers.

    Args:
        subject: The model that they are for.
        tasks: Names of tasks.
        data: As `read_lessons` has it.
        length: Tokens of a window.
        least: Windows that each task must have.
        most: Windows of each task.
        seed: Of the draw.

    Raises:
        DataError: A source cannot be read, or holds too few that are as long.
        VesicleError: There is no such task.
    """
    import torch

    found = {}
    # However long a prompt is, its end is what is taken.
    pairs_by_task = _pairs(subject, tasks, data, _ANY, 8 * most, seed, None, window=length)
    for name, pairs in pairs_by_task.items():
        long = [both[-length:] for p, a in pairs if len(both := [*p, *a]) >= length]
        if len(long) < least:
            raise DataError(
                f"{name} has {len(long)} prompts with answers of {length} tokens; {least} are "
                "needed: fewer texts, or shorter ones"
            )
        found[name] = torch.tensor(long[:most], dtype=torch.long)
    return found


def _pairs(
    subject: Subject,
    tasks: Sequence[str],
    data: str,
    length: int,
    limit: int,
    seed: int,
    split: str | None,
    window: int | None = None,
) -> dict[str, list[Pair]]:
    """Prompts and answers by task; of the split where a task has it, else of its own choice."""
    from vesicle.evaluation.execution.answers import pairs_of
    from vesicle.tasks.base import Settings
    from vesicle.tasks.registry import find_task
    from vesicle.tasks.sources import load_items

    text, found = subject.text, {}
    settings = Settings(seed=seed, encode=text.encode)
    for task in [find_task(name) for name in tasks]:
        own = split if split in task.splits else None
        source = None if data == "hub" else data
        loaded = load_items(task, data=source, split=own, settings=settings, limit=limit)
        found[task.name] = pairs_of(task, loaded.items, text, text.turn_end, length, window)[:limit]
    return found


def read_small_ffns(
    subject: Subject, folder: Path | None, transmitters: Sequence[str]
) -> SmallModule | None:
    """What `--small-ffns` names.

    Raises:
        VesicleError: They cannot be read, are of another model, or nothing would have them run.
    """
    if folder is None:
        return None
    from vesicle.duo import load_small_ffns
    from vesicle.evaluation.execution.language_modelling import model_shape

    if "serotonin" not in transmitters:
        raise VesicleError(
            f"--small-ffns is {folder}; allowed where serotonin is among --transmitters, which are "
            f"{', '.join(transmitters)}"
        )
    return load_small_ffns(folder, model_shape(subject.model))


def new_modulator(
    subject: Subject,
    windows: Tensor,
    cache: Path,
    *,
    predictor: str,
    transmitters: Sequence[str],
    hidden: int,
    ffn_rank: int,
    attention_rank: int,
    small_ffns: SmallModule | None = None,
) -> Modulator:
    """An untrained modulator, its offsets set by measured sensitivity.

    Its stand-ins are fitted if it releases serotonin, which alone has them run; those of FFNs are
    `small_ffns` if there are any.

    Raises:
        VesicleError: A setting is unknown or out of range.
    """
    import torch

    from vesicle.calibration import allocate, fit_standins, measure_sensitivity
    from vesicle.evaluation.execution.language_modelling import model_shape
    from vesicle.modulator import Modulator
    from vesicle.predictors import Predictor
    from vesicle.small_modules import LowRankMaps

    check_predictor(predictor, None)
    torch.manual_seed(0)
    skips = "serotonin" in transmitters
    try:
        modulator = Modulator.new(
            model_shape(subject.model),
            model_name=subject.name,
            predictor=predictor,
            transmitters=tuple(transmitters),
            hidden=hidden,
            ffn_rank=ffn_rank if skips else 1,
            attention_rank=attention_rank if skips else 1,
        )
    except ValueError as error:
        raise VesicleError(str(error)) from error
    if skips:
        ffn, attention = modulator.ffn_standin, modulator.attention_standin
        assert isinstance(ffn, LowRankMaps)
        assert isinstance(attention, LowRankMaps)
        fit_standins(subject.model, windows, ffn, attention, cache=cache)
        if small_ffns is not None:
            modulator.ffn_standin = small_ffns
    few = windows[:SENSITIVITY_WINDOWS]
    sensitivity = measure_sensitivity(subject.model, modulator, few, cache=cache)
    assert isinstance(modulator.predictor, Predictor)
    allocate(sensitivity, modulator.predictor)
    return modulator


def with_preview(
    subject: Subject,
    modulator: Modulator,
    windows: Tensor,
    rank: int,
    *,
    likeliest: int,
    logits: int,
) -> Modulator:
    """The modulator with a preview of the LM head, fitted to windows (N, T).

    Raises:
        VesicleError: A number is more than the model has, the text is too short, or GABA is not
            released.
    """
    from vesicle.calibration import fit_preview
    from vesicle.evaluation.execution.language_modelling import model_shape

    shape = model_shape(subject.model)
    most = {
        "--head-rank": (rank, shape.width),
        "--head-likeliest": (likeliest, shape.vocabulary),
        "--head-logits": (logits, shape.vocabulary),
    }
    for name, (value, limit) in most.items():
        if value > limit:
            raise VesicleError(f"{name} is {value}; allowed: 1 to {limit} for this model")
    preview = fit_preview(subject.model, windows, rank)
    return modulator.with_preview(preview, likeliest, logits)


def measure(
    subject: Subject,
    modulator: Modulator,
    windows: Tensor,
    held_out: Tensor | None,
    *,
    gap: float = 0.03,
    cache: Path | None = None,
    long: Tensor | None = None,
) -> None:
    """Measure dial and default budget.

    That is where all tokens are governed and where prompts rest; and, if there are long windows,
    where GABA alone acts.

    Args:
        subject: The model.
        modulator: Whose `info` is filled in.
        windows: (N, T) token ids, for the dial; where there are none it is left as it is.
        held_out: (N, T) for the default budget; budgets are left as they are where there are none.
        gap: As `measure_dial` has it.
        cache: Likewise.
        long: (N, T) token ids for GABA alone; nothing of that is measured where there are none.
    """
    from vesicle.calibration import measure_dial, measure_long
    from vesicle.calibration.default_budget import measure_default_budget
    from vesicle.modulator import Measured
    from vesicle.phases import EVERYWHERE, Phases

    info, generated = modulator.info, Phases()
    if len(windows):
        notice("measuring the dial, of all tokens and of generated ones")
        info.dial = measure_dial(subject.model, modulator, windows, gap=gap, cache=cache)
        dial = measure_dial(
            subject.model, modulator, windows, gap=gap, phases=generated, cache=cache
        )
        known = info.default_budget if info.generated is None else info.generated.default_budget
        info.generated = Measured(dial=dial, default_budget=known)
    if long is not None:
        notice(f"measuring GABA alone, in {len(long)} windows of {long.shape[1]} tokens")
        info.gaba_alone, losses = measure_long(
            subject.model, modulator, long, cache=cache, tell=notice
        )
        info.training["gaba_alone_loss_nats"] = losses
        info.training["gaba_alone_tokens"] = long.shape[1]
    if held_out is None or not len(held_out) or info.generated is None:
        return
    notice("measuring the default budget, of all tokens and of generated ones")
    for phases, name in ((EVERYWHERE, "loss_by_budget_nats"), (generated, "generated_loss_nats")):
        best, losses = measure_default_budget(subject.model, modulator, held_out, phases=phases)
        (info if phases == EVERYWHERE else info.generated).default_budget = best
        info.training[name] = losses
