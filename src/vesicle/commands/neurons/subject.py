"""What the commands about neurons share: a model in fp32, and texts to look at it with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vesicle.commands import recipe
from vesicle.commands.inputs import check_budget
from vesicle.errors import BudgetError, DataError, VesicleError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from vesicle.neurons.hooks import Hooked

_SPAN = 240
MOST_SEED = 2**63 - 1
MOST_STRENGTH = 1e6
DATA = (
    "Text to look at: a .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set; a "
    "short text that comes with Vesicle if none."
)


def load(model: str | None, revision: str | None) -> recipe.Subject:
    """A model in fp32.

    Raises:
        ModelError: It cannot be found, read or supported.
    """
    subject = recipe.load_subject(model, revision)
    subject.model.float().requires_grad_(False)
    return subject


def texts(
    subject: recipe.Subject,
    data: str | None,
    split: str,
    field: str,
    *,
    length: int,
    count: int,
    seed: int,
) -> Tensor:
    """Windows (count, length) of token ids, drawn from a text.

    Args:
        subject: Whose tokens.
        data: As `DATA` tells.
        split: Part of the data.
        field: Of JSON lines, the text's.
        length: T.
        count: Windows.
        seed: Of the draw.

    Raises:
        DataError: The text is missing, malformed or too short.
    """
    import torch

    place, part = source(data, split)
    try:
        ids = recipe.read_windows(subject, place, part, field, length)
    except DataError as error:
        # Commands about neurons have no option for the length of a window.
        told = str(error).replace("give more text or a shorter sequence length", "give more text")
        raise DataError(told) from error
    if len(ids) < count:
        raise DataError(
            f"the text has {len(ids)} windows of {length} tokens, and {count} are needed; give a "
            "longer one with --data"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[:count]]


def span(subject: recipe.Subject) -> int:
    """Tokens of a text by which a neuron's largest value is told."""
    return min(_SPAN, subject.text.context_window)


def check_apart(out: Path) -> None:
    """Refuse to write into the folder of a model.

    Raises:
        DataError: It holds one.
    """
    if (out / "config.json").is_file():
        raise DataError(f"--out {out} is the folder of a model; give another one")


def check_strength(strength: float) -> None:
    """Refuse what is no number to multiply with.

    Raises:
        VesicleError: With what is allowed.
    """
    if not 0 < abs(strength) <= MOST_STRENGTH:
        raise VesicleError(
            f"--strength is {strength:g}; allowed: up to {MOST_STRENGTH:g}, below 0 too, and not 0"
        )


def check_below_rest(budget: float) -> None:
    """Refuse a budget at which levels follow from nothing.

    Raises:
        BudgetError: It is 1, or out of range.
    """
    check_budget(budget)
    if budget == 1:
        raise BudgetError("--budget is 1; allowed: above 0, below 1, since at 1 all levels rest")


def source(data: str | None, split: str) -> tuple[str, str]:
    """Where a text is, and which part of it: of what comes with Vesicle if none is given."""
    if data is not None:
        return data, split
    from importlib import resources

    return str(resources.files("vesicle.tasks") / "samples" / "filler.jsonl"), "train"


def hooked(
    subject: recipe.Subject, model: str | None, modulator: Path | None, budget: float
) -> Hooked:
    """The model with a modulator: that of a folder, else the one that ships with it, if any.

    Args:
        subject: The model.
        model: As it was named.
        modulator: A folder.
        budget: Share of the dense FLOPs of all tokens, in (0, 1].

    Raises:
        VesicleError: The folder holds no modulator, or one for another model.
    """
    from vesicle.models.default import DEFAULT_MODEL
    from vesicle.modulator import Modulator
    from vesicle.neurons.hooks import Hooked
    from vesicle.phases import EVERYWHERE
    from vesicle.shipped import load_default_modulator, shipped_modulators

    if modulator is not None:
        held = Modulator.from_pretrained(modulator)
    elif (model or DEFAULT_MODEL) in shipped_modulators():
        held = load_default_modulator(model)
    else:
        return Hooked(subject.model)
    return Hooked(subject.model, held, budget, phases=EVERYWHERE)
