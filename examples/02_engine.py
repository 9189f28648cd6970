"""Stream an answer from the engine, which skips what the Plan skips, and count what it cost.

python examples/02_engine.py [MODULATOR]
"""

import sys

from vesicle import Engine, Modulator, Replay, Sampling, load_default_modulator

# Any folder, .gguf file or hub id of a supported family works; None is the default model.
engine = Engine.from_pretrained(None)
modulator = (
    Modulator.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else load_default_modulator()
)
chat = [{"role": "user", "content": "Why is the sky blue?"}]

# All at once. A str is a text to continue; messages go through the model's chat template.
answer = engine.generate(chat, modulator, budget=0.9, max_new_tokens=24)
print(f"{answer.text}\n{answer.share:.3f} of dense FLOPs")

# Or token by token. A sequence holds one text's cache, Plan, levels and counted cost.
sequence = engine.start(modulator, budget=0.9)
decoder = engine.text.stream()
for token in engine.stream(
    sequence,
    chat,
    max_new_tokens=24,
    sampling=Sampling(temperature=0.7, top_p=0.9, seed=1),
):
    print(decoder.push(token), end="", flush=True)
print(decoder.flush())

for quantity, share in sequence.cost.ratio(sequence.dense_cost).items():
    print(f"{quantity:14} {share:.3f} of dense")

# The Plan can be executed again, token for token, without the predictor.
replay = engine.start(Replay(sequence.plan, modulator.stand_ins))
engine.forward([(replay, sequence.token_ids)])
print(f"replayed {replay.length} tokens; the same Plan: {replay.plan.equals(sequence.plan)}")
