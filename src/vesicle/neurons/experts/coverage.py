"""Coverage and reconstruction: do single features know the properties of a board, or of a text?

After "Measuring Progress in Dictionary Learning for Language Model Interpretability with Board Game
Models" (Karvonen et al. 2024). A feature f and a threshold t make a classifier, active where
f > t max f, t in 0, 0.1, ..., 0.9. With properties g (such as "a white knight stands on f3"),

    coverage       = mean over g of the best F1 that any single classifier has for g
    reconstruction = F1 of the properties predicted for a token, where g is predicted if any
                     classifier that has a precision of 0.95 for g is active; mean over tokens

Done here otherwise: a classifier is chosen on half of the items (games, texts), and what is
reported is its F1 on the other half, because the best of thousands is lucky; coverage on the same
half, as published, stands beside it. The threshold of the reconstruction is chosen likewise; the
paper takes one threshold for all classifiers, and so does this. A property counts if it holds for
at least `LEAST` tokens of each half, and for at most `MOST` of all, because what nearly always
holds is easily told. `always_counts` is the control: a classifier that is always active has F1
2 p / (1 + p) for a property of frequency p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesicle.errors import DataError

THRESHOLDS = tuple(n / 10 for n in range(10))
PRECISE, LEAST, MOST = 0.95, 20, 0.5
_TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What holds where.

    Attributes:
        names: (P,).
        values: (N, P) booleans, of N tokens.
        items: (N,) to which item (game, text) each token belongs; the first half of the items
            chooses classifiers, the other half judges them.
        n_items: Of both halves.
    """

    names: tuple[str, ...]
    values: Tensor
    items: Tensor
    n_items: int

    def __post_init__(self) -> None:
        """Check that shapes agree.

        Raises:
            DataError: They do not, or there are fewer than two items.
        """
        n, p = self.values.shape
        if p != len(self.names) or len(self.items) != n or self.n_items < 2:
            raise DataError(
                f"properties of {n} tokens have {p} values, {len(self.names)} names, "
                f"{len(self.items)} items of {self.n_items}; allowed: as many, and two items"
            )

    @property
    def n_choosing(self) -> int:
        """Items that choose."""
        return self.n_items // 2

    @property
    def choosing(self) -> Tensor:
        """(N,) which tokens choose."""
        return self.items < self.n_choosing

    def only(self, names: Sequence[str]) -> Properties:
        """Some of them, in another order."""
        places = {name: place for place, name in enumerate(self.names)}
        return Properties(
            names=tuple(names),
            values=self.values[:, [places[name] for name in names]],
            items=self.items,
            n_items=self.n_items,
        )

    def frequent(self, least: int = LEAST, most: float = MOST) -> Properties:
        """Those that hold often enough in both halves, and not nearly everywhere.

        Raises:
            DataError: There is none.
        """
        first = self.values[self.choosing].sum(0)
        other = self.values[~self.choosing].sum(0)
        share = (first + other) / len(self.values)
        kept = (first >= least) & (other >= least) & (share <= most)
        if not bool(kept.any()):
            raise DataError(
                f"no property holds for {least} tokens of each half of {self.n_items} items: give "
                "more"
            )
        return self.only([n for n, k in zip(self.names, kept.tolist(), strict=True) if k])


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the features of one reader know.

    Attributes:
        feature: (P,) of the best classifier of each property.
        threshold: (P,) its share of the feature's maximum.
        published: (P,) its F1 on the tokens that chose it.
        counts: (J, P, 3) true positives, false positives and false negatives on each of the J items
            that judge.
        reconstruction: (J,) of those items.
    """

    feature: Tensor
    threshold: Tensor
    published: Tensor
    counts: Tensor
    reconstruction: Tensor

    @property
    def coverage(self) -> float:
        """On the items that judge."""
        return float(f1_of(self.counts.sum(0)).mean())


def find(features: Tensor, properties: Properties) -> Found:
    """Choose classifiers and judge them.

    Args:
        features: (N, F) of the same tokens.
        properties: What holds there.

    Raises:
        DataError: There are features of another number of tokens.
    """
    if len(features) != len(properties.values):
        raise DataError(
            f"features are of {len(features)} tokens; allowed: {len(properties.values)}, as "
            "properties are"
        )
    first = properties.choosing
    x, g = features[first].float(), properties.values[first].float()
    y, h = features[~first].float(), properties.values[~first].float()
    items = properties.items[~first] - properties.n_choosing
    peak = x.amax(0)
    n_properties = g.shape[1]
    best, where = torch.full((n_properties,), -1.0), torch.zeros(n_properties)
    who = torch.zeros(n_properties, dtype=torch.long)
    rebuilt = -1.0, torch.zeros(0)
    positives = g.sum(0)
    for share in THRESHOLDS:
        active = (x > share * peak).float()
        hits, fires = active.T @ g, active.sum(0)[:, None]  # (F, P), (F, 1)
        score = 2 * hits / (fires + positives).clamp_min(1)
        top = score.max(0)
        better = top.values > best
        best[better], who[better], where[better] = top.values[better], top.indices[better], share
        precise = ((hits >= PRECISE * fires) & (fires >= LEAST / 2)).float()
        predicted = (active @ precise) > 0
        mean = float(_per_token(predicted, g.bool()).mean())
        if mean > rebuilt[0]:
            others = ((y > share * peak).float() @ precise) > 0
            rebuilt = mean, _per_token(others, h.bool())
    active_there = y[:, who] > where * peak[who]  # (N', P)
    n_judging = properties.n_items - properties.n_choosing
    return Found(
        feature=who,
        threshold=where,
        published=best,
        counts=count(active_there, h.bool(), items, n_judging),
        reconstruction=_mean_by(rebuilt[1], items, n_judging),
    )


def always_counts(properties: Properties) -> Tensor:
    """(J, P, 3) counts of classifiers that are always active, on the items that judge."""
    judging = ~properties.choosing
    held = properties.values[judging]
    items = properties.items[judging] - properties.n_choosing
    n_judging = properties.n_items - properties.n_choosing
    return count(torch.ones_like(held), held, items, n_judging)


def count(predicted: Tensor, true: Tensor, items: Tensor, n_items: int) -> Tensor:
    """(J, P, 3) true positives, false positives and false negatives of each item.

    Args:
        predicted: (N, P) booleans.
        true: (N, P) booleans.
        items: (N,) of each token, from 0.
        n_items: J.
    """
    kinds = torch.stack([predicted & true, predicted & ~true, ~predicted & true], -1)
    found = torch.zeros(n_items, *kinds.shape[1:], dtype=torch.int32)
    return found.index_add_(0, items, kinds.int())


def f1_of(counts: Tensor) -> Tensor:
    """(...) F1 of counts (..., 3); 0 where nothing is predicted or true."""
    hits, wrong, missed = counts.double().unbind(-1)
    return 2 * hits / (2 * hits + wrong + missed).clamp_min(_TINY)


def joined(parts: Sequence[Tensor], items: Sequence[int]) -> Tensor:
    """(N,) items of tokens: the n-th number, as often as the n-th part has rows."""
    repeats = torch.tensor([len(part) for part in parts])
    return torch.tensor(list(items)).repeat_interleave(repeats)


def _per_token(predicted: Tensor, true: Tensor) -> Tensor:
    """(N,) F1 of the properties of each token."""
    hits = (predicted & true).sum(1)
    return 2 * hits / (predicted.sum(1) + true.sum(1)).clamp_min(1)


def _mean_by(values: Tensor, items: Tensor, n_items: int) -> Tensor:
    sums = torch.zeros(n_items).index_add_(0, items, values.float())
    return sums / items.bincount(minlength=n_items).clamp_min(1)
