"""Where neurons of a model fire, what describes it, and how well the descriptions tell it.

python examples/neurons/describe.py [--tiny]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vesicle import Text
from vesicle.neurons.contexts import windows_of
from vesicle.neurons.descriptions.describe import Subject, describe, drawn_neurons
from vesicle.neurons.descriptions.settings import DescribeSettings
from vesicle.neurons.hooks import Hooked

SUBJECTS = ("The old harbour", "A small garden", "My sister", "The new train", "Every winter")
VERBS = ("was seen from", "stood behind", "came back to", "was painted in", "remembered")
PLACES = ("the river in 1954", "a town of seven bridges", "Paris", "the red house", "May")


def tiny():
    """A random model that reads bytes, and its text side."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from vesicle.scratch import DecoderSize, new_decoder

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size = DecoderSize(
        vocabulary=256, width=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn=64, context=512
    )
    text = Text(tokenizer, special_tokens={}, template=None, eos_ids=[], context_window=512)
    return new_decoder(size, seed=0), text


def default():
    """The default model, in fp32."""
    from transformers import AutoModelForCausalLM

    from vesicle import resolve_model

    folder = resolve_model(None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, Text.from_folder(folder)


model, text = tiny() if "--tiny" in sys.argv else default()
hooked = Hooked(model.eval())
sentences = [f"{s} {v} {p}." for p in PLACES for v in VERBS for s in SUBJECTS]
windows = windows_of(text, [" ".join(sentences)], 64)
half = len(windows) // 2
neurons = drawn_neurons(hooked.shape, 6, seed=0)
# Few contexts of a text that repeats itself: a study wants tens of thousands of tokens.
settings = DescribeSettings(contexts=6, scored=3, random=10, shown=16)
with TemporaryDirectory() as folder:
    subject = Subject(hooked=hooked, text=text)
    report = describe(subject, windows[:half], windows[half:], neurons, settings, Path(folder))

for row in report.neurons:
    areas = row["detection"]["lexical"]
    print(f"{row['neuron']:>8} {row['side']:4} {row['description']!r} ({row['kind']})", end=" ")
    print(f"AUC {areas['own']:.2f}, other neurons' descriptions {areas['shuffled']:.2f}")
above = report.summary["lexical"]["above_shuffled"]
print(f"above other neurons' descriptions by {above['mean']:.3f}")
