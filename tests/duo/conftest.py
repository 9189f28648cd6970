"""A tiny duo model whose choices matter: its weights are far from a fresh initialisation's."""

import pytest
import torch

from vesicle.duo import Context, make_duo
from vesicle.scratch import DecoderSize, new_decoder

SIZE = DecoderSize(vocabulary=40, width=16, n_layers=3, n_heads=4, n_kv_heads=2, ffn=32, context=64)


@pytest.fixture
def duo():
    """The model and who chooses in it."""
    model = new_decoder(SIZE, 0)
    choices = make_duo(model, ratio=8)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if p.dim() > 1 else 1.0))
    return model.eval(), choices


@pytest.fixture
def text():
    """(13,) tokens."""
    return torch.randint(SIZE.vocabulary, (13,), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def context(duo, text):
    """That text under all big."""
    return Context(duo[0], text)
