"""What a language model says of every token of a document: the queries of membership inference.

A document t_1 ... t_T is read in windows of C tokens with stride C - 1, so that every token but the
first is predicted exactly once, with 1 to C - 1 tokens before it (Meeus et al. 2024, "Did the
Neurons Read your Book?", section 4.1). Of each prediction are kept

    log p      of the token that stands there,
    log p_max  of the likeliest token there,

and, summed over the predictions of a group of documents, the probability of every token of the
vocabulary: the paper's general probability is a mean of these. Groups are folds, so that the mean
over the documents that a classifier is trained on can be had without asking the model again.

Windows of any lengths share a pass; what fills the shorter ones up stands behind their tokens,
which a causal model does not let them see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.errors import DataError, ModelError
from vesicle.files import atomic_path
from vesicle.neurons.membership.readers import Read
from vesicle.plan import FloatArray

CHUNK = 16
"""Documents that are kept together."""
_MOST_LOGITS = 2**25
_MOST_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class TokenProbabilities:
    """Predictions of all tokens of N documents, one document behind the other, M in all.

    Attributes:
        tokens: (M,) ids of the tokens that were predicted.
        log_p: (M,) log-probability of each, in nats.
        log_top: (M,) log-probability of the likeliest token at its place.
        lengths: (N,) predictions of each document, which is one less than its tokens.
        groups: (N,) group of each document, from 0 to G - 1.
        general: (G, V) probability of each token of the vocabulary, summed over the predictions of
            a group.
    """

    tokens: NDArray[np.int64]
    log_p: FloatArray
    log_top: FloatArray
    lengths: NDArray[np.int64]
    groups: NDArray[np.int64]
    general: FloatArray

    @property
    def owners(self) -> NDArray[np.int64]:
        """(M,) document of each prediction."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def losses(self) -> FloatArray:
        """(N,) mean loss of each document's predicted tokens, in nats."""
        return -self.means(self.log_p)

    def means(self, values: FloatArray) -> FloatArray:
        """(N,) means by document of (M,) values."""
        sums = np.bincount(self.owners, values, minlength=len(self.lengths))
        return np.asarray(sums / self.lengths)

    def first(self, n_tokens: int) -> TokenProbabilities:
        """What is known to who sees the first `n_tokens` tokens of each document alone.

        `general` stays: it stands for what is known of tokens in general.

        Raises:
            ValueError: If that is below 2, so that nothing is predicted.
        """
        if n_tokens < 2:
            raise ValueError(f"n_tokens is {n_tokens}; allowed: 2 and above")
        begins = np.cumsum(self.lengths) - self.lengths
        place = np.arange(len(self.tokens)) - np.repeat(begins, self.lengths)
        seen = place < n_tokens - 1
        return TokenProbabilities(
            tokens=self.tokens[seen],
            log_p=self.log_p[seen],
            log_top=self.log_top[seen],
            lengths=np.minimum(self.lengths, n_tokens - 1),
            groups=self.groups,
            general=self.general,
        )


def together(left: TokenProbabilities, right: TokenProbabilities) -> TokenProbabilities:
    """Documents of two, those of the left first; the right one's groups follow the left one's."""
    return TokenProbabilities(
        tokens=np.concatenate([left.tokens, right.tokens]),
        log_p=np.concatenate([left.log_p, right.log_p]),
        log_top=np.concatenate([left.log_top, right.log_top]),
        lengths=np.concatenate([left.lengths, right.lengths]),
        groups=np.concatenate([left.groups, right.groups + len(left.general)]),
        general=np.concatenate([left.general, right.general]),
    )


def windows_of(n_tokens: int, window: int) -> list[tuple[int, int]]:
    """First token and one past the last of each window of a document of `n_tokens` tokens."""
    return [(start, min(start + window, n_tokens)) for start in range(0, n_tokens - 1, window - 1)]


def token_probabilities(
    read: Read,
    documents: Sequence[Sequence[int]],
    groups: Sequence[int],
    *,
    window: int,
    lead: Sequence[int] = (),
    keep: Path | None = None,
    show: Callable[[int], None] | None = None,
) -> TokenProbabilities:
    """Ask a model for every token of documents.

    Args:
        read: Who is asked, as `reading` gives it.
        documents: Token ids of each, two and more.
        groups: Group of each document, from 0 on.
        window: C, tokens of a window, 2 and more.
        lead: Ids of the tokens that the model wants before any text; put before every window.
        keep: A folder, of these documents and this model alone, where what was asked is kept.
        show: Told how many documents are done.

    Raises:
        DataError: There are no documents, or one has fewer than 2 tokens.
        ModelError: A logit is not finite.
        ValueError: If the window is too small.
    """
    if window < 2:
        raise ValueError(f"window is {window}; allowed: 2 and above")
    if not documents:
        raise DataError("there are no documents to ask a model about; allowed: 1 and more")
    for i, ids in enumerate(documents):
        if len(ids) < 2:
            raise DataError(f"document {i + 1} has {len(ids)} tokens; allowed: 2 and more")
    parts = []
    for start in range(0, len(documents), CHUNK):
        chosen = slice(start, start + CHUNK)
        path = None if keep is None else keep / f"{start:06d}.safetensors"
        asked = (read, documents[chosen], groups[chosen], max(groups) + 1, window, lead)
        parts.append(_kept(path, *asked))
        if show is not None:
            show(min(start + CHUNK, len(documents)))
    return TokenProbabilities(
        tokens=np.concatenate([np.asarray(ids[1:], np.int64) for ids in documents]),
        log_p=np.concatenate([part["log_p"] for part in parts]).astype(np.float64),
        log_top=np.concatenate([part["log_top"] for part in parts]).astype(np.float64),
        lengths=np.array([len(ids) - 1 for ids in documents]),
        groups=np.asarray(groups, np.int64),
        general=np.sum([part["general"] for part in parts], axis=0),
    )


def _kept(
    path: Path | None,
    read: Read,
    documents: Sequence[Sequence[int]],
    groups: Sequence[int],
    n_groups: int,
    window: int,
    lead: Sequence[int],
) -> dict[str, NDArray[np.floating]]:
    """What a chunk of documents gave, from its file if it has one."""
    from safetensors.numpy import load_file, save_file

    if path is not None and path.exists():
        return load_file(path)
    found = _ask(read, documents, groups, n_groups, window, lead)
    if path is not None:
        with atomic_path(path) as part:
            save_file(found, part)
    return found


def _ask(
    read: Read,
    documents: Sequence[Sequence[int]],
    groups: Sequence[int],
    n_groups: int,
    window: int,
    lead: Sequence[int],
) -> dict[str, NDArray[np.floating]]:
    begins = np.cumsum([0] + [len(ids) - 1 for ids in documents])
    log_p = np.zeros(begins[-1], np.float32)
    log_top = np.zeros(begins[-1], np.float32)
    general: Tensor | None = None
    parts = [
        (i, start, stop)
        for i, ids in enumerate(documents)
        for start, stop in windows_of(len(ids), window)
    ]
    parts.sort(key=lambda part: part[1] - part[2])  # the longest first: little is filled up
    rows = 1  # until it is known how large the vocabulary is
    while parts:
        batch, parts = parts[:rows], parts[rows:]
        table = torch.zeros(len(batch), batch[0][2] - batch[0][1], dtype=torch.long)
        for row, (i, start, stop) in enumerate(batch):
            table[row, : stop - start] = torch.tensor(documents[i][start:stop])
        before = torch.tensor(lead, dtype=torch.long).expand(len(batch), -1)
        logits = read(torch.cat([before, table], 1))[:, len(lead) : -1]
        shares = logits.float().log_softmax(-1)
        there = shares.gather(-1, table[:, 1:, None])[..., 0].numpy()
        top = shares.max(-1).values.numpy()
        vocabulary = shares.shape[-1]
        if general is None:
            general = torch.zeros(n_groups, vocabulary, dtype=torch.float64)
            rows = min(_MOST_ROWS, max(1, _MOST_LOGITS // (window * vocabulary)))
        for row, (i, start, stop) in enumerate(batch):
            n = stop - start - 1
            place = slice(begins[i] + start, begins[i] + start + n)
            log_p[place], log_top[place] = there[row, :n], top[row, :n]
            general[groups[i]] += shares[row, :n].exp().sum(0)
    if not (np.isfinite(log_p).all() and np.isfinite(log_top).all()):
        raise ModelError("the model's log-probabilities are not finite; nothing can be inferred")
    assert general is not None
    return {"log_p": log_p, "log_top": log_top, "general": general.numpy()}
