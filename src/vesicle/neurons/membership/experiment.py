"""Membership inference on decoders whose training set is known, because they are trained here.

For every seed: half of the documents, drawn at random, are members; decoders of two sizes are
trained on them; every token of every document is asked for; and all attacks try to tell members
from others, each document judged by classifiers of other folds. Then the same with less of each
document, and with less precision of the decoder. Members and others are of one collection and one
time, so that nothing but training can tell them apart, and two controls say whether that is so:

    bag of words     the words of a document, without a model
    other splits     the published attack, trained and judged on other random halves, which the
                     decoder was not trained on

Both must stay at 0.5, as far as chance lets them: `chance` tells how far that is. Parts that are
finished are kept, and never done again.

Meeus et al. 2024 attack OpenLLaMA, of 3 to 13 billion parameters, by books and papers of which a
model's cut-off date tells what it has read; of that nothing is reproduced here but the procedure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.files import read_json, write_json
from vesicle.folders import locked
from vesicle.neurons.membership.attack import PUBLISHED, attack_scores, learnt_scores
from vesicle.neurons.membership.bag_of_words import BAG_OF_WORDS, bag_of_words_scores
from vesicle.neurons.membership.chance import fold_aucs, other_splits
from vesicle.neurons.membership.corpus import Corpus, prepare
from vesicle.neurons.membership.precision import SHARES, Precision, lowered
from vesicle.neurons.membership.probabilities import token_probabilities
from vesicle.neurons.membership.readers import reading
from vesicle.neurons.membership.report import experiment_report
from vesicle.neurons.membership.settings import ExperimentSettings
from vesicle.plan import FloatArray
from vesicle.scratch import DecoderSize, Recipe, draw, fit, new_decoder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Show = Callable[[int, int, str], None]
"""Told how many parts are done, of how many, and what goes on."""


def run_experiment(
    texts: Sequence[str], out: Path, settings: ExperimentSettings, show: Show | None = None
) -> dict[str, Any]:
    """Train, ask and attack whatever is not done yet, and report.

    Args:
        texts: Documents, as `read_documents` gives them.
        out: Folder to write to: `report.json`, decoders and scores.
        settings: How.
        show: Told what goes on.

    Returns:
        The report, as JSON has it.

    Raises:
        VesicleError: The folder holds another run or cannot be written, a budget cannot be reached,
            or there are too few documents.
    """
    corpus = prepare(texts, settings)
    with locked(out):
        claim_folder(out, {**settings.facts(), "documents": corpus.fingerprint})
        parts = _parts(settings)
        records = {}
        for done, (seed, size, precision) in enumerate(parts):

            def tell(what: str, done: int = done, name: str = _name(*parts[done])) -> None:
                if show is not None:
                    show(done, len(parts), f"{name}: {what}")

            path = out / "records" / f"{_name(seed, size, precision)}.json"
            if not path.exists():
                tell("begins")
                record = _do(corpus, out, settings, seed, size, precision, tell)
                write_json(path, record, indent=None)
            records[seed, size, precision] = read_json(path)
        if show is not None:
            show(len(parts), len(parts), "report")
        labels = np.array([corpus.members(seed) for seed in range(settings.seeds)])
        report = experiment_report(corpus, labels, settings, records)
        write_json(out / "report.json", report)
        return report


def train_decoder(
    corpus: Corpus,
    seed: int,
    size: DecoderSize,
    settings: ExperimentSettings,
    folder: Path,
    tell: Callable[[str], None] | None = None,
) -> LlamaForCausalLM:
    """A decoder trained on a seed's members, or the one that `folder` holds.

    Args:
        corpus: The documents.
        seed: Of members, weights and batches.
        size: Of the decoder.
        settings: How it is trained.
        folder: Of this decoder alone.
        tell: Told how far it is.

    Raises:
        VesicleError: The folder holds another decoder, or the loss is not finite.
    """
    windows = corpus.training_windows(corpus.members(seed), size.context)
    batch = min(settings.batch, len(windows))
    model = new_decoder(size, seed)

    def loss_at(step: int) -> torch.Tensor:
        ids = windows[draw(len(windows), batch, step, seed)]
        return model(ids, labels=ids).loss

    steps = max(1, settings.epochs * len(windows) // batch)

    def show(step: int, loss: float) -> None:
        if tell is not None:
            tell(f"step {step} of {steps}, loss {loss:.3f}")

    facts = {
        "documents": corpus.fingerprint,
        "size": asdict(size),
        "seed": seed,
        "batch": batch,
        "epochs": settings.epochs,
    }
    recipe = Recipe(steps=steps, learning_rate=settings.learning_rate)
    fit(model, loss_at, recipe, folder, facts=facts, show=show)
    return model.eval()


def claim_folder(out: Path, facts: dict[str, Any]) -> None:
    """Note what a folder's parts depend on, or refuse one of another run.

    Raises:
        VesicleError: Naming the first setting that differs.
    """
    path = out / "settings.json"
    if not path.exists():
        write_json(path, facts)
        return
    theirs = read_json(path)
    for name in sorted(theirs.keys() | facts.keys()):
        if theirs.get(name) != _as_json(facts.get(name)):
            raise VesicleError(
                f"{out} holds a run with other {name}: use another folder, or remove it"
            )


def loss_row(losses: FloatArray, labels: NDArray[np.bool_]) -> dict[str, float]:
    """Mean loss of members and of others, in nats a token, each document counting as one."""
    return {
        "members": round(float(losses[labels].mean()), 4),
        "others": round(float(losses[~labels].mean()), 4),
    }


def rounded(scores: dict[str, FloatArray]) -> dict[str, list[float]]:
    """Scores as JSON keeps them."""
    return {name: [float(f"{x:.6g}") for x in own] for name, own in scores.items()}


def _parts(settings: ExperimentSettings) -> list[tuple[int, str, str]]:
    """Seed, decoder and precision of every part; a seed's control comes first."""
    found = []
    for seed in range(settings.seeds):
        found.append((seed, BAG_OF_WORDS, ""))
        for place, size in enumerate(settings.sizes):
            precisions = settings.attacked.precisions[: None if place == 0 else 1]
            found += [(seed, size, precision.name) for precision in precisions]
    return found


def _name(seed: int, size: str, precision: str) -> str:
    return f"seed-{seed}/{size}/{precision}" if precision else f"seed-{seed}/{size}"


def _do(
    corpus: Corpus,
    out: Path,
    settings: ExperimentSettings,
    seed: int,
    name: str,
    precision_name: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The record of one part."""
    labels = corpus.members(seed)
    splits = other_splits(labels, corpus.folds, seed=seed)
    if name == BAG_OF_WORDS:
        scores = bag_of_words_scores(corpus.texts, np.vstack([labels, splits]), corpus.folds)
        return {
            "scores": rounded({name: scores[0]}),
            "other_splits": fold_aucs(scores[1:], splits, corpus.folds),
        }
    attacked, size = settings.attacked, settings.sizes[name]
    model = train_decoder(corpus, seed, size, settings, out / "decoders" / f"{seed}-{name}", tell)
    precision = next(p for p in attacked.precisions if p.name == precision_name)
    low = lowered(precision, model, attacked.window)

    def show(done: int) -> None:
        tell(f"{done} of {len(corpus.ids)} documents asked")

    with reading(model, low.method) as read:
        found = token_probabilities(
            read, corpus.ids, corpus.folds.tolist(), window=attacked.window, show=show
        )
    tell("attacks")
    record: dict[str, Any] = {
        "scores": rounded(attack_scores(found, corpus.texts, labels, attacked.bins)),
        "loss": loss_row(found.losses(), labels),
        "top": float(np.exp(found.log_top).mean()),
        **{name: getattr(low, name) for name in SHARES},
    }
    if precision == Precision():
        other = learnt_scores(found, splits, PUBLISHED, attacked.bins)
        record["other_splits"] = fold_aucs(other, splits, corpus.folds)
        record["lengths"] = {
            str(n): rounded(
                attack_scores(found.first(n), corpus.texts_up_to(n), labels, attacked.bins)
            )
            for n in attacked.lengths
        }
    return record


def _as_json(value: Any) -> Any:
    """As a JSON file gives it back: tuples are lists there."""
    if isinstance(value, dict):
        return {name: _as_json(own) for name, own in value.items()}
    return [_as_json(own) for own in value] if isinstance(value, list | tuple) else value
