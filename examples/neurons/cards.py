"""A card for every neuron of a model: print one, and write the page with all of them.

python examples/neurons/cards.py [--tiny]

With --tiny, of a tiny random model, in seconds; otherwise of the default model, which takes some
minutes the first time. What is done is kept in runs/cards, and gone on with.
"""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from vesicle import load_default_modulator, resolve_model
from vesicle.models import Text
from vesicle.neurons.atlas import page, summary
from vesicle.neurons.cards import CardSettings, make_cards
from vesicle.neurons.contexts import windows_of
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.phases import EVERYWHERE

document = "The cat sat on the mat. A dog came in, and the cat left by the window.\n" * 80

if "--tiny" in sys.argv:
    # A random model that reads bytes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = Text(tokenizer, special_tokens={}, template=None, eos_ids=[], context_window=256)
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=256,
    )
    torch.manual_seed(0)
    hooked = Hooked(AutoModelForCausalLM.from_config(config).eval())
    out = Path(tempfile.mkdtemp())
else:
    folder = resolve_model(None)
    text = Text.from_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hooked = Hooked(model, load_default_modulator(), 0.7, phases=EVERYWHERE)
    out = Path("runs/cards")

hooked.model.requires_grad_(False)
windows = windows_of(text, [document], 64)
cards = make_cards(hooked, windows, out, CardSettings(), name="example")

card = cards.card(Neuron(1, 17), text)
print(f"neuron {card.neuron}, above half of its maximum at {card.share_above_half:.1%} of tokens")
for kind, row in card.tokens.items():
    print(f"{kind:>5} {row['way']} {row['score']:.1f} {row['likeliest']}")
for context in card.highest[:3]:
    print(f"{context.activation:8.2f} {context.before!r} [{context.token!r}] {context.behind!r}")
for name, drive in card.drives.items():
    print(f"drives {name} by {drive['drive']:+.1e}, rank {drive['rank']}")

# How many neurons decode to more than random mixtures of them do? 5 % would by chance.
for kind, found in summary(cards, text)["scores"].items():
    share = found["share_above_mixtures_high"]
    print(f"{kind:>5}: {share['mean']:.1%} ({share['low']:.1%} to {share['high']:.1%})")

(out / "atlas.html").write_text(page(cards, text), encoding="utf-8")
print(f"open {out / 'atlas.html'} in a browser")
