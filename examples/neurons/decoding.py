"""Decode every neuron of a model into tokens, and clamp the most specialised ones.

python examples/neurons/decoding.py [--tiny]
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from subject import subject

from vesicle.neurons.clamping import clamp_specialised, largest_values
from vesicle.neurons.decoding.lens import fit_lens
from vesicle.neurons.decoding.tokens import decode_all
from vesicle.neurons.hooks import Hooked

PROMPTS = (
    "The best thing about the old house was its",
    "When they asked her about it, she said the",
    "Most of the people who live there are very",
)

model, _, encode = subject()
model.requires_grad_(False)
hooked = Hooked(model)
ids = torch.tensor([encode(prompt)[:9] for prompt in PROMPTS])
with TemporaryDirectory() as folder:
    decoded = decode_all(model, Path(folder) / "decoded", name="example", k=4)
    lens = fit_lens(hooked, ids, Path(folder) / "lens")
for layer, index, way, score, tokens in decoded.specialised("down", 5):
    print(f"neuron {layer}.{index} ({way:+d}) writes tokens {tokens}, score {score:.1f}")

effect = clamp_specialised(
    hooked, decoded, "down", ids, largest_values(hooked, ids, "down"), count=5
)
summary = effect.summary()
for name in ("specialised", "random"):
    print(f"{name}: their token's log probability rises by {summary[name]['mean']:+.2f}")
print(f"layer 1 reaches the end by a map of norm {float(lens[1].norm()):.1f}")
