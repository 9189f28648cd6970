"""Facts as questions to a model: does it say the answer, and how likely is it?

A fact counts as known where the model, greedily, goes on with the first two tokens of the answer
(the answer's only token, if it has one). Both are judged in one pass, given the true first token,
which gives what generating them would: the second is reached only if the first is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.facts import ANSWER, SUBJECT, Fact
from vesicle.neurons.sets import lesions

Encode = Callable[[str], list[int]]
_TOKENS = 2
"""Of an answer, as published."""
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Question:
    """A fact in one wording.

    Attributes:
        prompt: Token ids up to the answer.
        target: The answer's first tokens.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a model made of questions.

    Attributes:
        correct: (N,) whether it says the answer.
        nats: (N,) log probability of the answer's first tokens.
    """

    correct: Tensor
    nats: Tensor


def question(fact: Fact, wording: str, encode: Encode) -> Question | None:
    """A fact in a wording; None where a token straddles the end of the prompt."""
    before, _, _ = wording.partition(ANSWER)
    before = before.replace(SUBJECT, fact.subject)
    prompt = encode(before.rstrip())
    both = encode(before + fact.answer)
    target = both[len(prompt) :][:_TOKENS]
    if both[: len(prompt)] != prompt or not target:
        return None
    return Question(prompt=tuple(prompt), target=tuple(target))


@torch.no_grad()
def judge(
    hooked: Hooked, questions: Sequence[Question], silenced: Sequence[int] | Tensor = ()
) -> Judged:
    """Ask a model, some of its neurons silenced.

    Args:
        hooked: The model.
        questions: N of them.
        silenced: Numbers of neurons, see `sets`.
    """
    model: Any = hooked.model
    correct = torch.zeros(len(questions), dtype=torch.bool)
    nats = torch.zeros(len(questions))
    with hooked.hold(lesions(silenced, hooked.shape)):
        for group in _alike(questions):
            asked = [questions[i] for i in group]
            ids = torch.tensor([[*q.prompt, *q.target[:-1]] for q in asked])
            target = torch.tensor([q.target for q in asked])
            out = model(ids, use_cache=False, logits_to_keep=target.shape[1]).logits.float()
            correct[group] = (out.argmax(-1) == target).all(-1)
            chances = out.log_softmax(-1).gather(-1, target[..., None])
            nats[group] = chances.sum((-1, -2)).to(nats)
    return Judged(correct=correct, nats=nats)


@torch.no_grad()
def activations(hooked: Hooked, questions: Sequence[Question], reading: str) -> Tensor:
    """(N, L F) neurons' activations on prompts.

    Args:
        hooked: The model.
        questions: N, of which the prompts are read.
        reading: `mean` over the prompt's tokens (as published), or `last` for its last one.
    """
    model: Any = hooked.model
    shape = hooked.shape
    found = torch.empty(len(questions), shape.n_layers * shape.ffn_width)
    for group in _alike(questions):
        ids = torch.tensor([questions[i].prompt for i in group])
        with hooked.hold(read=["blocks.*.mlp.hook_post"]) as seen:
            model(ids, use_cache=False, logits_to_keep=1)
        each = [x.mean(1) if reading == "mean" else x[:, -1] for x in seen.activations.values()]
        found[group] = torch.cat(each, -1).to(found)
    return found


def _alike(questions: Sequence[Question]) -> list[list[int]]:
    """Batches of numbers of questions with as many tokens, so that nothing is padded."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, q in enumerate(questions):
        groups.setdefault((len(q.prompt), len(q.target)), []).append(i)
    return [own[i : i + _BATCH] for own in groups.values() for i in range(0, len(own), _BATCH)]
