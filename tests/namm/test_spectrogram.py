"""Features of entries: a short-time Fourier transform, averaged as text goes on."""

import numpy as np
import pytest

from vesicle.namm.spectrogram import DECAY, N_FREQUENCIES, Averages, spectrogram


def paid(rng: np.random.Generator, g: int, w: int, n: int) -> np.ndarray:
    return rng.random((g, w, n)).astype(np.float32)


@pytest.mark.parametrize("w", [32, 48, 128])
def test_is_a_transform_of_windows(w: int):
    attention = paid(np.random.default_rng(0), 2, w, 5)
    found = spectrogram(attention)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    assert found.shape == (2, (w - 32) // 16 + 1, 5, N_FREQUENCIES)
    for frame in range(found.shape[1]):
        signal = attention[:, 16 * frame : 16 * frame + 32] * window[:, None]
        expected = np.abs(np.fft.rfft(signal, axis=1)).transpose(0, 2, 1)
        np.testing.assert_allclose(found[:, frame], expected, atol=1e-5)


@pytest.mark.parametrize("length", [64, 4096])
def test_an_entry_like_all_others_is_near_zero_whatever_the_length(length: int):
    even = np.full((1, 64, length), 1 / length, np.float32)
    features = Averages(1).update(np.arange(length)[None], even, length)
    assert abs(float(features[0, 3, 0]) - np.log(1.01) / 2) < 1e-4
    assert (features[0, :, 3:] < -2).all()  # what does not change has no higher frequencies


def test_averages_fade_and_follow_what_is_held():
    rng = np.random.default_rng(1)
    averages, first = Averages(2), np.tile(np.arange(6), (2, 1)).astype(np.int32)
    a = paid(rng, 2, 32, 6)
    averages.update(first, a, 64)
    held = np.array([[0, 2, 5, 70, 71], [1, 2, 3, 70, 71]], np.int32)  # heads differ
    b = paid(rng, 2, 48, 5)
    found = averages.update(held, b, 128)
    frames, before = spectrogram(b), spectrogram(a)
    for head in range(2):
        for i, position in enumerate(held[head].tolist()):
            parts = [frames[head, 1, i], DECAY * frames[head, 0, i]]
            weights = [1, DECAY]
            if position < 64:
                parts.append(DECAY**2 * before[head, 0, position])
                weights.append(DECAY**2)
            mean = np.sum(parts, axis=0) / np.sum(weights)
            np.testing.assert_allclose(
                found[head, i], np.log(mean * 128 / 16 + 0.01) / 2, rtol=1e-4, atol=1e-5
            )


def test_the_same_length_again_changes_nothing():
    rng = np.random.default_rng(2)
    positions = np.arange(40, dtype=np.int32)[None]
    averages = Averages(1)
    once = averages.update(positions, paid(rng, 1, 32, 40), 64)
    again = averages.update(positions, paid(rng, 1, 32, 40), 64)
    assert (once == again).all()


def test_a_fork_goes_on_alone():
    rng = np.random.default_rng(3)
    positions = np.arange(20, dtype=np.int32)[None]
    averages, x = Averages(1), paid(rng, 1, 32, 20)
    averages.update(positions, paid(rng, 1, 32, 20), 64)
    fork = averages.fork()
    averages.update(positions, paid(rng, 1, 32, 20), 128)
    alone = averages.fork()
    assert (fork.update(positions, x, 128) != alone.update(positions, x, 192)).any()
