"""Stream an answer from the engine, which skips what the Plan skips, and count what it cost.

python examples/02_engine.py [MODULATOR]
"""

import sys

from vesicle import (
    Engine,
    Modulator,
    Replay,
    Sampling,
    Text,
    load_default_modulator,
    price_dense,
    resolve_model,
)
from vesicle.report import with_logits

folder = resolve_model(None)
engine = Engine.from_pretrained(folder)
text = Text.from_folder(folder)
modulator = (
    Modulator.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else load_default_modulator()
)
prompt = text.chat("Why is the sky blue?")

# A sequence holds one text's cache, Plan, levels and counted cost.
sequence = engine.start(modulator, budget=0.9)
decoder = text.stream()
for token in engine.stream(
    sequence,
    prompt,
    max_new_tokens=24,
    sampling=Sampling(temperature=0.7, top_p=0.9, seed=1),
    stop=text.eos_ids,
):
    print(decoder.push(token), end="", flush=True)
print(decoder.flush())

dense = price_dense(
    engine.shape, sequence.length, with_logits=with_logits(sequence.length, len(prompt))
)
for quantity, share in sequence.cost.ratio(dense).items():
    print(f"{quantity:14} {share:.3f} of dense")

# The Plan can be executed again, token for token, without the predictor.
replay = engine.start(Replay(sequence.plan, modulator.equipment))
engine.forward([(replay, sequence.token_ids)])
print(f"replayed {replay.length} tokens; the same Plan: {replay.plan.equals(sequence.plan)}")
