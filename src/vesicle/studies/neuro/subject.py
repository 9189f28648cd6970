"""A variant as a module: the decoder, and the modulator that is trained with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from vesicle.effectors import SerotoninDepth
from vesicle.evaluation.execution.executor import Span
from vesicle.evaluation.execution.language_modelling import model_shape
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.modulator import Modulator, ModulatorMethod
from vesicle.phases import EVERYWHERE
from vesicle.predictors import ConstantLevels, MlpPredictor, PredictorConfig
from vesicle.scratch.patterns import Strided, Tiles, TilesState, patterned
from vesicle.small_modules import LowRankMaps, SmallFfn
from vesicle.studies.neuro.variants import Variant
from vesicle.training.trainer import READ_OUT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from vesicle.plan import Method
    from vesicle.scratch.patterns import Pattern

_DIALS = np.linspace(0.01, 0.99, 99)
"""Of levels that are not learnt, at which their cost is looked up."""

_SMALLER, _RECENT = 8, 16
"""Hidden units of a big FFN for each one of a small; newest positions that tiles leave alone."""


class Subject(nn.Module):
    """What one variant trains.

    Attributes:
        model: The decoder.
        modulator: None where nothing is released.
        patterns: Of attention, by layer; none where it is dense.
        tiles: What tiles share; None without.
        importance: What releases acetylcholine for them.
        variant: Which one this is.
    """

    def __init__(self, model: LlamaForCausalLM, variant: Variant, rank: int, seed: int) -> None:
        """Before its training.

        Args:
            model: The dense decoder; its attention is replaced where the variant has a pattern.
            variant: What to make of it.
            rank: Of the maps that skipped modules land on.
            seed: Of what begins at random; the state of torch's own generator is left as it was.
        """
        super().__init__()
        self.model, self.variant = model, variant
        self.shape = model_shape(model)
        self._dials: list[tuple[float, float]] | None = None
        self.patterns: list[Pattern] = []
        self.tiles: TilesState | None = None
        self.importance: MlpPredictor | None = None
        if variant.attention is not None:
            how = variant.attention
            self.patterns = patterned(model, lambda layer: Strided(**how))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if variant.tiles:
                self._learn_tiles(variant.tiles)
            self.modulator = _modulator(self, rank) if variant.modulated else None
        if variant.tune == "none":
            model.requires_grad_(False)

    def _learn_tiles(self, share: float) -> None:
        shape = self.shape
        self.importance = MlpPredictor(
            PredictorConfig(
                n_layers=shape.n_layers,
                width=shape.width,
                transmitters=("acetylcholine",),
                hidden=8,
            )
        )
        state = self.tiles = TilesState(self.importance, budget=share)
        width, groups = shape.width, shape.n_kv_heads
        self.patterns = patterned(
            self.model, lambda layer: Tiles(layer, state, width, groups, recent=_RECENT)
        )

    @property
    def reads(self) -> torch.Tensor:
        """(L,) entries that a query of each layer read in the last pass, on average."""
        return torch.stack([pattern.reads for pattern in self.patterns])

    def dial(self, budget: float) -> float:
        """Where to turn to for a budget while training.

        Learnt levels come to mean the share that they are asked for. Others do not, so that the
        dial is looked up at which they execute it: all variants are trained at the same costs.
        """
        if self.variant.predictor != "none":
            return budget
        assert self.modulator is not None
        if self._dials is None:
            ledger = self.ledger(1, int(self.model.config.max_position_embeddings))
            sizes = self.shape.n_layers, len(self.variant.transmitters)
            self._dials = [(ledger.share(np.full(sizes, 1 - d)), d) for d in _DIALS]
        shares, dials = zip(*self._dials, strict=True)
        return float(np.interp(budget, shares, dials))

    def ledger(self, n_texts: int, length: int) -> Ledger:
        """What levels cost on texts of one length, logits at every position."""
        assert self.modulator is not None
        spans = [[Span(0, length, 0)]] * n_texts
        return Ledger(self.modulator, self.shape, spans, phases=EVERYWHERE)

    def method(self, dial: float) -> Method:
        """The modulator at a dial, acting on every token."""
        assert self.modulator is not None
        return ModulatorMethod(self.modulator, dial, EVERYWHERE)

    def served(self, dial: float) -> Method:
        """The same as it is executed: levels that are the dial itself need no predictor."""
        assert self.modulator is not None
        if self.variant.predictor != "none" or dial >= 1:
            return self.method(dial)
        levels = ConstantLevels(self.modulator.predictor.config, dial)
        return ModulatorMethod(self.modulator.with_levels(levels), 1.0, EVERYWHERE)


def _modulator(subject: Subject, rank: int) -> Modulator:
    variant, effectors = subject.variant, {}
    if variant.small == "nothing":
        effectors["serotonin"] = SerotoninDepth(
            ffn_below=0.5, attention_below=0.5, bypass_below=0.5
        )
    made = Modulator.new(
        subject.shape,
        predictor="linear" if variant.predictor == "none" else variant.predictor,
        transmitters=variant.transmitters,
        effectors=effectors,
        ffn_rank=rank,
        attention_rank=rank,
    )
    if variant.small == "ffns":
        shape = subject.shape
        units = max(1, shape.ffn_width // _SMALLER)
        made.ffn_standin = SmallFfn(shape.n_layers, shape.width, units)
    if variant.small != "nothing":
        for module in (made.ffn_standin, made.attention_standin):
            # They learn with all else. The outer matrix stays at zero, at which nothing jumps; from
            # zero in both nothing would move.
            assert isinstance(module, SmallFfn | LowRankMaps)
            inner = module.ffn_in if isinstance(module, SmallFfn) else module.down
            nn.init.normal_(inner, std=subject.shape.width**-0.5)
            module.requires_grad_(True)
    if variant.predictor == "none":
        made.predictor.requires_grad_(False)
    elif variant.layers_alone:
        for name, parameter in made.predictor.named_parameters():
            parameter.requires_grad_(name in READ_OUT)
    return made
