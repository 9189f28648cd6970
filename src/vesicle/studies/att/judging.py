"""Judging a decoder: losses at each share that it can be run at, and what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vesicle.studies.att.variants import Decoder
from vesicle.studies.corpora import Corpus

TEMPERATURE = 0.02
"""Of the edges of tiles at the end of training."""
_BATCH = 4
_BISECTIONS = 7
_DIAL_WINDOWS = 4
_MOST_NEW = {"translation": 180, "summary": 64}


class Judge:
    """A trained decoder, what it is judged on, and how."""

    def __init__(
        self,
        decoder: Decoder,
        corpus: Corpus,
        task: str,
        surprise: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Judge hard tiles.

        Args:
            decoder: Whom.
            corpus: On what.
            task: One of `corpora.TASKS`.
            surprise: (B, T) ids to surprises, for decoders that need them.
        """
        self.decoder, self.corpus, self.task = decoder.eval(), corpus, task
        self.surprise = surprise
        self.dense_reads = (corpus.test.shape[1] + 1) / 2
        if decoder.state is not None:
            decoder.state.temperature = 0.0

    def points(self, shares: tuple[float, ...]) -> list[dict[str, Any]]:
        """Losses and texts at each share: those of `shares` and all, if it has a dial."""
        if not (self.decoder.state and self.decoder.variant.dials):
            self._set(0.0)
            return [{"wanted": None, **self.losses(), **self.written()}]
        found = []
        for share in (*shares, 1.0):
            budget = self.dial(share)
            self._set(budget)
            point = {"wanted": share, "budget": budget, **self.losses(), **self.written()}
            if self.decoder.importance is not None:
                self.decoder.state.temperature = TEMPERATURE
                point["soft_loss"] = self.losses()["loss"]
                self.decoder.state.temperature = 0.0
            found.append(point)
        return found

    def dial(self, share: float) -> float:
        """The budget at which held-out text is read at no more than a share of dense reads."""
        if share >= 1:
            return 1.0
        low, high = 0.0, 1.0
        ids = self.corpus.valid[:_DIAL_WINDOWS]
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self._set(middle)
            self._logits(ids)
            if float(self.decoder.reads()) <= share * self.dense_reads:
                low = middle
            else:
                high = middle
        return low

    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """Mean loss of the targets that count, in nats, each text's, and what was read."""
        ids, scored = self.corpus.test, self.corpus.scored[2]
        sums, counts, reads = list[float](), list[int](), list[float]()
        started = time.monotonic()
        for first in range(0, len(ids), _BATCH):
            part = ids[first : first + _BATCH]
            logits = self._logits(part)
            losses = cross_entropy(
                logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"
            ).double()
            counted = scored[first : first + _BATCH, 1:]
            sums += (losses * counted).sum(1).tolist()
            counts += counted.sum(1).tolist()
            reads += [float(self.decoder.reads())] * len(part)
        return {
            "loss": sum(sums) / sum(counts),
            "text_losses": [round(s / n, 5) for s, n in zip(sums, counts, strict=True)],
            "share": sum(reads) / len(reads) / self.dense_reads,
            "judged_tokens_per_s": round(ids.numel() / (time.monotonic() - started)),
        }

    @torch.no_grad()
    def written(self) -> dict[str, Any]:
        """Scores of greedy texts, for tasks that ask for one."""
        if not self.corpus.prompts or self.decoder.needs_surprise:
            return {}
        started, n_tokens, most_bytes = time.monotonic(), 0, 0
        texts = []
        for prompt in self.corpus.prompts:
            told, held = self.write(prompt, _MOST_NEW[self.task])
            n_tokens += len(told)
            most_bytes = max(most_bytes, held)
            texts.append(self.corpus.tokenizer.decode(told))
        seconds = time.monotonic() - started
        return {
            **scores(self.task, texts, self.corpus.references),
            "written_tokens_per_s": round(n_tokens / seconds, 1),
            "cache_bytes": most_bytes,
            "first_text": texts[0],
        }

    def write(self, prompt: list[int], most: int) -> tuple[list[int], int]:
        """Greedy tokens after a prompt, and the bytes of its caches at the end."""
        model, patterns = self.decoder.model, self.decoder.patterns
        most = min(most, model.config.max_position_embeddings - len(prompt))
        for pattern in patterns:
            pattern.begin()
        told, new, first = list[int](), prompt, 0
        while len(told) < most:
            places = torch.arange(first, first + len(new))[None]
            logits = model(torch.tensor([new]), position_ids=places, logits_to_keep=1).logits
            first += len(new)
            new = [int(logits[0, -1].argmax())]
            if new == [0]:
                break
            told += new
        held = sum(pattern.cache_bytes for pattern in patterns)
        for pattern in patterns:
            pattern.end()
        return told, held

    def _set(self, budget: float) -> None:
        if self.decoder.state is not None:
            self.decoder.state.budget = budget

    @torch.no_grad()
    def _logits(self, ids: Tensor) -> Tensor:
        if self.decoder.state is not None and self.surprise is not None:
            self.decoder.state.surprise = self.surprise(ids)
        logits: Tensor = self.decoder.model(ids).logits
        return logits


def scores(task: str, texts: list[str], references: tuple[str, ...]) -> dict[str, float]:
    """BLEU of translations, caption by caption; ROUGE of summaries."""
    from vesicle.tasks.metrics.base import library

    if task == "translation":
        told, wanted = list[str](), list[str]()
        for text, reference in zip(texts, references, strict=True):
            lines = reference.split("\n")
            got = text.split("\n")[: len(lines)]
            told += got + [""] * (len(lines) - len(got))
            wanted += lines
        bleu = library("sacrebleu").corpus_bleu(told, [wanted])
        return {"bleu": round(bleu.score, 2)}
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = library("rouge_score.rouge_scorer").RougeScorer(kinds)
    rows = [scorer.score(r, t) for t, r in zip(texts, references, strict=True)]
    return {kind: round(100 * sum(r[kind].fmeasure for r in rows) / len(rows), 2) for kind in kinds}


def bigram_surprise(corpus: Corpus) -> Callable[[Tensor], Tensor]:
    """How unlikely a token is after the one before it, by counts in the training text.

    Returns:
        (B, T) ids to (B, T) nats; one count is added to each pair, times the token's own share.
    """
    size = corpus.tokenizer.get_vocab_size()
    ids = corpus.train
    pairs = torch.bincount((ids[:, :-1] * size + ids[:, 1:]).flatten(), minlength=size * size).view(
        size, size
    )
    alone = torch.bincount(ids.flatten(), minlength=size) + 1.0
    alone = alone / alone.sum()

    def surprise(given: Tensor) -> Tensor:
        before, after = given[:, :-1], given[:, 1:]
        chances = (pairs[before, after] + alone[after]) / (pairs.sum(1)[before] + 1)
        return torch.nn.functional.pad(-chances.log(), (1, 0), value=0.0)

    return surprise
