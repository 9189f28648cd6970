"""Features of entries: a short-time Fourier transform, averaged as text goes on."""

import numpy as np
import pytest

from vesicle.namm.spectrogram import DECAY, N_FREQUENCIES, Averages, spectrogram


def paid(rng: np.random.Generator, w: int, n: int) -> np.ndarray:
    return rng.random((w, n)).astype(np.float32)


@pytest.mark.parametrize("w", [32, 48, 128])
def test_is_a_transform_of_windows(w: int):
    attention = paid(np.random.default_rng(0), w, 5)
    found = spectrogram(attention)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    assert found.shape == ((w - 32) // 16 + 1, 5, N_FREQUENCIES)
    for frame, magnitudes in enumerate(found):
        signal = attention[16 * frame : 16 * frame + 32] * window[:, None]
        np.testing.assert_allclose(magnitudes, np.abs(np.fft.rfft(signal, axis=0)).T, atol=1e-5)


@pytest.mark.parametrize("length", [64, 4096])
def test_an_entry_like_all_others_is_near_zero_whatever_the_length(length: int):
    even = np.full((64, length), 1 / length, np.float32)
    features = Averages().update(np.arange(length), even, length)
    assert abs(float(features[3, 0]) - np.log(1.01) / 2) < 1e-4
    assert (features[:, 3:] < -2).all()  # what does not change has no higher frequencies


def test_averages_fade_and_follow_what_is_held():
    rng = np.random.default_rng(1)
    averages, a = Averages(), paid(rng, 32, 6)
    averages.update(np.arange(6, dtype=np.int32), a, 64)
    held, b = np.array([0, 2, 5, 70, 71], np.int32), paid(rng, 48, 5)
    found = averages.update(held, b, 128)
    frames, before = spectrogram(b), spectrogram(a)
    for i, position in enumerate(held.tolist()):
        parts = [frames[1, i], DECAY * frames[0, i]]
        weights = [1, DECAY]
        if position < 64:
            parts.append(DECAY**2 * before[0, position])
            weights.append(DECAY**2)
        mean = np.sum(parts, axis=0) / np.sum(weights)
        np.testing.assert_allclose(
            found[i], np.log(mean * 128 / 16 + 0.01) / 2, rtol=1e-4, atol=1e-5
        )


def test_the_same_length_again_changes_nothing():
    rng = np.random.default_rng(2)
    positions = np.arange(40, dtype=np.int32)
    averages = Averages()
    once = averages.update(positions, paid(rng, 32, 40), 64)
    again = averages.update(positions, paid(rng, 32, 40), 64)
    assert (once == again).all()


def test_a_fork_goes_on_alone():
    rng = np.random.default_rng(3)
    positions = np.arange(20, dtype=np.int32)
    averages, x = Averages(), paid(rng, 32, 20)
    averages.update(positions, paid(rng, 32, 20), 64)
    fork = averages.fork()
    averages.update(positions, paid(rng, 32, 20), 128)
    alone = averages.fork()
    assert (fork.update(positions, x, 128) != alone.update(positions, x, 192)).any()
