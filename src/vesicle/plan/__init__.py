"""The Plan: what is computed for each token in each layer, and the interface of whoever decides it.

Whoever decides writes a Plan (a modulator, a control, an oracle, a saved file); whoever computes
executes it (the reference, the engine). A Plan holds discrete facts only, in two tables. One row
for each of T tokens in each of L layers:

===========  ==========  =====================================================================
field        attribute   meaning
===========  ==========  =====================================================================
channels     (T, L, 4)   input channels read, largest magnitude first, at each site
bits         (T, L, 4)   weight bits read at each site: 16 (the stored weights), 8, 4, 3 or 2
ffn          (T, L)      FFN module: 0 skip, 1 small (stand-in), 2 big
attention    (T, L)      1 attention runs, 0 its stand-in; keys and values are written either way
kv_blocks    (T, L)      blocks of 16 cached positions that the query reads, of those it sees
head         (T,)        LM head: 0 whole; m screens it by leading bits, then ranks the m best
likeliest    (T,)        LM head: m words are ranked exactly, the best by a preview; 0 for all
logits       (T,)        LM head: m logits are exact, the others are the preview's; 0 for all
===========  ==========  =====================================================================

and events between tokens: which entries of the cache end.

The four *sites* are the distinct inputs of a layer's projections: `attention_in` (queries, keys,
values), `attention_out`, `ffn_in` (gate and up) and `ffn_out` (down).

Causality: every decision about token t is a function of tokens up to t. A Plan fills layer by
layer, and a pass in one piece, in chunks or token by token fills it with the same values.

The last three are of the last layer. `head` and `likeliest` act where the likeliest token alone is
asked for, `logits` where logits are, and the last two where there is a preview (`StandIns.head`),
which goes before planes of bits. Each is 0 wherever it did not act.

A new decision is a line in `layout.FIELDS`, a price in `cost.py` and its execution.
"""

from vesicle.plan.author import Author, Method, StandIns
from vesicle.plan.builder import PlanBuilder, opening
from vesicle.plan.events import EVENT, FOREVER, FORGET, Events
from vesicle.plan.forgetting import Evidence, Forgetter, all_but
from vesicle.plan.given import Dense, Replay
from vesicle.plan.layout import FIELDS, Field
from vesicle.plan.plan import Plan
from vesicle.plan.rows import (
    FFN_BIG,
    FFN_SKIP,
    FFN_SMALL,
    ROW,
    SITES,
    FloatArray,
    IntArray,
    Rows,
    check_rows,
    numbers,
    rest_head,
    resting_rows,
)
from vesicle.plan.windows import BLOCK, visible_blocks
from vesicle.shapes import FULL_BITS

__all__ = [
    "BLOCK",
    "EVENT",
    "FFN_BIG",
    "FFN_SKIP",
    "FFN_SMALL",
    "FIELDS",
    "FOREVER",
    "FORGET",
    "FULL_BITS",
    "ROW",
    "SITES",
    "Author",
    "Dense",
    "Events",
    "Evidence",
    "Field",
    "FloatArray",
    "Forgetter",
    "IntArray",
    "Method",
    "Plan",
    "PlanBuilder",
    "Replay",
    "Rows",
    "StandIns",
    "all_but",
    "check_rows",
    "numbers",
    "opening",
    "rest_head",
    "resting_rows",
    "visible_blocks",
]
