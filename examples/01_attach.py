"""Attach a modulator to a Hugging Face model, generate, and see what was decided and what it costs.

    python examples/01_attach.py [MODULATOR]

The reference executor masks work and does not skip it: it shows what a budget does to the text. For
speed, see 02_engine.py.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from vesicle import Modulator, attach, load_default_modulator, price_dense, resolve_model
from vesicle.transmitters import NAMES

# Any folder or hub id of a supported family works; None is the default model, fetched once.
folder = resolve_model(None)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
modulator = (
    Modulator.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else load_default_modulator()
)

question = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)

# Outside the `with` block the model is, bit for bit, what it was.
with attach(model, modulator, budget=0.9) as run:
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
answer = output[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))

# Levels are continuous, 1 is rest: (tokens, layers, 5).
for name, level in zip(NAMES, run.levels[0].mean((0, 1)), strict=True):
    print(f"{name:14} {level:.3f}")

# The Plan is discrete: what each token computes in each layer.
plan = run.plan
print(f"{plan.n_tokens} tokens x {plan.n_layers} layers")
print(f"FFNs run in full: {(plan.ffn == 2).mean():.1%}, attention run: {plan.attention.mean():.1%}")

# And its price, beside that of the dense model on the same tokens.
share = run.cost.ratio(price_dense(run.shape, plan.n_tokens))
print(f"FLOPs: {share['flops']:.3f} of dense, weight bytes: {share['weight_bytes']:.3f}")
