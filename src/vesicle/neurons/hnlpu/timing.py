"""How long a token takes on a hardwired chip, and how soon the next one follows.

    token = L / 36 x 864 us x (0.829 c m + 0.138 w m + 0.028 w m + 0.006 a)

864 us is one token of gpt-oss 120B through all layers, with 216 sequences in flight. The four
numbers are where they go at a context of 2K (figure 14 of Liu et al. 2026): between chips (c: 1
where there are several, else 0), projections and elementwise work (w: the model's width over
gpt-oss's), and attention (a: its arithmetic over gpt-oss's, per layer). m is the share of modules
that run. Channels save no time: a neuron counts its wires at once, however many are zero.

Stages keep step, so that a token leaves after each sixth of a layer's time, whatever it skipped.
Only in the hopeful scenario does the pipeline close up.

Not modelled: waiting for HBM (10.7 % of the time at 512K, negligible up to 256K).
"""

from __future__ import annotations

from dataclasses import dataclass

from vesicle.neurons.hnlpu.chip import Chip
from vesicle.neurons.hnlpu.constants import (
    ATTENTION_TIME,
    CONTEXT,
    ELEMENTWISE_TIME,
    GPT_OSS,
    LINK_TIME,
    PROJECTION_TIME,
    STAGES,
    TOKEN_S,
)
from vesicle.neurons.hnlpu.scenarios import Scenario
from vesicle.neurons.hnlpu.work import Work, published_work


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The pace of tokens.

    Attributes:
        token_s: Seconds from one token of a sequence to its next.
        between_s: Seconds from one token to the next of all sequences, all slots full.
    """

    token_s: float
    between_s: float


def timing(work: Work, dense: Work, chip: Chip, scenario: Scenario) -> Timing:
    """Of a token.

    Args:
        work: What it does.
        dense: What it does in the dense model.
        chip: Where.
        scenario: What is assumed.
    """
    own, whole = _token_s(work, chip, scenario), _token_s(dense, chip, scenario)
    pace = own if scenario.closes_up else whole
    return Timing(
        token_s=own if scenario.skipping_saves else whole,
        between_s=pace / (STAGES.value * chip.n_layers),
    )


def modules(work: Work, scenario: Scenario) -> float:
    """Share of modules that run, as a scenario takes it."""
    if not scenario.skipping_saves:
        return 1.0
    return work.fewest_modules if scenario.closes_up else work.modules


def context_shares(n_positions: int) -> dict[str, float]:
    """Where a token's time goes on the paper's chips at a context, as its figure 14 tells."""
    parts = {
        "link": LINK_TIME.value,
        "projection": PROJECTION_TIME.value,
        "elementwise": ELEMENTWISE_TIME.value,
        "attention": ATTENTION_TIME.value * n_positions / CONTEXT.value,
    }
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def _token_s(work: Work, chip: Chip, scenario: Scenario) -> float:
    ran = modules(work, scenario)
    width = chip.width / GPT_OSS.width if scenario.by_width else 1.0
    attention = work.vector_flops / chip.n_layers * GPT_OSS.n_layers / published_work().vector_flops
    layer = (
        LINK_TIME.value * chip.linked * ran
        + (PROJECTION_TIME.value + ELEMENTWISE_TIME.value) * width * ran
        + ATTENTION_TIME.value * attention
    )
    return TOKEN_S.value * chip.n_layers / GPT_OSS.n_layers * layer
