"""What a NAMM knows of an entry: the spectrogram of the attention that it has received.

The attention that queries pay to an entry, in the order of the queries, is a signal. Its short-time
Fourier transform (windows of 32 queries, 16 apart, Hann) is averaged over time with exponentially
fading weights (Cetin et al. 2024, section 3.1). Two things are ours:

- The average is divided by the sum of its weights, so that entries of any age have one scale.
- Magnitudes are told relative to an entry that receives the same as all others, in logarithms:
  `log(magnitude length / 16 + 0.01) / 2`, about 0 for the mean of such an entry. So a text's length
  does not change them, nor does a model that spreads its attention otherwise need another scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesicle.plan import IntArray

N_FFT, HOP, DECAY = 32, 16, 0.99
N_FREQUENCIES = N_FFT // 2 + 1
Array = NDArray[np.float32]

_HANN = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
_ANGLES = 2 * np.pi * np.outer(np.arange(N_FFT), np.arange(N_FREQUENCIES)) / N_FFT
_BASIS = np.concatenate(
    [_HANN[:, None] * np.cos(_ANGLES), _HANN[:, None] * np.sin(_ANGLES)], axis=1
).astype(np.float32)
"""(32, 34) by which a window's real and imaginary parts are sums."""


def spectrogram(attention: Array) -> Array:
    """(F, n, 17) magnitudes of each window of 32 queries.

    Args:
        attention: (w, n) paid by w queries to n entries, w a multiple of 16 from 32 on.
    """
    w, n = attention.shape
    frames = (w - N_FFT) // HOP + 1
    found = np.empty((frames, n, N_FREQUENCIES), np.float32)
    for frame in range(frames):
        window = attention[frame * HOP : frame * HOP + N_FFT]
        parts = window.T @ _BASIS  # (n, 34)
        real, imaginary = parts[:, :N_FREQUENCIES], parts[:, N_FREQUENCIES:]
        np.sqrt(real * real + imaginary * imaginary, out=found[frame])
    return found


class Averages:
    """Fading averages of the magnitudes of entries that a KV head holds."""

    def __init__(self) -> None:
        """Of no entries yet."""
        self._positions: IntArray = np.zeros(0, np.int32)
        self._sums: Array = np.zeros((0, N_FREQUENCIES), np.float32)
        self._weights: Array = np.zeros(0, np.float32)
        self._length = 0

    def update(self, positions: IntArray, attention: Array, length: int) -> Array:
        """Take what entries received and give their features (n, 17).

        Entries that are no longer there are dropped. The same length again changes nothing.

        Args:
            positions: (n,) of the entries held, rising.
            attention: (w, n) paid to them by the newest queries.
            length: Tokens read.
        """
        if length != self._length:
            sums = np.zeros((*positions.shape, N_FREQUENCIES), np.float32)
            weights = np.zeros(positions.shape, np.float32)
            # What is held was held before, or is new.
            at = np.searchsorted(positions, self._positions)
            there = at < len(positions)
            there[there] = positions[at[there]] == self._positions[there]
            sums[at[there]], weights[at[there]] = self._sums[there], self._weights[there]
            for frame in spectrogram(attention):
                sums = np.float32(DECAY) * sums + frame
                weights = np.float32(DECAY) * weights + np.float32(1)
            self._positions, self._sums, self._weights = positions.copy(), sums, weights
            self._length = length
        share = self._sums * (length / HOP) / np.maximum(self._weights, 1)[..., None]
        return (np.log(share + 0.01) / 2).astype(np.float32)

    def fork(self) -> Averages:
        """The same averages, to go on by themselves: arrays are replaced, never written."""
        fork = Averages()
        fork._positions, fork._sums = self._positions, self._sums
        fork._weights, fork._length = self._weights, self._length
        return fork
