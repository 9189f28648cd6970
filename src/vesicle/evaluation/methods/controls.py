"""Levels that no one learnt, at equal executed cost: what a learnt modulator must beat.

Each control keeps the modulator's effectors and stand-ins, and sets their levels by a rule with one
free number x, which `matching` finds for any asked cost.

=============  ============================================================================
control        deficits 1 - level of token t, layer l, transmitter a
=============  ============================================================================
`uniform`      x, the same everywhere
`uniform-mix`  x m_a, m_a the learnt run's mean: its mix, but nothing of layers and tokens
`per-layer`    x m_la, the learnt run's mean of each layer: nothing of tokens. An ablation
               of the modulator, as it takes over what that learnt about layers
`random`       x u_tla, u drawn from U(0, 2)
`shuffled`     x times the window's learnt deficits, permuted in time within each layer
`best-of-n`    x r_la, the best of N random tables: half of them r ~ U(0, 1), half with each
               transmitter's column multiplied by one more draw. Duo-LLM found that routers
               often do no better than the best of 100 such plans
`static-shape` a table that a greedy search finds (`descent`): one shape, of some depth and
               width, for all tokens, as AmoebaLLM (Fu et al. 2024) draws from a model
=============  ============================================================================

Deficits end at 1. `uniform-mix` and `per-layer` use means over the very text that is evaluated, and
`best-of-n` and `static-shape` select on (the beginnings of) what is evaluated: all favour the
controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vesicle.errors import BudgetError
from vesicle.evaluation.methods.descent import Descent, OracleConfig
from vesicle.evaluation.methods.ledger import Deficits, Ledger, released
from vesicle.evaluation.methods.matching import TOLERANCE, Matched, match
from vesicle.plan import FloatArray, Method
from vesicle.predictors import RandomLevels, ShuffledLevels, spread_seed

NAMES = ("uniform", "uniform-mix", "per-layer", "random", "shuffled", "best-of-n", "static-shape")
FROM_LEARNT = ("uniform-mix", "per-layer", "shuffled")
"""Controls that are made from the levels of the learnt run."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control at a cost.

    Attributes:
        name: As in the module's table.
        method: For all sequences, or one for each.
        cost_share: Priced, over the ledger's sequences.
        deficits: As matched.
        details: The free number and what else it was set to.
    """

    name: str
    method: Method | list[Method]
    cost_share: float
    deficits: Deficits
    details: dict[str, Any]

    def of(self, i: int) -> Method:
        """The method of the i-th sequence."""
        return self.method[i] if isinstance(self.method, list) else self.method


def from_deficits(name: str, ledger: Ledger, matched: Matched, **details: Any) -> Control:
    """A control from matched deficits."""
    d = matched.deficits
    method: Method | list[Method] = (
        [ledger.method(ledger.table(part)) for part in d]
        if isinstance(d, list)
        else ledger.method(ledger.table(d))
    )
    return Control(
        name=name,
        method=method,
        cost_share=matched.cost_share,
        deficits=d,
        details={"x": matched.x, "dither": matched.dither, **details},
    )


def uniform(ledger: Ledger, target: float, seed: int = 0) -> Control:
    """One level for all tokens, layers and transmitters."""
    shape = (ledger.config.n_layers, len(ledger.config.transmitters))
    found = match(ledger, lambda x: np.full(shape, x), target, high=1.0, seed=seed)
    return from_deficits("uniform", ledger, found)


def uniform_mix(
    ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0
) -> Control:
    """The learnt mean deficit per transmitter, for all tokens and layers.

    Args:
        ledger: Prices deficits.
        target: Executed share.
        learnt: Released levels, one (T, L, 5) a sequence.
        seed: Of a dither.
    """
    mean = _rows(ledger, learnt).mean((0, 1))
    n_layers = ledger.config.n_layers
    found = match(ledger, lambda x: np.tile(x * mean, (n_layers, 1)), target, seed=seed)
    return from_deficits("uniform-mix", ledger, found, mean_deficits=mean.tolist())


def per_layer(
    ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0
) -> Control:
    """The learnt mean deficit per layer and transmitter; arguments as `uniform_mix`."""
    mean = _rows(ledger, learnt).mean(0)
    found = match(ledger, lambda x: x * mean, target, seed=seed)
    return from_deficits("per-layer", ledger, found, mean_deficits=mean.tolist())


def random(ledger: Ledger, target: float, seed: int = 0) -> Control:
    """Deficits drawn for each token, layer and transmitter; the same in every window."""

    def drawn(x: float) -> RandomLevels:
        return RandomLevels(ledger.config, 1.0 - x, seed)

    def family(x: float) -> FloatArray:
        levels = released(ledger.modulator.with_levels(drawn(x)), ledger.n_tokens)
        return 1.0 - levels[..., ledger.columns]

    found = match(ledger, family, target, high=1.0, seed=seed)
    result = from_deficits("random", ledger, found, seed=seed)
    if found.dither is not None:
        return result
    return replace(result, method=ledger.method(drawn(found.x)))


def shuffled(ledger: Ledger, target: float, learnt: Sequence[FloatArray], seed: int = 0) -> Control:
    """Each sequence's learnt levels, permuted in time within each layer; as `uniform_mix`.

    The sequence's number, and `seed`, make the permutation. Cost depends on *where* few blocks are
    read, so a permutation may change it; deficits are scaled only if it did by more than
    `TOLERANCE`.
    """
    deficits = [
        1.0
        - ShuffledLevels(
            ledger.config, levels[..., ledger.columns], spread_seed(seed, i)
        ).levels.numpy()
        for i, levels in enumerate(learnt)
    ]
    found = Matched(deficits=deficits, x=1.0, dither=None, cost_share=ledger.share(deficits))
    if abs(found.cost_share / target - 1) > TOLERANCE:
        found = match(ledger, lambda x: [x * d for d in deficits], target, seed=seed)
    return from_deficits("shuffled", ledger, found)


def random_table(shape: tuple[int, int], seed: int, i: int) -> FloatArray:
    """Deficits (L, A) of the i-th of N random tables, before they are scaled to a cost."""
    # Below 2**32 the last word is 0, which NumPy ignores; above, a large seed stays apart from i.
    rng = np.random.default_rng([seed % 2**32, i, seed >> 32])
    table = rng.random(shape)
    return table * rng.random(shape[1]) if i % 2 else table


def best_of_n(
    ledger: Ledger, target: float, loss: Callable[[Method], float], *, n: int, seed: int = 0
) -> Control:
    """The best of N random tables of levels per layer and transmitter, each at the asked cost.

    Args:
        ledger: Prices deficits on what the cost is asked for.
        target: Executed share.
        loss: By which the best is chosen, in nats per token.
        n: N.
        seed: Of the tables.
    """
    shape = (ledger.config.n_layers, len(ledger.config.transmitters))
    losses: list[float] = []
    best, index = None, 0
    for i in range(n):
        table = random_table(shape, seed, i)
        found = match(ledger, lambda x, table=table: x * table, target, seed=spread_seed(seed, i))  # type: ignore[misc]  # mypy cannot type a default in a lambda
        tried = from_deficits("best-of-n", ledger, found)
        losses.append(loss(tried.of(0)))
        if best is None or losses[i] < losses[index]:
            best, index = tried, i
    assert best is not None
    details = {
        "n": n,
        "index": index,
        "selection_loss_nats": losses[index],
        "selection_quartiles_nats": [float(q) for q in np.quantile(losses, (0.25, 0.5, 0.75))],
    }
    return replace(best, details={**best.details, **details})


def static_shape(ledger: Ledger, target: float, loss: Callable[[Method], float]) -> Control:
    """The table of levels that a greedy search finds, at the asked cost.

    Args:
        ledger: Prices deficits on what the cost is asked for.
        target: Executed share.
        loss: By which the search goes, in nats per token.

    Raises:
        BudgetError: If its ladder ends above the target.
    """
    descent = Descent(lambda methods: [loss(m) for m in methods], ledger, OracleConfig())
    found = descent.at(target)
    if found is None:
        raise BudgetError(f"a cost of {target:.3f} of dense cannot be reached by single steps")
    return from_deficits("static-shape", ledger, found)


def control(
    name: str,
    ledger: Ledger,
    target: float,
    *,
    seed: int,
    learnt: Sequence[FloatArray] = (),
    n: int = 1,
    loss: Callable[[Method], float] | None = None,
) -> Control:
    """A control by its name.

    Args:
        name: One of `NAMES`.
        ledger: Prices deficits.
        target: Executed share of the dense FLOPs.
        seed: Of whatever is random.
        learnt: Levels (T, L, 5) that the learnt run released on each sequence, for `FROM_LEARNT`.
        n: Random tables that `best-of-n` tries.
        loss: By which it and `static-shape` select, in nats per token.

    Raises:
        BudgetError: If the share cannot be reached.
    """
    match name:
        case "uniform":
            return uniform(ledger, target, seed)
        case "uniform-mix":
            return uniform_mix(ledger, target, learnt, seed)
        case "per-layer":
            return per_layer(ledger, target, learnt, seed)
        case "random":
            return random(ledger, target, seed)
        case "shuffled":
            return shuffled(ledger, target, learnt, seed)
        case "best-of-n" if loss is not None:
            return best_of_n(ledger, target, loss, n=n, seed=seed)
        case "static-shape" if loss is not None:
            return static_shape(ledger, target, loss)
    raise ValueError(f"{name!r} is no control; known: {', '.join(NAMES)}")


def _rows(ledger: Ledger, learnt: Sequence[FloatArray]) -> FloatArray:
    """Deficits (tokens, L, A) of all sequences together, which may differ in length."""
    return 1.0 - np.concatenate([levels[..., ledger.columns] for levels in learnt])
