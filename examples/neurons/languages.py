"""Find the neurons of languages, and where in the model they are.

python examples/neurons/languages.py [--tiny]
"""

import numpy as np
import torch
from subject import subject

from vesicle.neurons.hooks import Hooked
from vesicle.neurons.languages.entropy import classify, fires, probabilities
from vesicle.neurons.languages.lesions import losses
from vesicle.neurons.languages.parallel import read_parallel
from vesicle.neurons.languages.parts import NAMES, curves, divide, means
from vesicle.neurons.sets import matched

model, _, encode = subject()
hooked = Hooked(model)
sentences = read_parallel("sample", None, 12, 4)

counted = [fires(hooked, [encode(text) for text in own]) for own in sentences.read]
counts = torch.stack([own for own, _ in counted])
classes = classify(probabilities(counts, torch.tensor([tokens for _, tokens in counted])))
for number, language in enumerate(sentences.languages):
    specific, own = classes.of(number, related=False), classes.of(number)
    print(f"{language}: {len(specific)} specific neurons, {len(own) - len(specific)} related ones")

rows = curves(classes, hooked.shape)
parts = divide(rows)
for name, start, (language, general) in zip(
    NAMES, parts.starts, means(rows, parts.starts).T, strict=True
):
    print(f"{name}, from layer {start}: {language:.2%} language neurons, {general:.2%} general")

number = max(range(len(sentences.languages)), key=lambda k: len(classes.of(k)))
own = classes.of(number)
drawn = matched(own, hooked.shape, np.random.default_rng(0))
print(f"nats more a token without the {len(own)} neurons of {sentences.languages[number]}:")
for k, language in enumerate(sentences.languages):
    judged = [encode(text) for text in sentences.judged[k]]
    before = losses(hooked, judged).mean()
    lost, random = (float(losses(hooked, judged, n).mean() - before) for n in (own, drawn))
    print(f"  {language}: {lost:+.3f}, and {random:+.3f} without as many random ones")
