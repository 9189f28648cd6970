"""Training one variant on one task, and judging it: the study's jobs that take long.

Each variant goes on from the same decoder, which was trained densely: they have equal parameters
and see equal tokens in equal order. While tiles are trained, budgets are drawn from the whole dial
and the edges of tiles harden; a price on the distance between budget and share makes the dial mean
the share. Judged are hard tiles.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from vesicle.scratch import DecoderSize, Recipe, draw, fit, new_decoder
from vesicle.studies.att.judging import TEMPERATURE, Judge, bigram_surprise
from vesicle.studies.att.scale import SCALES, Scale
from vesicle.studies.att.variants import ABLATIONS, COMPARED, SELECTED, Decoder, Variant
from vesicle.studies.corpora import Corpus, load_corpus

_PRICE = 4.0
_SOFTEST = 0.15
_GOLDEN = (math.sqrt(5) - 1) / 2
VARIANTS = {variant.name: variant for variant in (*COMPARED, *ABLATIONS)}


def train_base(
    out: Path, *, task: str, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """The decoder that all variants of a task and seed go on from; a job."""
    size, corpus = SCALES[scale], corpus_of(task, scale, data, text)
    model = new_decoder(_shape(size, task), seed)
    started = time.monotonic()

    def loss_at(step: int) -> Tensor:
        ids, scored = _batch(corpus, size, task, step, seed)
        return _mean_loss(model(ids).logits, ids, scored)

    recipe = Recipe(steps=size.base_steps)
    losses = fit(model, loss_at, recipe, _folder(out, task, "base", seed), facts={"seed": seed})
    return {
        "losses": losses,
        "tokens": size.base_steps * size.batch_tokens,
        "training_tokens": int(corpus.train.numel()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
    }


def train_variant(
    out: Path,
    *,
    task: str,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    variant: str,
    share: float | None,
) -> dict[str, Any]:
    """One variant, trained and judged; a job.

    Args:
        out: The study's folder.
        task: One of `corpora.TASKS`.
        scale: One of `SCALES`.
        seed: Of the base and of the order of the text.
        texts: What they are, as `fingerprint` tells.
        data: As `load_corpus` has it.
        text: More text to train on.
        variant: One of `VARIANTS`.
        share: That it is trained for; None where its share moves, or it has none.
    """
    size, corpus = SCALES[scale], corpus_of(task, scale, data, text)
    decoder = from_base(out, task, size, seed, VARIANTS[variant], share or 1.0)
    surprise = bigram_surprise(corpus) if decoder.needs_surprise else None
    started, state = time.monotonic(), decoder.state
    dense = (size.lengths[task] + 1) / 2
    low = 0.8 * min(size.shares)
    recipe = Recipe(steps=size.steps, learning_rate=1e-3)

    def loss_at(step: int) -> Tensor:
        ids, scored = _batch(corpus, size, task, size.base_steps + step, seed)
        if state is not None:
            place = step / max(1, recipe.steps - 1)
            state.temperature = _SOFTEST * (TEMPERATURE / _SOFTEST) ** place
            state.budget = low + (1 - low) * ((step + 1) * _GOLDEN % 1)
            state.surprise = None if surprise is None else surprise(ids)
        loss = _mean_loss(decoder.model(ids).logits, ids, scored)
        if state is None or decoder.importance is None:
            return loss
        return loss + _PRICE * (decoder.reads() / dense - state.budget) ** 2

    name = variant if share is None else f"{variant}-{share}"
    facts = {"seed": seed, "variant": variant, "share": share}
    losses = fit(decoder, loss_at, recipe, _folder(out, task, name, seed), facts=facts)
    trained_s = time.monotonic() - started
    return {
        "losses": losses,
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "points": Judge(decoder, corpus, task, surprise).points(size.shares),
        "trained_tokens_per_s": round(size.steps * size.batch_tokens / max(trained_s, 1e-9)),
    }


def judge_selected(
    out: Path,
    *,
    task: str,
    scale: str,
    seed: int,
    texts: str,
    data: str | None,
    text: str | None,
    rule: str,
) -> dict[str, Any]:
    """The dense variant, run by a rule that chooses pages; a job."""
    size, corpus = SCALES[scale], corpus_of(task, scale, data, text)
    tried: list[dict[str, Any]] = [{"opened": n} for n in (1, 2, 4, 8)]
    if rule == "twilight":
        tried = [{"mass": mass} for mass in (0.3, 0.6, 0.8, 0.9)]
    points = []
    for options in tried:
        variant = Variant(
            name=rule, kind="selected", what=SELECTED[rule], options={"rule": rule, **options}
        )
        decoder = trained(out, task, size, seed, "dense", None, variant)
        points.append({"options": options, **Judge(decoder, corpus, task, None).losses()})
    return {"points": points}


def from_base(
    out: Path, task: str, size: Scale, seed: int, variant: Variant, share: float
) -> Decoder:
    """A variant before its own training."""
    from safetensors.torch import load_file

    model = new_decoder(_shape(size, task), seed)
    weights = load_file(_folder(out, task, "base", seed) / "model.safetensors")
    model.load_state_dict(weights, strict=False)  # what is tied is there once
    return Decoder(model, variant, share, size.recent)


def trained(
    out: Path,
    task: str,
    size: Scale,
    seed: int,
    name: str,
    share: float | None = None,
    runs_as: Variant | None = None,
) -> Decoder:
    """A variant after its training.

    Args:
        out: The study's folder.
        task: One of `corpora.TASKS`.
        size: The scale.
        seed: Of the run.
        name: Of the variant.
        share: That it was trained for.
        runs_as: Another variant of the same parameters that it is run as.
    """
    from safetensors.torch import load_file

    decoder = from_base(out, task, size, seed, runs_as or VARIANTS[name], share or 1.0)
    folder = _folder(out, task, name if share is None else f"{name}-{share}", seed)
    decoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return decoder.eval()


@lru_cache(maxsize=1)
def corpus_of(task: str, scale: str, data: str | None, text: str | None) -> Corpus:
    """The texts of a task at a scale; the newest is kept."""
    from vesicle.training.data import load_documents

    size = SCALES[scale]
    more = load_documents(text) if text is not None and task == "lm" else []
    return load_corpus(
        task,
        data,
        vocabulary=size.vocabulary,
        length=size.lengths[task],
        most_test=size.test_windows,
        more=more,
    )


def _shape(size: Scale, task: str) -> DecoderSize:
    return DecoderSize(
        vocabulary=size.vocabulary,
        width=size.width,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_heads // 2,
        ffn=3 * size.width,
        context=size.lengths[task],
    )


def _folder(out: Path, task: str, name: str, seed: int) -> Path:
    return out / "models" / task / name.replace(" ", "-") / str(seed)


def _batch(corpus: Corpus, size: Scale, task: str, step: int, seed: int) -> tuple[Tensor, Tensor]:
    n = max(1, size.batch_tokens // size.lengths[task])
    chosen = draw(len(corpus.train), n, step, seed)
    return corpus.train[chosen], corpus.scored[0][chosen]


def _mean_loss(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean over the targets that count."""
    wanted = ids[:, 1:].masked_fill(~scored[:, 1:], -100)
    return cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
