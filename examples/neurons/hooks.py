"""Read neurons, levels and decisions by name; clamp a neuron, lesion a transmitter.

python examples/neurons/hooks.py [--tiny]
"""

import torch
from subject import subject

from vesicle.neurons.edits import clamp, lesion
from vesicle.neurons.hooks import Hooked
from vesicle.phases import EVERYWHERE

model, modulator, encode = subject()
hooked = Hooked(model, modulator.at(0.7, EVERYWHERE))
ids = torch.tensor([encode("The sky is blue because the air scatters the light of the sun.")])

seen = hooked.run(ids, read=["blocks.1.mlp.hook_post"])
print("neurons of layer 1:", tuple(seen["blocks.1.mlp.hook_post"].shape))
print("levels that it released, on average:", seen["blocks.1.hook_levels"].mean((0, 1)).tolist())
print("FLOPs:", seen.run.cost.flops_total)

layers = range(hooked.shape.n_layers)
rested = [lesion(f"blocks.{layer}.hook_levels", "dopamine") for layer in layers]
print("FLOPs where dopamine rests:", hooked.run(ids, edits=rested).run.cost.flops_total)

held = hooked.run(ids, edits=[clamp("blocks.1.mlp.hook_post", 5, 50.0)])
for name, run in (("as it is", seen), ("with neuron 1.5 held at 50", held)):
    print(f"next token {name}:", run.logits[0, -1].argmax().item())
