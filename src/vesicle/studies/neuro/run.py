"""One decoder of the study and what belongs to it: its texts, its weights, its variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vesicle.files import read_json
from vesicle.folders import locked
from vesicle.scratch import DecoderSize, Recipe, draw, fit, new_decoder
from vesicle.studies.corpora import TASKS, Corpus, load_mixture
from vesicle.studies.neuro.learning import dense_loss, faster, loss_of
from vesicle.studies.neuro.scale import SCALES, Scale
from vesicle.studies.neuro.subject import Subject
from vesicle.studies.neuro.variants import Variant

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_PER_CAPTION = 64
"""Tokens of a text for each caption and its translation, of which they fill some 50."""

_RATE = 1e-3
"""Learning rate of variants."""

_MIXING = 0.5
"""Tasks are drawn by the square root of how many texts they have."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A decoder of the study.

    Attributes:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder and of the order of its texts.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        sized: Width and layers, of the scaling study; None for those of the scale.
    """

    out: Path
    scale: str
    seed: int
    texts: str
    data: str | None
    text: str | None
    sized: tuple[int, int] | None = None

    @property
    def size(self) -> Scale:
        """Of the study."""
        return SCALES[self.scale]

    @property
    def decoder(self) -> DecoderSize:
        """Of the decoder."""
        return self.size.sized(self.sized)

    @property
    def corpora(self) -> dict[str, Corpus]:
        """Texts by task, in one vocabulary."""
        return _corpora(self.scale, self.data, self.text)

    @property
    def facts(self) -> dict[str, Any]:
        """What the dense decoder depends on."""
        return {
            "texts": self.texts,
            "seed": self.seed,
            "decoder": asdict(self.decoder),
            "batch": self.size.batch,
            "steps": self.size.base_steps,
            "captions": self.size.length // _PER_CAPTION,
        }

    def folder(self, name: str) -> Path:
        """Of the weights of one training."""
        kind = name if self.sized is None else f"{name}-{self.sized[0]}x{self.sized[1]}"
        return self.out / "models" / kind / str(self.seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids of a step (B, T), and which of them are targets that count.

        Each text is of a task that is drawn; the same (seed, step) gives the same batch.
        """
        rng = np.random.default_rng((self.seed, step))
        sizes = np.array([len(c.train) for c in self.corpora.values()], dtype=float) ** _MIXING
        which = rng.choice(len(sizes), self.size.batch, p=sizes / sizes.sum())
        ids, scored = [], []
        for number, corpus in enumerate(self.corpora.values()):
            n = int((which == number).sum())
            chosen = draw(len(corpus.train), self.size.batch, step, self.seed)[:n]
            ids.append(corpus.train[chosen])
            scored.append(corpus.scored[0][chosen])
        order = torch.from_numpy(rng.permutation(self.size.batch))
        return torch.cat(ids)[order], torch.cat(scored)[order]

    def judged(self, split: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each task its name, texts (N, T) and the targets that count: `valid` or `test`."""
        place = {"valid": 1, "test": 2}[split]
        most = self.size.test_windows if split == "test" else self.size.valid_windows
        for task, corpus in self.corpora.items():
            ids = corpus.test if split == "test" else corpus.valid
            kept = torch.linspace(0, len(ids) - 1, min(len(ids), most)).round().long()
            yield task, ids[kept], corpus.scored[place][kept]

    def fresh(self) -> LlamaForCausalLM:
        """The decoder before any training."""
        return new_decoder(self.decoder, self.seed)

    def base(self) -> LlamaForCausalLM:
        """The dense decoder that all variants go on from; trained again where weights are gone."""
        model = self.fresh()
        self.fit_base(model)
        return model.eval()

    def fit_base(self, model: LlamaForCausalLM) -> list[float]:
        """Train the dense decoder from `fresh`, or take up what was trained; losses by step."""
        recipe = Recipe(steps=self.size.base_steps)
        folder = self.folder("base")
        with locked(folder, wait=True):
            return fit(
                model,
                lambda step: dense_loss(model, *self.batch(step)),
                recipe,
                folder,
                facts=self.facts,
            )

    def untrained(self, variant: Variant) -> Subject:
        """A variant before its own training."""
        return Subject(self.base(), variant, self.size.rank, self.seed)

    def trained(self, variant: Variant) -> Subject:
        """A variant after its training; trained again where weights are gone."""
        subject = self.untrained(variant)
        self.fit_variant(subject)
        return subject.eval()

    def fit_variant(self, subject: Subject) -> list[float]:
        """Train a variant from `untrained`, or take up what was trained; losses by step."""
        variant, steps = subject.variant, self.size.steps
        folder = self.folder(variant.name)
        with locked(folder, wait=True):
            return fit(
                subject,
                loss_of(self, subject, steps),
                Recipe(steps=steps, learning_rate=_RATE),
                folder,
                facts={**self.facts, "variant": variant.facts, "steps": steps},
                faster=faster,
            )

    def points(self, variant: Variant) -> list[dict[str, Any]]:
        """Along a variant's dial, as its own job recorded them."""
        record = read_json(self.out / "records" / "variant" / variant.name / f"{self.seed}.json")
        found: list[dict[str, Any]] = record["result"]["points"]
        return found


@lru_cache(maxsize=1)
def _corpora(scale: str, data: str | None, text: str | None) -> dict[str, Corpus]:
    from vesicle.training.data import load_documents

    size = SCALES[scale]
    return load_mixture(
        TASKS,
        data,
        vocabulary=size.decoder.vocabulary,
        length=size.length,
        most_test=max(size.test_windows, size.valid_windows),
        more=load_documents(text) if text is not None else [],
        captions=max(1, size.length // _PER_CAPTION),
        told=0.5,
    )
