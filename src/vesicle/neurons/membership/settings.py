"""Settings of a membership experiment, at two scales."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vesicle.errors import VesicleError
from vesicle.neurons.membership.precision import Precision
from vesicle.scratch import DecoderSize


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What is attacked, and what the attacker sees; the same for a decoder of ours and another.

    Attributes:
        window: C, tokens of a window in which the model is asked.
        folds: Of documents.
        bins: Of a histogram.
        shortest: Tokens that a document must have.
        longest: Tokens at which documents are cut.
        lengths: Tokens of each document that a partial attacker sees.
        precisions: Of the model; the first is full.
    """

    window: int = 128
    folds: int = 5
    bins: int = 100
    shortest: int = 256
    longest: int = 2048
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    precisions: tuple[Precision, ...] = (Precision(),)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        for name, least in (("window", 2), ("folds", 2), ("bins", 1), ("shortest", 2)):
            if getattr(self, name) < least:
                raise VesicleError(f"{name} is {getattr(self, name)}; allowed: {least} and above")
        if self.longest < self.shortest:
            raise VesicleError(
                f"longest is {self.longest}; allowed: {self.shortest}, the shortest, and above"
            )
        for length in self.lengths:
            if length < 2:
                raise VesicleError(f"lengths has {length}; allowed: 2 and above")
        if self.precisions[:1] != (Precision(),):
            raise VesicleError("the first precision is lowered; allowed: the full one, then others")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """How decoders are trained, and how they are attacked.

    Attributes:
        documents: Most, evenly spread over those that are long enough; half of them are members.
        sizes: Decoders, by their names; all precisions are tried on the first.
        batch: Windows of a step.
        epochs: How often the members are read.
        learning_rate: At its highest.
        seeds: Runs, each with members, weights and batches of its own: 0, 1, ...
        attacked: How they are attacked.
    """

    documents: int
    sizes: dict[str, DecoderSize]
    batch: int
    epochs: int
    learning_rate: float = 2e-3
    seeds: int = 3
    attacked: Attacked

    def __post_init__(self) -> None:
        """Check.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        for name, least in (("batch", 1), ("epochs", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise VesicleError(f"{name} is {getattr(self, name)}; allowed: {least} and above")
        least = 4 * self.attacked.folds
        if self.documents < least:
            raise VesicleError(
                f"documents is {self.documents}; allowed: {least}, four a fold, and above"
            )
        for name, size in self.sizes.items():
            if size.context < self.attacked.window:
                raise VesicleError(
                    f"window is {self.attacked.window}; allowed: up to {size.context}, "
                    f"the context of the {name} decoder"
                )

    def facts(self) -> dict[str, Any]:
        """What a finished part of a run depends on; more seeds and precisions only add parts."""
        whole = asdict(self)
        whole.pop("seeds")
        whole["attacked"].pop("precisions")
        return whole


def attacked_of(scale: str, precisions: tuple[Precision, ...] = (Precision(),)) -> Attacked:
    """What the attacker sees at a scale.

    Args:
        scale: `debug`, to see that it runs, or `small`.
        precisions: Of the attacked model, the full one first.

    Raises:
        VesicleError: The scale is unknown, or the first precision is not the full one.
    """
    if scale == "debug":
        return Attacked(
            window=32,
            folds=2,
            bins=20,
            shortest=64,
            longest=512,
            lengths=(32,),
            precisions=precisions,
        )
    if scale == "small":
        return Attacked(precisions=precisions)
    raise VesicleError(f"scale is {scale!r}; allowed: debug, small")


def settings_of(
    scale: str,
    *,
    seeds: int = 3,
    precisions: tuple[Precision, ...] = (Precision(),),
    documents: int | None = None,
    epochs: int | None = None,
) -> ExperimentSettings:
    """The settings of an experiment at a scale.

    Args:
        scale: As for `attacked_of`.
        seeds: Runs.
        precisions: Likewise.
        documents: In place of the scale's.
        epochs: Likewise.

    Raises:
        VesicleError: The scale is unknown, or a number is not allowed.
    """
    attacked = attacked_of(scale, precisions)
    small = scale == "small"
    sizes = (
        {"narrow": _size(2048, 128, 4, 4, 2, 352, 256), "wide": _size(2048, 192, 6, 6, 2, 512, 256)}
        if small
        else {"narrow": _size(512, 32, 2, 2, 1, 96, 64), "wide": _size(512, 48, 2, 2, 1, 128, 64)}
    )
    return ExperimentSettings(
        documents=documents if documents is not None else 600 if small else 40,
        sizes=sizes,
        batch=8 if small else 4,
        epochs=epochs if epochs is not None else 4,
        seeds=seeds,
        attacked=attacked,
    )


def _size(
    vocabulary: int,
    width: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    ffn: int,
    context: int,
) -> DecoderSize:
    return DecoderSize(
        vocabulary=vocabulary,
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn=ffn,
        context=context,
    )
