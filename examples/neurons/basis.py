"""The Local Interaction Basis between two layers of a language model, beside PCA.

python examples/neurons/basis.py [--tiny]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from subject import subject

from vesicle.neurons.basis import LayerStudy, study_layers, verdict

TEXT = """Water boils at a hundred degrees at the level of the sea. The moon pulls the tides. Bread
rises because yeast makes gas out of sugar. A prime number has two divisors. Paris lies on the
Seine, and Vienna on the Danube. Bees dance to tell each other where flowers are. Steel is iron
with a little carbon in it. The heart of a mouse beats six hundred times a minute. Snow is white
because it scatters light of all colours. A chess game begins with sixteen pieces on each side.
Copper turns green in the rain. A year on Mars has nearly seven hundred days. Whales sing, and their
songs change from year to year. Salt lowers the point at which water freezes. Cats sleep most of the
day. The longest river of Europe is the Volga. Glass is made of sand, soda and lime. An octopus has
three hearts. Rust needs water and air. Owls cannot move their eyes, and so they turn their heads.
"""

tiny = "--tiny" in sys.argv
model, _, encode = subject()
windows = torch.tensor(encode(TEXT)[:200]).view(10, 20)
# Late layers and few features, because each layer from there to the logits takes time, and so does
# each feature. A study wants far more text.
study = LayerStudy(layer=2 if tiny else 27, windows=8, held_out=2, probes=8, features=16)
with TemporaryDirectory() as folder:
    report, graphs = study_layers(model, windows, study, Path(folder), name="example")

for pair in report.compared:  # all that reaches the next layer, and what this layer adds to it
    print(f"{pair.source} to {pair.target}, {pair.n_source} features of each")
    for measure, lib in pair.bases["lib"].items():
        pca, less = pair.bases["pca"][measure], pair.less["pca"][measure]
        print(f"  {measure:10} {lib.mean:.3f}, PCA {pca.mean:.3f}: {verdict(measure, less)}")
first = graphs["lib"].importance[0][:5]
print("importance of the first features:", ", ".join(f"{value:.3g}" for value in first))
