"""What one token makes a hardwired chip do, from the ledger's cost of a Plan.

The ledger counts bytes in the formats of the engine that ran. A chip has formats of its own, so
what is taken from the ledger is work: multiply-adds with weights, arithmetic of attention, numbers
of the cache that were read. Bytes are used as shares of the dense model's alone.

A skipped channel is a zero on an input wire: nothing behind it toggles, and its multiply-adds are
not executed. A skipped module feeds nothing at all. Stand-ins and the predictor are taken to be
cast beside the model; their metal is left out of the area.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from vesicle.cost import Cost, price_dense
from vesicle.errors import DataError
from vesicle.neurons.hnlpu.constants import CONTEXT, GPT_OSS
from vesicle.plan import FFN_BIG, Plan
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one token, a mean over those that were counted.

    Attributes:
        macs: Multiply-adds with weights: projections, LM head, stand-ins, predictor.
        vector_flops: Of attention, of choosing what it reads and of evidence for forgetters.
        cache_numbers: Keys and values read, in numbers.
        modules: Share of the model's attention and FFN modules that ran; 1 where it is not known.
        fewest_modules: The least that this may be.
        bits: Weight bits that a multiply-add needs, as a share of those that were cast.
    """

    macs: float
    vector_flops: float
    cache_numbers: float
    modules: float = 1.0
    fewest_modules: float = 1.0
    bits: float = 1.0

    @classmethod
    def of(
        cls,
        executed: Cost,
        dense: Cost,
        shape: ModelShape,
        n_tokens: int,
        *,
        plan: Plan | None = None,
        cast_bits: int = 4,
    ) -> Work:
        """Of what a Plan executed.

        Args:
            executed: The Plan's cost, or what an engine counted.
            dense: The dense model's price for the same tokens.
            shape: Of the model.
            n_tokens: How many tokens both are of.
            plan: The Plan itself. A cost alone does not tell whether modules were skipped: without
                it, anything from none to as many as the missing multiply-adds could be, and bits
                are told from bytes.
            cast_bits: Of a weight in metal; a Plan that reads as many or more saves none.

        Raises:
            DataError: There are no tokens, the dense model did nothing on them, or the Plan has
                others.
        """
        if n_tokens < 1:
            raise DataError(f"n_tokens is {n_tokens}; allowed: 1 and above")
        if min(dense.flops_linear, dense.flops_attention, dense.kv_bytes_read) < 1:
            raise DataError("the dense cost is empty: it is not that of a model that read a token")
        dense_flops = dense.flops_linear + dense.flops_head
        flops = (
            executed.flops_linear
            + executed.flops_head
            + executed.flops_standin
            + executed.flops_modulator
        )
        # Two FLOPs for each of a head's queries and for each number of a key, twice for values.
        visits = dense.flops_attention / (4 * shape.queries_of_a_head)
        numbers = 2 * shape.head_size * visits * executed.kv_bytes_read / dense.kv_bytes_read
        if plan is None:
            missing = (dense.flops_linear - executed.flops_linear) / (2 * n_tokens)
            ran, fewest = 1.0, _fewest(missing, shape)
            bits = executed.weight_bytes / max(flops, 1) / (dense.weight_bytes / dense_flops)
        else:
            if (plan.n_tokens, plan.n_layers) != (n_tokens, shape.n_layers):
                raise DataError(
                    f"the plan has {plan.n_tokens} tokens and {plan.n_layers} layers; the cost is "
                    f"of {n_tokens} tokens of a model of {shape.n_layers} layers"
                )
            ran = fewest = _modules(plan)
            # All but the projections is computed with whole weights.
            own = executed.flops_linear / max(flops, 1)
            bits = 1 - own * (1 - _bits(plan, shape, cast_bits))
        return cls(
            macs=flops / (2 * n_tokens),
            vector_flops=(
                executed.flops_attention + executed.flops_selection + executed.flops_evidence
            )
            / n_tokens,
            cache_numbers=numbers / n_tokens,
            modules=ran,
            fewest_modules=fewest,
            bits=min(1.0, bits),
        )

    def times(self, shares: Work) -> Work:
        """Each field times that of another: `shares` of `Work.over`."""
        return Work(**{f.name: getattr(self, f.name) * getattr(shares, f.name) for f in _FIELDS})

    def over(self, dense: Work) -> Work:
        """Each field as a share of the dense model's."""
        return Work(**{f.name: getattr(self, f.name) / getattr(dense, f.name) for f in _FIELDS})


_FIELDS = fields(Work)


@lru_cache(maxsize=1)
def published_work() -> Work:
    """What the token does that the paper's table 2 is about."""
    cost = price_dense(GPT_OSS, 1, first_position=int(CONTEXT.value) - 1)
    return Work.of(cost, cost, GPT_OSS, 1)


def cost_from(values: Any, name: str) -> Cost:
    """A cost from JSON, as `vesicle run --json` writes it in `executed` and `dense`.

    Args:
        values: What the key holds.
        name: What it is called in messages.

    Raises:
        DataError: It is no object, or a field is missing or no whole number from 0 on.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"{name} is {values!r}; allowed: an object, as vesicle run --json writes")
    known = [f.name for f in fields(Cost)]
    for field in known:
        value = values.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"{name}: {field} is {value!r}; allowed: a whole number from 0 on")
    return Cost(**{field: values[field] for field in known})


def _modules(plan: Plan) -> float:
    """Share of attention and FFN modules that a Plan runs."""
    return float(np.mean([(plan.attention == 1).mean(), (plan.ffn == FFN_BIG).mean()]))


def _fewest(missing: float, shape: ModelShape) -> float:
    """Least share of modules that ran, if a token lacks so many multiply-adds of projections."""
    widths, outputs = shape.site_widths, shape.site_outputs
    # Who skips attention writes keys and values all the same.
    attention = shape.width * shape.query_width + widths[1] * outputs[1]
    ffn = widths[2] * outputs[2] + widths[3] * outputs[3]
    skipped = 0.0
    for size in sorted((attention, ffn)):
        taken = min(max(missing, 0.0) / size, shape.n_layers)
        skipped += taken
        missing -= taken * size
    return 1 - skipped / (2 * shape.n_layers)


def _bits(plan: Plan, shape: ModelShape, cast_bits: int) -> float:
    """Bits that a multiply-add of the Plan's projections needs, as a share of those cast."""
    runs, big = plan.attention == 1, plan.ffn == FFN_BIG
    outputs = np.broadcast_to(np.array(shape.site_outputs), plan.channels.shape).copy()
    outputs[..., 0] = np.where(runs, outputs[..., 0], 2 * shape.kv_width)
    outputs[..., 1] *= runs
    outputs[..., 2:] *= big[..., None]
    macs = plan.channels * outputs
    return float((macs * np.minimum(plan.bits, cast_bits)).sum() / (macs.sum() * cast_bits))
