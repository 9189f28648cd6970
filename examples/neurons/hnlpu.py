"""What each kind of decision would save with the model in the metal of a chip.

python examples/neurons/hnlpu.py [--tiny]

With --tiny, of a tiny random model; otherwise of the default model's shape.
"""

import sys

import numpy as np

from vesicle import resolve_model
from vesicle.cost import price, price_dense
from vesicle.families import find_family
from vesicle.models.checks import read_config
from vesicle.neurons.hnlpu import published_price, report
from vesicle.plan import FFN_SKIP, Plan

if "--tiny" in sys.argv:
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=200,
    )
else:
    config = read_config(resolve_model(None))
shape = find_family(config).decoder_config(config).shape

paper = published_price()
print(f"gpt-oss 120B, as published: {1e3 * paper.joules.middle:.1f} mJ a token")

# A text of 256 tokens, and Plans that save one kind of work each.
n_tokens = 256
rest, dense = Plan.rest(shape, n_tokens), price_dense(shape, n_tokens)
every_second = np.arange(shape.n_layers) % 2 == 1
plans = {
    "all at rest": rest,
    "half of the channels": rest.with_fields(channels=rest.channels // 2),
    "2 of 4 weight bits": rest.with_fields(bits=np.full_like(rest.bits, 2)),
    "every second FFN skipped": rest.with_fields(
        ffn=np.where(every_second, FFN_SKIP, rest.ffn).astype(np.int32)
    ),
    "a quarter of the cached blocks": rest.with_fields(kv_blocks=-(-rest.kv_blocks // 4)),
}
for name, plan in plans.items():
    found = report(price(plan, shape), dense, shape, n_tokens, plan=plan)
    joules, there = found.joules_share, found.published_chip
    print(
        f"{name:31} {found.flops:.3f} of dense FLOPs, energy {joules.middle:.3f} "
        f"({joules.low:.3f} to {joules.high:.3f}), on gpt-oss's chips {there.middle:.3f}"
    )

chip = found.executed.chip
print(
    f"{chip.n_chips} chip with {chip.parameters / 1e6:.3g} million parameters; masks and design "
    f"cost {chip.nre_usd.low / 1e6:.0f} to {chip.nre_usd.high / 1e6:.0f} million USD, whatever the "
    "Plan"
)
