"""Membership inference for a model of the user's own, by documents that are known to be members.

The same attacks as in the experiment, on any causal LM: documents that it was trained on, others of
the same kind that it was not, and, if wanted, documents of unknown membership, each of which gets a
chance. What is found is worth no more than the two known sets: where bag of words tells them apart,
so may every attack, and nothing is known of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vesicle.calibration.cache import sample_key
from vesicle.errors import DataError, ModelError
from vesicle.files import write_json
from vesicle.folders import locked
from vesicle.models import Text
from vesicle.neurons.membership.attack import (
    PUBLISHED,
    attack_scores,
    infer_unknown,
    learnt_scores,
)
from vesicle.neurons.membership.bag_of_words import BAG_OF_WORDS, bag_of_words_scores
from vesicle.neurons.membership.chance import chance, fold_aucs, other_splits
from vesicle.neurons.membership.classifier import new_folds
from vesicle.neurons.membership.documents import fingerprint
from vesicle.neurons.membership.experiment import Show, claim_folder, loss_row
from vesicle.neurons.membership.precision import SHARES, lowered
from vesicle.neurons.membership.probabilities import TokenProbabilities, token_probabilities
from vesicle.neurons.membership.readers import reading
from vesicle.neurons.membership.report import SCHEMA, area_rows, length_row, precision_row
from vesicle.neurons.membership.settings import Attacked
from vesicle.plan import FloatArray, Method

_SEED = 0
"""Of folds."""


@dataclass(frozen=True, kw_only=True)
class KnownDocuments:
    """Documents of a user, as texts.

    Attributes:
        members: The model was trained on these.
        others: It was not on these.
        unknown: Whose membership is asked.
    """

    members: Sequence[str]
    others: Sequence[str]
    unknown: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: A document is both a member and none.
        """
        both = set(self.members) & set(self.others)
        if both:
            raise DataError(
                f"{len(both)} documents are members and others at once, such as "
                f"{min(both)[:40]!r}; allowed: none"
            )


def infer_membership(
    model: nn.Module,
    text: Text,
    documents: KnownDocuments,
    out: Path,
    attacked: Attacked,
    show: Show | None = None,
) -> dict[str, Any]:
    """Attack a model by documents of known membership, and tell of the unknown.

    Args:
        model: A causal LM of transformers.
        text: Its tokenizer.
        documents: What is known, and what is asked.
        out: Folder to write to: `report.json`, and what the model was asked.
        attacked: What the attacker sees.
        show: Told what goes on.

    Returns:
        The report, as JSON has it.

    Raises:
        DataError: Too few documents are long enough.
        ModelError: A window is longer than the model's context.
        VesicleError: The folder holds another run, or a precision cannot be reached.
    """
    lead = lead_of(text)
    if attacked.window + len(lead) > text.context_window:
        raise ModelError(
            f"window is {attacked.window}; allowed: up to {text.context_window - len(lead)}, "
            "the model's context"
        )
    ids, texts, labels = _encoded(text, documents, attacked)
    n_known = len(labels)
    folds = new_folds(labels, attacked.folds, _SEED)
    facts = {
        **{name: getattr(attacked, name) for name in ("window", "folds", "shortest", "longest")},
        "model": sample_key(model),
        "documents": [fingerprint(texts[:n_known]), int(labels.sum())],
    }
    with locked(out):
        claim_folder(out, facts)
        known: dict[str, TokenProbabilities] = {}
        shares = []
        for place, precision in enumerate(attacked.precisions):
            low = lowered(precision, model, attacked.window)
            known[precision.name] = _asked(
                model,
                low.method,
                ids[:n_known],
                folds.tolist(),
                attacked.window,
                lead,
                out / "asked" / precision.name,
                partial(_told, show, place, len(attacked.precisions), precision.name),
            )
            shares.append({name: getattr(low, name) for name in SHARES})
        report = _report(text, ids[:n_known], texts[:n_known], labels, known, shares, attacked)
        if len(ids) > n_known:
            unknown = _asked(
                model,
                None,
                ids[n_known:],
                [0] * (len(ids) - n_known),
                attacked.window,
                lead,
                out / "asked" / f"unknown-{fingerprint(texts[n_known:])}",
                partial(_told, show, len(shares), len(shares), "unknown"),
            )
            found = infer_unknown(known["full"], labels, unknown, attacked.bins)
            report["unknown"] = [
                {"begins": own[:60], "chance": round(float(p), 4)}
                for own, p in zip(texts[n_known:], found, strict=True)
            ]
        write_json(out / "report.json", report)
        return report


def _asked(
    model: nn.Module,
    method: Method | None,
    ids: list[list[int]],
    groups: list[int],
    window: int,
    lead: list[int],
    keep: Path,
    tell: Callable[[int], None],
) -> TokenProbabilities:
    """What a model says of documents under a method; what it was asked already is kept."""
    with reading(model, method) as read:
        return token_probabilities(
            read, ids, groups, window=window, lead=lead, keep=keep, show=tell
        )


def _told(show: Show | None, place: int, total: int, name: str, done: int) -> None:
    if show is not None:
        show(place, total, f"{name}: {done} documents asked")


def lead_of(text: Text) -> list[int]:
    """Ids of the tokens that a tokenizer puts before any text; most put none."""
    whole, plain = text.encode("a"), text.encode("a", continues=True)
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def _encoded(
    text: Text, documents: KnownDocuments, attacked: Attacked
) -> tuple[list[list[int]], list[str], NDArray[np.bool_]]:
    """Ids and texts of members, others and unknown documents, and labels of the first two."""
    ids: list[list[int]] = []
    counts = []
    for name in ("members", "others", "unknown"):
        given: Sequence[str] = getattr(documents, name)
        encoded = [text.encode(one, control_tokens=False, continues=True) for one in given]
        enough = [own[: attacked.longest] for own in encoded if len(own) >= attacked.shortest]
        if name == "unknown" and len(enough) < len(given):
            raise DataError(
                f"an unknown document has {min(map(len, encoded))} tokens; "
                f"allowed: {attacked.shortest} and more"
            )
        if name != "unknown" and len(enough) < 2 * attacked.folds:
            raise DataError(
                f"{len(enough)} of {len(given)} {name} have {attacked.shortest} tokens and more; "
                f"{2 * attacked.folds} are needed"
            )
        ids += enough
        counts.append(len(enough))
    labels = np.arange(counts[0] + counts[1]) < counts[0]
    return ids, [text.decode(own) for own in ids], labels


def _report(
    text: Text,
    ids: list[list[int]],
    texts: list[str],
    labels: NDArray[np.bool_],
    known: dict[str, TokenProbabilities],
    shares: list[dict[str, float]],
    attacked: Attacked,
) -> dict[str, Any]:
    found = known["full"]
    folds, truth = found.groups, labels[None]

    def scores(asked: TokenProbabilities, those: list[str]) -> dict[str, list[float]]:
        made = attack_scores(asked, those, labels, attacked.bins)
        return {name: own.tolist() for name, own in made.items()}

    full = scores(found, texts)
    whole: dict[str, FloatArray] = {name: np.array([own]) for name, own in full.items()}
    records = [
        {
            "scores": full if name == "full" else scores(asked, texts),
            "loss": loss_row(asked.losses(), labels),
            "top": float(np.exp(asked.log_top).mean()),
            **own,
        }
        for (name, asked), own in zip(known.items(), shares, strict=True)
    ]
    splits = other_splits(labels, folds)
    words = bag_of_words_scores(texts, np.vstack([labels, splits]), folds)
    other = learnt_scores(found, splits, PUBLISHED, attacked.bins)
    lengths = {
        n: scores(found.first(n), [text.decode(own[:n]) for own in ids]) for n in attacked.lengths
    }
    return {
        "schema": SCHEMA,
        "members": int(labels.sum()),
        "others": int((~labels).sum()),
        "tokens": sum(map(len, ids)),
        "bag_of_words": {
            **area_rows({BAG_OF_WORDS: words[:1]}, truth, folds)[0],
            "chance": chance(np.array([fold_aucs(words[1:], splits, folds)])),
        },
        "other_splits": chance(np.array([fold_aucs(other, splits, folds)])),
        "lengths": [length_row(n, [own], whole, truth, folds) for n, own in lengths.items()],
        "precisions": [
            precision_row(name, [record], whole, truth, folds)
            for name, record in zip(known, records, strict=True)
        ],
    }
