"""Stage 1, one decoder of the study: its texts, its training with random routing, its weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vesicle.duo import Choices, RandomRouting, make_duo, random_loss
from vesicle.errors import DataError
from vesicle.scratch import Recipe, fit, new_decoder
from vesicle.studies.corpora import Corpus, load_corpus
from vesicle.studies.duo.scale import SCALES, Scale

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_ALL = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Run:
    """One decoder of the study, and what belongs to it.

    Attributes:
        out: The study's folder.
        scale: One of `SCALES`.
        seed: Of the decoder and of the order of its texts.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
    """

    out: Path
    scale: str
    seed: int
    texts: str
    data: str | None
    text: str | None

    @property
    def size(self) -> Scale:
        """Its sizes."""
        return SCALES[self.scale]

    @property
    def corpus(self) -> Corpus:
        """All of its texts."""
        return _corpus(self.scale, self.data, self.text)

    @property
    def facts(self) -> dict[str, Any]:
        """What the trained decoder depends on."""
        size = self.size
        return {
            "texts": self.texts,
            "seed": self.seed,
            "decoder": asdict(size.decoder),
            "ratio": size.ratio,
            "batch_tokens": size.batch_tokens,
            "steps": size.steps,
            "skip": size.skip,
            "label_windows": size.label_windows,
        }

    def split(self, name: str) -> Tensor:
        """(N, T + 1) tokens: `train` of stage 1, `labels` left out of it, `valid`, `test`, `drawn`.

        The last is `test`, whose targets the search draws anew. All but those of stage 1 are
        spread evenly over what there is.

        Raises:
            DataError: There is too little text.
        """
        corpus, size = self.corpus, self.size
        if name in ("test", "drawn"):
            return corpus.test[spread(len(corpus.test), size.test_windows)]
        if name == "valid":
            return corpus.valid[spread(len(corpus.valid), size.valid_windows)]
        left_out = spread(len(corpus.train), size.label_windows)
        if len(left_out) == len(corpus.train):
            raise DataError(
                f"{len(corpus.train)} texts to train on; needed: over {size.label_windows}"
            )
        if name == "labels":
            return corpus.train[left_out]
        kept = torch.ones(len(corpus.train), dtype=torch.bool)
        kept[left_out] = False
        return corpus.train[kept]

    def folder(self, name: str) -> Path:
        """Of the weights of one of its trainings."""
        return self.out / "models" / name / str(self.seed)

    def fresh(self) -> tuple[LlamaForCausalLM, Choices]:
        """The decoder before its training, with small FFNs, and who chooses in it."""
        model = new_decoder(self.size.decoder, self.seed)
        return model, make_duo(model, self.size.ratio, self.seed)

    def trained(self) -> tuple[LlamaForCausalLM, Choices]:
        """The decoder after its training."""
        from safetensors.torch import load_file

        model, choices = self.fresh()
        weights = load_file(self.folder("decoder") / "model.safetensors")
        model.load_state_dict(weights, strict=False)  # what is tied is there once
        return model.eval(), choices


def train_decoder(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Stage 1: a decoder trained with random choices; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    size, train = run.size, run.split("train")
    model, choices = run.fresh()
    batch = max(1, size.batch_tokens // size.length)
    routing = RandomRouting(skip=size.skip)
    loss_at = random_loss(model, choices, train, routing, batch=batch, seed=seed)
    started = time.monotonic()
    losses = fit(model, loss_at, Recipe(steps=size.steps), run.folder("decoder"), facts=run.facts)
    return {
        "losses": losses,
        "tokens": size.steps * batch * (size.length - 1),
        "training_tokens": train.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
    }


def spread(n_items: int, n_wanted: int) -> Tensor:
    """Places of the items wanted, or of all, spread evenly over all of them."""
    return torch.linspace(0, n_items - 1, min(n_items, n_wanted)).round().long()


@lru_cache(maxsize=1)
def _corpus(scale: str, data: str | None, text: str | None) -> Corpus:
    from vesicle.training.data import load_documents

    size = SCALES[scale]
    return load_corpus(
        "lm",
        data,
        vocabulary=size.decoder.vocabulary,
        length=size.length,
        most_test=_ALL,
        more=load_documents(text) if text is not None else [],
    )
