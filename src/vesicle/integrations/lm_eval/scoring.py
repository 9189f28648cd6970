"""Log-likelihoods for lm_eval: what texts begin with in common is read once.

Texts are sorted, so that those that begin alike follow one another, and a few of them make a group.
What all of a group begin with is read into one sequence, which goes on from the last group's as far
as that begins alike too (`Engine.fork`). The rest of each is read side by side, from forks.

What stands before a continuation is its prompt (see `vesicle.phases`). Texts share what they begin
with as far as its tokens are of the same phase in all of them.

The LM head runs for the positions that are scored. Where passes are cut, and who is beside whom,
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vesicle.cost import Cost
from vesicle.engine import Engine
from vesicle.engine.engine import CHUNK
from vesicle.engine.sequence import Sequence as EngineSequence
from vesicle.errors import VesicleError
from vesicle.integrations.lm_eval.tally import Tally
from vesicle.modulator import ModulatorMethod
from vesicle.plan import Method

_SIDE_BY_SIDE = 512
"""Tokens of a pass with logits, which take 100 MB in fp32 at a vocabulary of 49152."""
_WORTHWHILE = 32
"""Tokens from which on reading them once for several texts pays for keeping them apart."""
_PASS = 64
"""About as many tokens as a pass takes time for what does not depend on its tokens."""


@dataclass
class Continuation:
    """The end of a text, to be scored.

    Attributes:
        place: Of its request.
        ids: Token ids, at least one.
        nats: Log-likelihood, of the tokens seen so far.
        greedy: Whether greedy decoding would write them.
    """

    place: int
    ids: list[int]
    nats: float = 0.0
    greedy: bool = True


@dataclass(frozen=True)
class _Text:
    """A text to score.

    Attributes:
        ids: Token ids that are read; the last of a continuation is not.
        continuations: All that end there; of one length, where a prompt is treated otherwise.
        head: Position from where on logits are needed.
    """

    ids: list[int]
    continuations: list[Continuation]
    head: int

    @property
    def prompt(self) -> int:
        """Tokens from the beginning after which nothing is scored."""
        return len(self.ids) - max(len(end.ids) for end in self.continuations)

    def common(self, other: _Text, *, phased: bool) -> int:
        """Tokens from the beginning that are the same in another text, and of the same phase."""
        n = _common(self.ids, other.ids)
        if not phased or self.prompt == other.prompt:
            return n
        return min(n, self.prompt, other.prompt)

    def add(self, start: int, logits: Tensor) -> None:
        """Score what logits (T, V) of the tokens from `start` on say about each continuation."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chances, best = logits.log_softmax(-1), logits.argmax(-1)
        for one in self.continuations:
            first = len(self.ids) - len(one.ids)  # the position that predicts its first token
            begin, end = max(start, first), start + len(logits)
            if begin >= end:
                continue
            labels = torch.tensor(one.ids[begin - first : end - first])
            rows = slice(begin - start, end - start)
            one.nats += float(chances[rows].gather(1, labels[:, None]).double().sum())
            one.greedy = one.greedy and bool((best[rows] == labels).all())


@dataclass(frozen=True)
class _Group:
    """Texts that are read side by side.

    Attributes:
        texts: In the order of their token ids.
        shared: Tokens that all begin with, and that are read once; 0 where that is too few.
    """

    texts: list[_Text]
    shared: int


class Scorer:
    """Scores continuations on an engine, and counts the work."""

    def __init__(self, engine: Engine, method: Method | None, tally: Tally) -> None:
        """Score under a method.

        Args:
            engine: Who computes.
            method: Who decides; None for dense.
            tally: Where work is counted.

        Raises:
            VesicleError: The method does not fit the model.
        """
        self._engine, self._method, self._tally = engine, method, tally
        self._forks = self._can_fork()
        self._phased = isinstance(method, ModulatorMethod) and not (
            method.at_rest or method.counts_prompt
        )

    def score(self, wanted: Mapping[tuple[int, ...], list[Continuation]]) -> Iterator[Continuation]:
        """Score continuations, in an order of our own.

        Args:
            wanted: Token ids to read, and what is asked of their end.

        Yields:
            Each continuation, scored.
        """
        before: EngineSequence | None = None
        last: _Text | None = None
        for group in self._groups(wanted):
            base = self._read_shared(group, before, last)
            last = group.texts[0]
            if before is not None:
                before.close()
            for text, start, logits in self._read_rest(group, base):
                text.add(start, logits)
            for text in group.texts:
                yield from text.continuations
            before = base
        if before is not None:
            before.close()

    def _groups(self, wanted: Mapping[tuple[int, ...], list[Continuation]]) -> Iterator[_Group]:
        """Texts that begin alike, or are short, in groups that are read side by side."""
        group = _Group([], 0)
        for text in _texts(wanted, self._phased):
            if not group.texts:
                group = _Group([text], text.head)
                continue
            common = (one.common(text, phased=self._phased) for one in group.texts)
            shared = min(group.shared, text.head, *common)
            if shared < _WORTHWHILE or not self._forks:
                shared = 0
            texts = [*group.texts, text]
            tokens = sum(len(t.ids) - shared for t in texts)
            again = (group.shared - shared) * (len(group.texts) - 1)  # read by each, not by one
            if tokens <= _SIDE_BY_SIDE and again <= _PASS:
                group = _Group(texts, shared)
            else:
                yield group
                group = _Group([text], text.head)
        if group.texts:
            yield group

    def _read_shared(
        self, group: _Group, before: EngineSequence | None, last: _Text | None
    ) -> EngineSequence | None:
        """A sequence that has read what a group's texts share, None for nothing.

        It goes on from `before`, which has read the text `last` or its beginning, where that begins
        alike.
        """
        shared, text = group.shared, group.texts[0]
        ids = text.ids
        if shared < _WORTHWHILE:
            return None
        start = 0
        if before is not None and last is not None:
            start = min(last.common(text, phased=self._phased), before.length, shared)
        if before is not None and start >= _WORTHWHILE and self._forks:
            base = self._engine.fork(before, start)
        else:
            base, start = self._engine.start(self._method), 0
        base.begin_prompt(min(shared, text.prompt) - start, scored=False)
        for n in _parts(shared - start, CHUNK):
            at = base.length
            self._engine.forward([(base, ids[at : at + n])], "none")
        self._count(base, start, shared, head=shared)
        return base

    def _read_rest(
        self, group: _Group, base: EngineSequence | None
    ) -> Iterator[tuple[_Text, int, Tensor]]:
        """Texts beyond what `base` has read of them all: text, position, logits (T, V) from there.

        A long text comes in parts.
        """
        engine, start = self._engine, 0 if base is None else base.length
        if base is None:
            sequences = [engine.start(self._method) for _ in group.texts]
        elif len(group.texts) == 1:
            sequences = [base]
        else:
            sequences = [engine.fork(base) for _ in group.texts]
        for sequence, text in zip(sequences, group.texts, strict=True):
            sequence.begin_prompt(text.prompt - start, scored=False)
        heads = [text.head for text in group.texts]
        triples = list(zip(sequences, group.texts, heads, strict=True))
        middles = [(s, t.ids[start:head]) for s, t, head in triples if head > start]
        if middles:
            engine.forward(middles, "none")
        if len(triples) > 1:
            ends = [(s, t.ids[head:]) for s, t, head in triples]
            yield from zip(group.texts, heads, engine.forward(ends, "all"), strict=True)
        else:
            sequence, text, head = triples[0]
            for n in _parts(len(text.ids) - head, _SIDE_BY_SIDE):
                at = sequence.length
                yield text, at, engine.forward([(sequence, text.ids[at : at + n])], "all")[0]
        for sequence, text, head in triples:
            self._count(sequence, start, len(text.ids), head)
            if sequence is not base:
                sequence.close()

    def _count(self, sequence: EngineSequence, start: int, stop: int, head: int) -> None:
        """Count the work on a sequence's tokens from `start` to `stop`, logits from `head` on."""
        costs = {name: int(v[start:stop].sum()) for name, v in sequence.token_costs.items()}
        executed = Cost(kv_bytes_held=sequence.cache.bytes_held, **costs)
        self._tally.add(sequence, executed, start, stop, head)

    def _can_fork(self) -> bool:
        """Whether a sequence can go on from within another; not where a predictor carries state."""
        sequence = self._engine.start(self._method)
        self._engine.forward([(sequence, [0, 0])], "none")
        try:
            self._engine.fork(sequence, 1).close()
        except VesicleError:
            return False
        finally:
            sequence.close()
        return True


def _texts(wanted: Mapping[tuple[int, ...], list[Continuation]], phased: bool) -> Iterator[_Text]:
    """The texts, sorted, so that shared beginnings follow one another.

    Where a prompt is treated otherwise, one for each length of continuations, so that all of a
    text's have the same prompt.
    """
    for inputs in sorted(wanted):
        kinds: dict[int, list[Continuation]] = {}
        for end in wanted[inputs]:
            kinds.setdefault(len(end.ids) if phased else 0, []).append(end)
        for _, ends in sorted(kinds.items()):
            longest = max(len(end.ids) for end in ends)
            yield _Text(list(inputs), ends, len(inputs) - longest)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = min(len(first), len(second))
    differ = np.asarray(first[:n]) != np.asarray(second[:n])
    return int(differ.argmax()) if differ.any() else n


def _parts(n: int, most: int) -> list[int]:
    """As few parts of at most `most` as n can be cut into, as even as can be."""
    count = -(-n // most)
    return [n // count + (i < n % count) for i in range(count)]
