"""Find the neurons of relations, silence them, and see which facts are lost.

python examples/neurons/relations.py [--tiny]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from subject import subject

from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations.experiment import find_relation_neurons
from vesicle.neurons.relations.facts import pick, read_relations
from vesicle.neurons.relations.questions import activations, question
from vesicle.neurons.relations.settings import RelationSettings
from vesicle.neurons.relations.statistics import average_precision, most_specific

model, _, encode = subject()
hooked = Hooked(model)
relations = pick(read_relations("sample"), ["country capital", "country language", "opposite"])

# The statistic by itself, which needs nothing to be known: how well a neuron tells the prompts of
# one relation from those of the others.
asked = [
    (number, found)
    for number, relation in enumerate(relations)
    for fact in relation.facts[:8]
    if (found := question(fact, relation.wordings[0], encode)) is not None
]
labels = torch.tensor([number for number, _ in asked])
scores = activations(hooked, [found for _, found in asked], "mean")
for number, relation in enumerate(relations):
    best = most_specific(scores, labels == number, 3)
    precision = average_precision(scores[:, best], labels == number)
    names = [f"{n // hooked.shape.ffn_width}.{n % hooked.shape.ffn_width}" for n in best.tolist()]
    told = [f"{p:.2f}" for p in precision.tolist()]
    print(f"{relation.name}: {dict(zip(names, told, strict=True))}")

if "--tiny" in sys.argv:
    print("a random model knows no facts: nothing to silence")
else:
    with TemporaryDirectory() as folder:
        report = find_relation_neurons(
            hooked,
            encode,
            relations,
            RelationSettings(facts=12, seeds=1, times=(1.0,)),
            Path(folder),
            facts={"model": "default"},
        )
    for row in report["relations"]:
        lost, random = row["lost"]["mean"], row["lost_random"]["mean"]
        print(
            f"{row['relation']}: {lost:.0%} of its facts are lost, {random:.0%} by random neurons"
        )
