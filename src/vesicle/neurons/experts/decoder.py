"""Small decoders whose FFNs are MoE-X layers: `vesicle.scratch`'s, with other FFNs.

All of a size cost a token the same, whatever the number of experts: the width that it runs is the
decoder's `ffn`. A decoder with one expert is the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vesicle.neurons.experts.layer import ExpertFfn, ExpertSize
from vesicle.neurons.experts.routing import (
    FixedRouter,
    Router,
    Routing,
    SparsityRouter,
    TopKRouter,
    balance_loss,
)
from vesicle.scratch import DecoderSize, draw, new_decoder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROUTERS = ("top-k", "sparsity", "densest")
"""Learnt scores, the paper's, and the paper's turned round."""


def new_router(kind: str, size: ExpertSize, *, weighted: bool = True) -> Router:
    """A router of one of `ROUTERS`; a layer with one expert has one that always takes it.

    Raises:
        ValueError: There is no such router.
    """
    if kind not in ROUTERS:
        raise ValueError(f"router is {kind!r}; allowed: {', '.join(ROUTERS)}")
    if size.n_experts == 1:
        return FixedRouter(1, [0])
    if kind == "top-k":
        return TopKRouter(size.width, size.n_experts, size.n_active, weighted=weighted)
    return SparsityRouter(
        size.n_experts, size.n_active, weighted=weighted, densest=kind == "densest"
    )


def new_experts_decoder(
    size: DecoderSize, experts: ExpertSize, router: str, seed: int
) -> LlamaForCausalLM:
    """A decoder with random weights whose FFNs are layers of experts.

    Args:
        size: Of the decoder; `ffn` is what a token runs.
        experts: Of each layer.
        router: One of `ROUTERS`.
        seed: Of all weights; the state of torch's own generator is left as it was. What is no FFN
            is the same for all kinds of experts.

    Raises:
        ValueError: Experts have another width or run another number of units than the decoder's
            FFN has, or there is no such router.
    """
    if (experts.width, experts.active_units) != (size.width, size.ffn):
        raise ValueError(
            f"experts of width {experts.width} run {experts.active_units} units; allowed: width "
            f"{size.width} and {size.ffn} units, as the decoder's size says"
        )
    model = new_decoder(replace(size, ffn=1), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        put_ffns(model, [ExpertFfn(experts, new_router(router, experts)) for _ in _layers(model)])
    return model


def put_ffns(model: LlamaForCausalLM, ffns: list[ExpertFfn]) -> None:
    """Give each layer of a decoder another FFN, in place."""
    for layer, ffn in zip(_layers(model), ffns, strict=True):
        layer.mlp = ffn


def expert_layers(model: nn.Module) -> list[ExpertFfn]:
    """The layers of experts of a model, first to last; none if it has none."""
    return [module for module in model.modules() if isinstance(module, ExpertFfn)]


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Listen to all routers inside the block: what each decided, pass by pass, layer by layer."""
    seen: list[Routing] = []

    def hook(module: nn.Module, args: Any, output: Routing) -> None:
        seen.append(output)

    handles = [ffn.router.register_forward_hook(hook) for ffn in expert_layers(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T - 1) nats by which a decoder misses the next token of ids (B, T)."""
    logits = model(ids[:, :-1]).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    ).view(ids.shape[0], -1)


def training_loss(
    model: nn.Module, ids: Tensor, scored: Tensor, *, batch: int, seed: int, balance: float
) -> Callable[[int], Tensor]:
    """What `scratch.fit` trains a decoder of experts by.

    Args:
        model: The decoder.
        ids: (N, T) texts.
        scored: (N, T) booleans: which tokens count as targets.
        batch: Texts of a step.
        seed: Of the order of texts.
        balance: Weight of the mean balance loss of all layers.

    Returns:
        The loss of a step, in nats a token.
    """

    def loss_at(step: int) -> Tensor:
        rows = draw(len(ids), batch, step, seed)
        with routings(model) as seen:
            losses = token_losses(model, ids[rows])
        counts = scored[rows][:, 1:]
        loss = (losses * counts).sum() / counts.sum().clamp_min(1)
        if balance and seen and seen[0].scores.shape[1] > 1:
            loss = loss + balance * torch.stack([balance_loss(each) for each in seen]).mean()
        return loss

    return loss_at


def _layers(model: LlamaForCausalLM) -> list[Any]:
    return list(model.model.layers)
