"""Older attacks, which need no training: one number a document, and the higher it is the likelier.

    loss   mean log p of its tokens: minus the loss (Yeom et al. 2018)
    min-k  mean log p of the 20 % of its tokens that were least expected (Shi et al. 2024)
    zlib   minus its summed loss over the bytes that zlib packs it into (Carlini et al. 2021)

All three were made for passages; here they see a document whole. Attacks that compare with a second
model, or with changed copies of the text, are not reproduced.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from vesicle.neurons.membership.probabilities import TokenProbabilities
from vesicle.plan import FloatArray

LEAST_SHARE = 0.2
THRESHOLDS = ("loss", "min-k", "zlib")


def threshold_scores(found: TokenProbabilities, texts: Sequence[str]) -> dict[str, FloatArray]:
    """Scores (N,) of each of `THRESHOLDS`.

    Args:
        found: Predictions of N documents.
        texts: The same documents, as far as they were asked about.
    """
    losses = found.losses()
    packed = np.array([len(zlib.compress(text.encode())) for text in texts])
    least = []
    for own in np.split(found.log_p, np.cumsum(found.lengths)[:-1]):
        n = max(1, int(LEAST_SHARE * len(own)))
        least.append(np.partition(own, n - 1)[:n].mean())
    return {
        "loss": -losses,
        "min-k": np.array(least),
        "zlib": -losses * found.lengths / packed,
    }
