"""Documents of an experiment: tokens, folds, and which half a decoder is trained on.

The tokenizer is learnt from members and others alike, so that how a document is cut into tokens
tells nothing. Folds are drawn once; in each of them every seed draws half of the documents as its
members. So seeds differ in what they are trained on, and no label follows from a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from vesicle.errors import DataError
from vesicle.neurons.membership.documents import fingerprint
from vesicle.neurons.membership.settings import ExperimentSettings
from vesicle.scratch import learn_tokenizer

_FOLDS = 0
"""Seed of the folds, the same in every run."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """N documents.

    Attributes:
        ids: Token ids of each.
        texts: What these decode to.
        folds: (N,) fold of each.
        tokenizer: Learnt from all of them.
    """

    ids: list[list[int]]
    texts: list[str]
    folds: NDArray[np.int64]
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """A name for the documents in their order."""
        return fingerprint(self.texts)

    def texts_up_to(self, n_tokens: int) -> list[str]:
        """The texts of the first `n_tokens` tokens of each document."""
        return [self.tokenizer.decode(ids[:n_tokens]) for ids in self.ids]

    def members(self, seed: int) -> NDArray[np.bool_]:
        """(N,) which documents a seed's decoder is trained on: half of each fold."""
        generator = np.random.default_rng((1, seed))
        chosen = np.zeros(len(self.ids), bool)
        for fold in np.unique(self.folds):
            places = generator.permutation(np.flatnonzero(self.folds == fold))
            chosen[places[: len(places) // 2]] = True
        return chosen

    def training_windows(self, members: NDArray[np.bool_], length: int) -> Tensor:
        """(n, length) ids of the members, an end after each, cut to windows of equal length.

        Raises:
            DataError: They do not fill one.
        """
        whole = [i for ids, one in zip(self.ids, members, strict=True) if one for i in [*ids, 0]]
        n = len(whole) // length
        if n == 0:
            raise DataError(f"the members have {len(whole)} tokens; a window needs {length}")
        return torch.tensor(whole[: n * length], dtype=torch.long).view(n, length)


def prepare(texts: Sequence[str], settings: ExperimentSettings) -> Corpus:
    """Cut documents into tokens, and draw folds.

    Args:
        texts: No two of them equal.
        settings: How many are taken, and how long they are.

    Raises:
        DataError: Fewer than four a fold are long enough.
    """
    attacked = settings.attacked
    vocabulary = min(size.vocabulary for size in settings.sizes.values())
    tokenizer = learn_tokenizer(texts, vocabulary)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    enough = [ids[: attacked.longest] for ids in encoded if len(ids) >= attacked.shortest]
    least = 4 * attacked.folds
    if len(enough) < least:
        raise DataError(
            f"{len(enough)} of {len(texts)} documents have {attacked.shortest} tokens and more; "
            f"{least} are needed"
        )
    n = min(settings.documents, len(enough))
    ids = [enough[i * len(enough) // n] for i in range(n)]
    folds = np.random.default_rng(_FOLDS).permutation(n) % attacked.folds
    return Corpus(
        ids=ids,
        texts=[tokenizer.decode(own) for own in ids],
        folds=folds.astype(np.int64),
        tokenizer=tokenizer,
    )
