"""What is released where, by the whole, and what it goes with; jobs of the study.

Levels are of the dial at which the test texts execute `COST`. Beside them stands a token's *need*:
what it loses where every token is served by its layer's mean levels, scaled to equal cost, over the
dense pass. Levels that know what they do are higher where need is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vesicle.duo.difficulty import by_class, by_frequency, by_position, entropy, spearman
from vesicle.errors import BudgetError
from vesicle.evaluation.methods.matching import match
from vesicle.modulator import ModulatorMethod
from vesicle.phases import EVERYWHERE
from vesicle.plan import BLOCK, FloatArray, Method
from vesicle.predictors import ConstantLevels, ReplayLevels
from vesicle.reference.attach import attach
from vesicle.studies.duo.difficulty import told_groups
from vesicle.studies.neuro.judging import dial_for, executed
from vesicle.studies.neuro.run import Run
from vesicle.studies.neuro.tables import WHOLE
from vesicle.studies.neuro.variants import variants
from vesicle.studies.tokens import token_classes
from vesicle.transmitters import index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vesicle.studies.neuro.subject import Subject

COST = 0.5
"""Executed share at which levels are looked at, or the lowest budget that is reached."""

_DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
_OFTEN, _NAMED = 12, 12


def tell_levels(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """Levels by task, layer, class, position, frequency and need; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject, dial, cost = served(run)
    assert subject.modulator is not None
    names = list(subject.modulator.predictor.config.transmitters)
    columns = [index(name) for name in names]
    by_task, by_layer, need = {}, [], {}
    running: dict[str, Any] = {}
    for task, ids, scored in run.judged("test"):
        levels = stacked(subject, subject.method(dial), ids, scored)[..., columns]  # (N, T, L, A)
        by_task[task] = _named(names, levels.mean((0, 1, 2)))
        by_layer.append(levels.mean((0, 1)))
        gap = _need(subject, levels, ids)
        mean = torch.from_numpy(levels.mean(2))[:, :-1]  # (N, T - 1, A)
        counted = scored[:, 1:]
        need[task] = {
            name: _correlation(mean[..., a][counted], gap[counted]) for a, name in enumerate(names)
        }
        if task == "lm":
            running = _tokens(run, subject, ids, torch.from_numpy(levels.mean(2)), names)
    return {
        "dial": dial,
        "cost": round(cost, 4),
        "transmitters": names,
        "by_task": by_task,
        "by_layer": [_named(names, row) for row in np.mean(by_layer, axis=0)],
        "need": need,
        **running,
    }


def clamp_doses(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """One transmitter at a time held at a level, all else at rest: dose and response; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject = run.trained(variants()[WHOLE])
    assert subject.modulator is not None
    config = subject.modulator.predictor.config
    rows = []
    for a, name in enumerate(config.transmitters):
        for dose in _DOSES:
            table = np.ones((config.n_layers, len(config.transmitters)))
            table[:, a] = dose
            method = ModulatorMethod(
                subject.modulator.with_levels(ConstantLevels(config, table)), 1.0, EVERYWHERE
            )
            for task, ids, scored in run.judged("test"):
                losses, cost, _ = executed(subject, method, ids, scored)
                rows.append(
                    {
                        "transmitter": name,
                        "dose": dose,
                        "task": task,
                        "cost": round(cost, 5),
                        "losses": [round(v, 5) for v in losses],
                    }
                )
    return {"rows": rows}


def lesion(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """One transmitter at a time loses what it knows of tokens, or rests; a job.

    *Flat* has its mean deficit in each layer, scaled so that all cost what they did; *resting* is
    at 1, at more cost; others are as released. What a flat one loses is what its tokens' levels
    were good for, and by class it says for what.
    """
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject, dial, _ = served(run)
    assert subject.modulator is not None
    modulator, rows = subject.modulator, []
    config = modulator.predictor.config
    columns = [index(name) for name in config.transmitters]
    for task, ids, scored in run.judged("test"):
        released = stacked(subject, subject.method(dial), ids, scored)[..., columns]
        base = token_losses(subject, replayed(subject, released), ids)
        classes = [token_classes(run.corpora[task].tokenizer, own.tolist())[1:] for own in ids]
        flat_classes = [name for own in classes for name in own]
        counted = scored[:, 1:]
        judged = [name for name, kept in zip(flat_classes, counted.flatten(), strict=True) if kept]
        for a, name in enumerate(config.transmitters):
            for how in ("flat", "resting"):
                changed = released.copy()
                changed[..., a] = 1.0
                if how == "flat":
                    flat = _flattened(subject, released, (a,))
                    if flat is None:
                        continue
                    changed = flat
                losses = token_losses(subject, replayed(subject, changed), ids)
                more = losses - base
                counts = scored[:, 1:].to(more.dtype)
                each = (more * counts).sum(1) / counts.sum(1).clamp_min(1)
                rows.append(
                    {
                        "task": task,
                        "transmitter": name,
                        "how": how,
                        "more": [round(v, 5) for v in each.tolist()],
                        "cost": round(_cost(subject, changed), 5),
                        "by_class": told_groups(by_class(more[counted], judged)),
                    }
                )
    return {"rows": rows}


def draw_paths(
    out: Path, *, scale: str, seed: int, texts: str, data: str | None, text: str | None
) -> dict[str, Any]:
    """What the tokens of a text compute, layer by layer, and where one layer looks; a job."""
    run = Run(out=out, scale=scale, seed=seed, texts=texts, data=data, text=text)
    subject, dial, _ = served(run)
    _, ids, _scored = next(run.judged("test"))
    n = min(run.size.drawn_tokens, ids.shape[1])
    own = ids[:1, :n]
    with torch.no_grad(), attach(subject.model, subject.method(dial)) as attached:
        subject.model(own, use_cache=False)
    rows, shape = attached.plan.rows, subject.shape
    widths = np.array(shape.site_widths)
    assert subject.modulator is not None
    decode = run.corpora["lm"].tokenizer.decode
    return {
        "pieces": [decode([i], skip_special_tokens=False) for i in own[0].tolist()],
        "levels": {
            name: np.round(attached.levels[0][..., index(name)].T, 4).tolist()
            for name in subject.modulator.predictor.config.transmitters
        },
        "channels": np.round((rows["channels"] / widths).mean(-1).T, 4).tolist(),
        "ffn": rows["ffn"].T.tolist(),
        "attention": rows["attention"].T.tolist(),
        "blocks": np.minimum(rows["kv_blocks"], (np.arange(n) // BLOCK + 1)[:, None]).T.tolist(),
        "maps": _attention_maps(subject, dial, own),
    }


def served(run: Run) -> tuple[Subject, float, float]:
    """The whole, the dial at which levels are looked at, and the cost there."""
    whole = variants()[WHOLE]
    subject, points = run.trained(whole), run.points(whole)
    for cost in (COST, *sorted(run.size.budgets)):
        dial = dial_for(run, subject, points, cost)
        if dial is not None:
            return subject, dial, cost
    return subject, min(run.size.dials), min(p["cost"] for p in points)


def stacked(subject: Subject, method: Method, ids: Tensor, scored: Tensor) -> FloatArray:
    """(N, T, L, 5) released levels."""
    return np.stack(executed(subject, method, ids, scored)[2])


def replayed(subject: Subject, levels: FloatArray) -> list[Method]:
    """Levels (N, T, L, A), as methods of the texts."""
    assert subject.modulator is not None
    modulator = subject.modulator
    config = modulator.predictor.config
    return [
        ModulatorMethod(modulator.with_levels(ReplayLevels(config, own)), 1.0, EVERYWHERE)
        for own in levels
    ]


@torch.no_grad()
def token_losses(subject: Subject, methods: Sequence[Method] | None, ids: Tensor) -> Tensor:
    """(N, T - 1) nats of each token that is predicted; dense without methods."""
    found = []
    for i, own in enumerate(ids):
        if methods is None:
            logits = subject.model(own[None], use_cache=False).logits
        else:
            with attach(subject.model, methods[i]):
                logits = subject.model(own[None], use_cache=False).logits
        found.append(cross_entropy(logits[0, :-1], own[1:], reduction="none"))
    return torch.stack(found)


def _need(subject: Subject, levels: FloatArray, ids: Tensor) -> Tensor:
    """(N, T - 1)."""
    flat = _flattened(subject, levels, tuple(range(levels.shape[-1])))
    if flat is None:  # no scale of the means costs as much: inside a step that all take together
        flat = np.broadcast_to(levels.mean((0, 1)), levels.shape).copy()
    served = token_losses(subject, replayed(subject, flat), ids)
    return served - token_losses(subject, None, ids)


def _flattened(subject: Subject, levels: FloatArray, columns: Sequence[int]) -> FloatArray | None:
    """Levels (N, T, L, A) with some transmitters at their mean deficits, scaled to equal cost.

    None where no scale costs as much.
    """
    ledger, deficits = subject.ledger(*levels.shape[:2]), 1.0 - levels
    mean = deficits.mean((0, 1))

    def family(x: float) -> list[FloatArray]:
        changed = deficits.copy()
        for a in columns:
            changed[..., a] = np.clip(x * mean[:, a], 0.0, 1.0)
        return list(changed)

    try:
        found = match(ledger, family, ledger.share(list(deficits)))
    except BudgetError:
        return None
    return 1.0 - np.clip(np.stack(list(found.deficits)), 0.0, 1.0)


def _cost(subject: Subject, levels: FloatArray) -> float:
    """Executed share of levels (N, T, L, A)."""
    return subject.ledger(*levels.shape[:2]).share(list(1.0 - levels))


def _tokens(
    run: Run, subject: Subject, ids: Tensor, mean: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Mean levels (N, T, A) of running text, by what its tokens are."""
    corpus = run.corpora["lm"]
    classes = [c for own in ids for c in token_classes(corpus.tokenizer, own.tolist())]
    with torch.no_grad():
        logits = torch.cat([subject.model(own[None], use_cache=False).logits for own in ids])
    surprise = entropy(logits)
    found: dict[str, Any] = {}
    n_parts = min(10, ids.shape[1])
    for a, name in enumerate(names):
        own = mean[..., a]
        found[name] = {
            "by_class": told_groups(by_class(own.flatten(), classes)),
            "by_position": told_groups(by_position(own, n_parts)),
            "by_frequency": told_groups(by_frequency(own, ids, corpus.train)),
            "with_entropy": _correlation(own.flatten(), surprise.flatten()),
            **_words(corpus.tokenizer, ids, own),
        }
    return {"tokens": found}


def _words(tokenizer: Any, ids: Tensor, levels: Tensor) -> dict[str, Any]:
    """Frequent tokens with the highest and the lowest mean levels."""
    flat, values = ids.flatten(), levels.flatten().double()
    size = int(flat.max()) + 1
    counts = flat.bincount(minlength=size)
    means = torch.zeros(size, dtype=torch.double).index_add(0, flat, values) / counts.clamp_min(1)
    often = (counts >= _OFTEN).nonzero()[:, 0]
    ordered = often[means[often].argsort()].tolist()

    def told(chosen: Sequence[int]) -> list[list[Any]]:
        decode = tokenizer.decode
        return [[decode([i], skip_special_tokens=False), round(float(means[i]), 4)] for i in chosen]

    return {"lowest": told(ordered[:_NAMED]), "highest": told(ordered[::-1][:_NAMED])}


@torch.no_grad()
def _attention_maps(subject: Subject, dial: float, ids: Tensor) -> dict[str, Any]:
    """Where the middle layer's queries look, the mean over heads, dense and modulated."""
    layer = subject.shape.n_layers // 2
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        dense = subject.model(ids, use_cache=False, output_attentions=True).attentions
        with attach(subject.model, subject.method(dial)):
            served = subject.model(ids, use_cache=False, output_attentions=True).attentions
    finally:
        subject.model.set_attn_implementation(before)
    return {
        "layer": layer,
        **{
            name: np.round(found[layer][0].mean(0).numpy(), 3).tolist()
            for name, found in (("dense", dense), ("modulated", served))
        },
    }


def _correlation(left: Tensor, right: Tensor) -> float | None:
    """Of ranks; None where one of both does not vary."""
    if len(left) < 2 or left.unique().numel() < 2 or right.unique().numel() < 2:
        return None
    return round(spearman(left, right), 4)


def _named(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    return {name: round(float(v), 4) for name, v in zip(names, values, strict=True)}
