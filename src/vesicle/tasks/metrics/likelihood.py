"""What is read off log-likelihoods: accuracy of a choice, loss, perplexity, bits per byte."""

from __future__ import annotations

import math

import numpy as np

from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import MeanMetric, Metric


class Accuracy(MeanMetric):
    """Items whose right choice is the likeliest, in percent; the first wins a tie."""

    name = "accuracy"
    title = "Accuracy"

    def score(self, item: Item, output: Output) -> float:
        """1 if the right choice has the highest log-likelihood, else 0."""
        return float(int(np.argmax(output.choice_nats)) == item.answer)


class NormalisedAccuracy(MeanMetric):
    """Items whose right choice has the highest log-likelihood per byte, in percent.

    A sum over tokens favours short choices; dividing by length takes that away. `acc_bytes` of
    lm-evaluation-harness does the same; its `acc_norm` divides by characters instead, which is the
    same in ASCII. Both leave the blank between prompt and choice out of the length.
    """

    name = "accuracy_norm"
    title = "Accuracy, length-normalised"

    def score(self, item: Item, output: Output) -> float:
        """1 if the right choice has the highest log-likelihood per UTF-8 byte, else 0."""
        per_byte = np.array(output.choice_nats) / np.array(output.choice_bytes)
        return float(int(np.argmax(per_byte)) == item.answer)


class Loss(Metric):
    """The mean loss in nats of all scored tokens together; depends on the tokenizer."""

    name = "loss"
    title = "Loss (nats/token)"
    percent = False
    digits = 4
    higher_is_better = False

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """Summed loss in nats, and the number of scored tokens."""
        return (output.nats, float(output.n_tokens))

    def value(self, sums: FloatArray) -> float:
        """Nats per token, from sums (2,) of both."""
        return float(sums[0] / sums[1])


class Perplexity(Loss):
    """exp of the mean loss."""

    name = "perplexity"
    title = "Perplexity"
    digits = 3

    def value(self, sums: FloatArray) -> float:
        """The exponential of nats per token, from sums (2,) of both."""
        return math.exp(sums[0] / sums[1])


class BitsPerByte(Metric):
    """Loss in bits per UTF-8 byte of the scored text; comparable between tokenizers."""

    name = "bits_per_byte"
    title = "Bits per byte"
    percent = False
    higher_is_better = False

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """Summed loss in nats, and the UTF-8 bytes of the scored text."""
        return (output.nats, float(output.n_bytes))

    def value(self, sums: FloatArray) -> float:
        """Bits per UTF-8 byte, from sums (2,) of nats and bytes."""
        return float(sums[0] / math.log(2) / sums[1])
