"""Contexts that were read once, for all candidates: these differ from the first eviction on.

A context is read dense; what a NAMM would see of its entries is kept, as is their cache. A
candidate's turn is then a fork that shares the cache, forgets, and reads the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vesicle.engine import Engine
from vesicle.engine.sequence import Sequence as EngineSequence
from vesicle.eviction import Forgetful
from vesicle.evolution.questions import Question
from vesicle.families import find_family
from vesicle.models.checks import read_config
from vesicle.models.memory import check_memory
from vesicle.namm.allotment import allot
from vesicle.namm.gates import gate_scores
from vesicle.namm.method import best, protected
from vesicle.namm.model import Namm, NammSettings
from vesicle.namm.spectrogram import Averages
from vesicle.plan import BLOCK, Dense, Events, Evidence, Forgetter, IntArray, all_but
from vesicle.shapes import ModelShape

_TOGETHER = 8
"""Candidates whose caches exist at a time."""


def capacity_for(folder: Path, questions: Sequence[Question]) -> int:
    """Bytes of keys and values that an engine needs, whatever its cache stores them as.

    Args:
        folder: Of the model.
        questions: Whose contexts it holds, with those of candidates beside the longest.

    Raises:
        ModelError: If there is too little memory for what they hold in fp16.
    """
    config = read_config(folder)
    shape = replace(find_family(config).decoder_config(config).shape, kv_bytes=2)
    lengths = [len(q.context) + len(q.lead) + len(q.answer) + BLOCK for q in questions]
    n_tokens = sum(lengths) + _TOGETHER * max(lengths)
    held = n_tokens * shape.n_layers * shape.position_bytes
    check_memory(held, f"holding {len(questions)} contexts")
    return 2 * held


class _Listening(Forgetful):
    """Forgets nothing, and keeps averages of what entries receive."""

    def __init__(self, settings: NammSettings) -> None:
        super().__init__(interval=settings.interval)
        self.observes = settings.observes
        self.averages: list[list[Averages]] = []

    def spectral(
        self, sequence: EngineSequence, layers: list[int]
    ) -> list[list[NDArray[np.float16]]]:
        """(n, 17) features of each head's entries, as if it were asked where it stands now."""
        observed, scale = sequence.observed, sequence.engine.config.attention_scale
        assert observed is not None
        ran, found = np.ones(self.observes, bool), []
        for layer in layers:
            held = sequence.cache.held(layer)
            attention = observed.attention(sequence.cache, layer, ran, scale)
            features = [
                averages.update(positions, paid, sequence.length).astype(np.float16)
                for averages, positions, paid in zip(
                    self.averages[layer], held, attention, strict=True
                )
            ]
            found.append(features)
        return found

    def forgetter(self, shape: ModelShape) -> Forgetter:
        heads = range(shape.n_kv_heads)
        self.averages = [[Averages() for _ in heads] for _ in range(shape.n_layers)]
        return _Listener(self)


class _Listener(Forgetter):
    def __init__(self, method: _Listening) -> None:
        self.interval, self.observes = method.interval, method.observes
        self._averages = method.averages

    def forget(self, layer: int, length: int, evidence: Evidence) -> Events:
        rows = zip(self._averages[layer], evidence.positions, evidence.attention, strict=True)
        for averages, positions, attention in rows:
            averages.update(positions, attention, length)
        every = [np.ones(positions.shape, bool) for positions in evidence.positions]
        return all_but(layer, length, evidence.positions, every)


class Context:
    """One context, read dense up to its last whole block.

    Attributes:
        question: What it is.
        full: Nats of the answer where nothing is forgotten.
    """

    def __init__(
        self,
        engine: Engine,
        question: Question,
        settings: NammSettings | None,
        gates: NDArray[np.float32] | None = None,
    ) -> None:
        """Read it.

        Args:
            engine: Which holds its cache from now on.
            question: With a context of at least what `settings` observes.
            settings: What NAMMs look at; None for those whose networks prefer nothing.
            gates: (L, G, 2 K + 1) that all candidates have; none by default.
        """
        self.question, self._engine = question, engine
        # The last token before the answer is read by each candidate, whose word on it counts.
        before = min(len(question.context), len(question.context) + len(question.lead) - 1)
        self._length = before // BLOCK * BLOCK
        self._layers = np.nonzero(engine.shape.layer_windows == 0)[0].tolist()
        self._spectral: list[list[NDArray[np.float16]]] = []
        method = None if settings is None else _Listening(settings)
        sequence = engine.start(method or Dense())
        engine.forward([(sequence, question.context[: self._length])], "none")
        self._positions: IntArray = sequence.cache.held(self._layers[0])[0]  # the same in all heads
        if method is not None:
            self._spectral = method.spectral(sequence, self._layers)
        self._gated: list[list[NDArray[np.float32]]] = []
        if gates is not None and gates.size:
            for layer in self._layers:
                found = sequence.newest_entries(layer, self._length)
                keys, values = (list(x.numpy()) for x in found)
                self._gated.append(gate_scores(gates[layer], keys, values))
        self._source = engine.fork(sequence, method=Dense())
        sequence.close()
        self.full = self._nats([engine.fork(self._source)])[0]

    def excess(self, candidates: Sequence[Namm], memory: float) -> NDArray[np.float64]:
        """(C,) nats a token of the answer above the full cache's, under each candidate."""
        return self._excess([(namm, self._counts(namm, memory)) for namm in candidates])

    def excess_without(self, namm: Namm) -> NDArray[np.float64]:
        """(L, G) the same where one head after another holds what always stays, and all others all.

        0 in layers that never forget.
        """
        least = -(-(namm.settings.sinks + namm.settings.recent) // BLOCK) * BLOCK
        shape = self._engine.shape
        size = len(self._layers), shape.n_kv_heads
        alone = np.full((size[0] * size[1], *size), self._length)
        alone.reshape(len(alone), -1)[np.diag_indices(len(alone))] = min(least, self._length)
        found = np.zeros((shape.n_layers, shape.n_kv_heads))
        found[self._layers] = self._excess([(namm, counts) for counts in alone]).reshape(size)
        return found

    def _excess(self, candidates: list[tuple[Namm, NDArray[np.int_]]]) -> NDArray[np.float64]:
        nats: list[float] = []
        for first in range(0, len(candidates), _TOGETHER):
            forks = [self._forked(*c) for c in candidates[first : first + _TOGETHER]]
            nats += self._nats(forks)
        return (np.array(nats) - self.full) / len(self.question.answer)

    def _counts(self, namm: Namm, memory: float) -> NDArray[np.int_]:
        """(layers, G) what heads of the layers that forget hold of it."""
        profile = namm.profile_of(self._engine.shape)[self._layers]
        always = namm.settings.sinks + namm.settings.recent
        counts = allot(profile.ravel(), memory * self._length, self._length, always)
        return np.array(counts).reshape(profile.shape)

    def _forked(self, namm: Namm, counts: NDArray[np.int_]) -> EngineSequence:
        """The context once more, with the best entries of each head by a NAMM's scores."""
        fork, settings = self._engine.fork(self._source), namm.settings
        positions = self._positions
        always = protected(settings, positions, self._length)
        for i, (layer, heads) in enumerate(zip(self._layers, counts.tolist(), strict=True)):
            kept = []
            for head, count in enumerate(heads):
                scores = np.zeros(positions.shape, np.float32)
                if self._spectral and count < self._length:
                    spectral = self._spectral[i][head].astype(np.float32)
                    scores = namm.scores(spectral, positions, self._length)
                if self._gated:
                    found = self._gated[i][head]
                    scores = scores + namm.gated(layer, head, found, positions, self._length)
                kept.append(positions[best(scores, always, count)])
            fork.cache.compact(layer, kept)
        return fork

    def _nats(self, forks: list[EngineSequence]) -> list[float]:
        """Of the answer, after each; they are closed."""
        lead = self.question.context[self._length :] + self.question.lead
        answer = self.question.answer
        tail = [*lead[-1:], *answer[:-1]]
        try:
            if lead[:-1]:
                self._engine.forward([(fork, lead[:-1]) for fork in forks], "none")
            logits = self._engine.forward([(fork, tail) for fork in forks], "all")
        finally:
            for fork in forks:
                fork.close()
        labels = torch.tensor(answer)[:, None]
        return [
            -float(rows[-len(answer) :].float().log_softmax(-1).gather(1, labels).sum())
            for rows in logits
        ]

    def close(self) -> None:
        """Free its cache."""
        self._source.close()
