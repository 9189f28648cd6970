"""Tell which documents a model was trained on, by the probabilities of their tokens.

python examples/neurons/membership.py [--tiny]

With --tiny a small decoder is trained on half of 20 short texts, and told by its loss. The default
model has read neither half, so that nothing but chance is to be found in it.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vesicle.neurons.membership import (
    PUBLISHED,
    attack_scores,
    bag_of_words_scores,
    chance,
    estimate,
    fold_aucs,
    learnt_scores,
    other_splits,
    prepare,
    read_documents,
    reading,
    settings_of,
    token_probabilities,
    train_decoder,
)

settings = settings_of("debug", epochs=8)
corpus = prepare(read_documents("sample"), settings)
members = corpus.members(seed=0)
documents, window = corpus.ids, settings.attacked.window

if "--tiny" in sys.argv:
    with TemporaryDirectory() as folder:
        model = train_decoder(corpus, 0, settings.sizes["narrow"], settings, Path(folder))
else:
    import torch
    from transformers import AutoModelForCausalLM

    from vesicle import Text, resolve_model

    path = resolve_model(None)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = Text.from_folder(path)
    documents, window = [text.encode(own) for own in corpus.texts], 128

with reading(model) as read:
    found = token_probabilities(read, documents, corpus.folds.tolist(), window=window)
scores = attack_scores(found, corpus.texts, members, bins=20)
scores["bag of words"] = bag_of_words_scores(corpus.texts, members, corpus.folds)
losses = found.losses()
print(f"members {losses[members].mean():.3f} nats, others {losses[~members].mean():.3f} nats")
for name in ("loss", "none/aggregate", PUBLISHED, "bag of words"):
    area = estimate(scores[name], members, corpus.folds)
    print(f"{name}: AUC {area.value:.2f} ({area.low:.2f} to {area.high:.2f})")
splits = other_splits(members, corpus.folds)
by_chance = fold_aucs(learnt_scores(found, splits, PUBLISHED, 20), splits, corpus.folds)
print("without any memory:", chance(np.array([by_chance])))
