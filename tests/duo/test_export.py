"""What is exported computes the same."""

import torch

from tests.duo.conftest import SIZE
from vesicle.duo import DuoFeedForward, parted


def test_the_parts_compute_what_they_did_together(duo, text):
    model, _ = duo
    plain, small = parted(model)
    torch.testing.assert_close(plain(text[None]).logits, model(text[None]).logits, rtol=0, atol=0)
    assert not any(isinstance(module, DuoFeedForward) for module in plain.modules())
    assert isinstance(model.model.layers[0].mlp, DuoFeedForward)
    small.check(SIZE.n_layers, SIZE.width)
    x = torch.randn(3, 7, SIZE.width)
    for number, layer in enumerate(model.model.layers):
        torch.testing.assert_close(small.apply_layer(number, x), layer.mlp.small(x))
