"""Find the neurons that drive a transmitter, and see what their lesion does to its levels.

python examples/neurons/probes.py [--tiny]
"""

import torch
from subject import subject

from vesicle.neurons.doses import doses
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.probes import attribute, check_by_lesion
from vesicle.phases import EVERYWHERE

SENTENCES = (
    "The harbour was empty when the first boats came back from the night.",
    "A good tool does one thing well and leaves the rest to others of its kind.",
    "Rivers that run over flat land turn slowly and leave old bends behind them.",
    "She counted the letters twice, and then she wrote the number on the door.",
)

model, modulator, encode = subject()
hooked = Hooked(model, modulator.at(0.7, EVERYWHERE))
ids = torch.tensor([encode(sentence)[:14] for sentence in SENTENCES])

found = attribute(hooked, "dopamine", ids[:2])
print("neurons that drive dopamine most:", [f"{layer}.{i}" for layer, i in found.top(5)])
told = check_by_lesion(hooked, found, ids[2:], count=10)
for name in ("named", "random"):
    print(f"levels change by {told[name]['mean']:.4f} where {name} neurons are held")
for row in doses(hooked, "dopamine", ids[2:], levels=(1.0, 0.5, 0.0)):
    print(f"dopamine at {row['dose']}: {row['nats']:+.3f} nats, {row['share']:.2f} of the FLOPs")
