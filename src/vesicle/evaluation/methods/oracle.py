"""The greedy oracle: levels chosen for one window with that window's own labels.

It bounds from above what levels per layer and transmitter, constant within a window, can do, as far
as a greedy search can see (`descent`); a modulator may beat it by choosing per token, and cannot
know the labels. At each cost the best of the search's table and of given others (uniform, say) is
kept: no worse than any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vesicle.errors import BudgetError
from vesicle.evaluation.methods.controls import Control
from vesicle.evaluation.methods.descent import Descent
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.plan import FloatArray


def oracle(
    descents: Sequence[Descent], ledger: Ledger, target: float, others: Sequence[Control] = ()
) -> Control:
    """The oracle's levels for each window at a cost.

    Args:
        descents: One for each window; they go on from where an earlier, higher cost left them.
        ledger: Prices deficits, at the windows' length.
        target: Executed share.
        others: Controls at the same cost; where one of them is better on a window, it is taken
            there.

    Raises:
        BudgetError: If neither the descent nor any other reaches the cost.
    """
    chosen: list[FloatArray] = []
    names: list[str] = []
    for i, descent in enumerate(descents):
        own = descent.at(target)
        tables: dict[str, FloatArray] = {}
        if own is not None:
            assert not isinstance(own.deficits, list)
            tables["greedy"] = own.deficits
        for other in others:
            given = other.deficits
            tables[other.name] = given[i] if isinstance(given, list) else given
        if not tables:
            raise BudgetError(f"the oracle cannot reach a cost of {target:.3f} of dense")
        losses = descent.losses(list(tables.values()))
        best = int(np.argmin(losses))
        names.append(list(tables)[best])
        chosen.append(list(tables.values())[best])
    full = (ledger.n_tokens, *chosen[0].shape[-2:])
    deficits = [np.broadcast_to(d, full) for d in chosen]
    return Control(
        name="oracle",
        method=[ledger.method(ledger.table(d)) for d in chosen],
        cost_share=ledger.share(deficits),
        deficits=deficits,
        details={"taken": names},
    )
